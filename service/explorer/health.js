// How the codes are used, and whether what comes in is still like the training.

import { scope, stats } from "./api.js";
import { byId, count, el, figure, hueOf, items, letter, notice, percent, problem, svg, whenSeen } from "./dom.js";
import { errorScale } from "./scale.js";

const CELLS = 4096; // of a level, at most: more codewords are told together, a cell for several
const STEPS = [0.25, 0.5, 1, 2, 4, 8]; // times an even share, where one shade ends and the next begins
const SHADES = ["none", "under ¼", "¼ to ½", "½ to 1", "1 to 2", "2 to 4", "4 to 8", "8 and more"];
const GROUPS = [[1, 1], [2, 2], [3, 3], [4, 4], [5, 9], [10, 19], [20, 49], [50, Infinity]];

let asked = new AbortController();

export function start() {
  byId("health-again").addEventListener("click", run);
  whenSeen(byId("health"), () => {
    run();
    scope.addEventListener("changed", run);
  });
}

async function run() {
  asked.abort();
  asked = new AbortController();
  const place = byId("health-body");
  place.setAttribute("aria-busy", "true");
  try {
    const answer = await stats(asked.signal);
    place.replaceChildren(drift(answer), usage(answer), collisions(answer));
  } catch (error) {
    if (error.name === "AbortError") return;
    place.replaceChildren(problem(error));
  }
  place.setAttribute("aria-busy", "false");
}

function drift({ drift: told }) {
  const kind = { as_trained: "good", further: "warn", retrain: "bad" }[told.verdict] ?? "plain";
  const title = { as_trained: "Like the training.", further: "Further than usual.", retrain: "Retrain.", too_few: "Too few to say.", unknown: "Not known." }[told.verdict];
  return el("article", { class: "card" },
    el("h3", {}, "Drift of the last hour"),
    notice(kind, title, told.meaning),
    told.training && told.rows > 0 && errorScale(told.training, [{ value: told.mean, label: `mean of the last hour ${figure(told.mean)}` }]),
    told.training && told.rows > 0 && facts([
      ["Mean in training", figure(told.training.mean)],
      [`Beyond ${told.tail} of the training`, `${percent(told.share_beyond_tail, 1)} (5% expected)`],
      ["Population stability index", figure(told.population_stability_index, 2)],
    ]),
    el("p", { class: "faint" }, "Counted by the service that answered, by all its workers together; each replica counts for itself."),
  );
}

const facts = (pairs) => el("dl", { class: "facts inline" }, pairs.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));

function usage(answer) {
  const levels = answer.levels.length;
  return el("article", { class: "card" },
    el("h3", {}, "Use of the codebooks"),
    answer.items
      ? [
        el("p", {}, `${items(answer.items)} at revision ${count(answer.revision)}. A cell is a codeword; its shade says how often live items chose it, in times of an even share.`),
        legend(),
        el("div", { class: "heats" }, answer.levels.map((level, at) => heat(level, at, levels, answer.items))),
      ]
      : el("p", { class: "empty" }, "There are no live items to count."),
  );
}

const legend = () => el("p", { class: "legend" }, SHADES.map((name, shade) => el("span", {}, el("span", { class: `swatch s${shade}`, "aria-hidden": "true" }), name)));

function heat(level, at, levels, total) {
  const together = Math.ceil(level.counts.length / CELLS);
  const cells = Array.from({ length: Math.ceil(level.counts.length / together) }, (_, cell) =>
    level.counts.slice(cell * together, (cell + 1) * together).reduce((sum, one) => sum + one, 0));
  const columns = Math.ceil(Math.sqrt(cells.length));
  const even = total / cells.length;
  const shadeOf = (live) => (live ? 1 + STEPS.filter((step) => live / even >= step).length : 0);
  const paths = SHADES.map(() => "");
  cells.forEach((live, cell) => {
    paths[shadeOf(live)] += `M${cell % columns} ${Math.floor(cell / columns)}h.92v.92h-.92z`;
  });
  const readout = el("span", { class: "readout num" });
  const say = (cell) => {
    const first = cell * together;
    const name = together > 1 ? `${letter(at)} ${first}–${Math.min(first + together, level.codewords) - 1}` : `${letter(at)} ${first}`;
    readout.textContent = cell in cells ? `${name}: ${items(cells[cell])}` : "";
  };
  const training = level.training?.perplexity;
  const words = `${count(level.used)} of ${count(level.codewords)} used, perplexity ${figure(level.perplexity)}${training ? ` (${figure(training)} in training)` : ""}`;
  const map = svg("svg", {
    viewBox: `0 0 ${columns} ${Math.ceil(cells.length / columns)}`, class: "heat", role: "img", tabindex: 0,
    "aria-label": `Level ${letter(at)}: ${words}. Arrow keys read the codewords.`,
  }, paths.map((d, shade) => d && svg("path", { class: `s${shade}`, d })), svg("rect", { class: "cursor", width: 0.92, height: 0.92, x: -9 }));
  reads(map, columns, cells.length, say);
  return el("figure", { class: "level", "--hue": hueOf(at, levels) },
    el("figcaption", {}, el("strong", {}, `Level ${letter(at)}`), el("span", {}, words)),
    map,
    el("p", { class: "faint", "aria-live": "polite" }, readout));
}

/** A cursor over the cells, by the pointer and by the arrow keys. */
function reads(map, columns, cells, say) {
  const cursor = map.querySelector(".cursor");
  let at = -1;
  const to = (cell) => {
    if (cell < 0 || cell >= cells) return;
    at = cell;
    cursor.setAttribute("x", cell % columns);
    cursor.setAttribute("y", Math.floor(cell / columns));
    say(cell);
  };
  map.addEventListener("pointermove", (event) => {
    const box = map.getBoundingClientRect();
    const column = Math.min(columns - 1, Math.floor(((event.clientX - box.left) / box.width) * columns));
    to(Math.floor(((event.clientY - box.top) / box.height) * Math.ceil(cells / columns)) * columns + column);
  });
  map.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns }[event.key];
    if (!step) return;
    event.preventDefault();
    to(at < 0 ? 0 : at + step);
  });
}

function collisions({ collisions: told, items: total }) {
  const rows = GROUPS.map(([least, most]) => {
    const sizes = Object.entries(told.group_sizes).filter(([size]) => Number(size) >= least && Number(size) <= most);
    const groups = sizes.reduce((sum, [, one]) => sum + one, 0);
    const name = least === most ? `${least}` : most === Infinity ? `${least} and more` : `${least} to ${most}`;
    return { name, groups, items: sizes.reduce((sum, [size, one]) => sum + size * one, 0) };
  }).filter((row) => row.groups);
  const longest = Math.log10(1 + Math.max(1, ...rows.map((row) => row.groups)));
  return el("article", { class: "card" },
    el("h3", {}, "Collisions"),
    notice(...judged(told, total)),
    rows.length > 0 && el("table", { class: "groups" },
      el("caption", {}, "Groups of equal codes, by their size; bars are logarithmic"),
      el("thead", {}, el("tr", {}, ["Items of equal codes", "Groups", "Items"].map((name, at) => el("th", { scope: "col", class: at ? "num" : "" }, name)))),
      el("tbody", {}, rows.map((row) => el("tr", {},
        el("th", { scope: "row" }, row.name),
        el("td", { class: "left" }, el("span", { class: "track" }, el("span", { class: "fill", "--share": Math.log10(1 + row.groups) / longest })), el("span", { class: "num" }, count(row.groups))),
        el("td", { class: "num" }, count(row.items))))),
    ),
  );
}

function judged(told, total) {
  if (!total) return ["plain", "Nothing to count.", "There are no live items."];
  const trained = told.training?.rate;
  const rate = `${percent(told.rate, 1)} of the live items share all their codes with an earlier one${trained === null || trained === undefined ? "" : `; ${percent(trained, 1)} of the training items did`}. The largest group has ${items(told.largest_group)}.`;
  const rule = " It grows with the catalogue: beyond 10%, or where unlike items collide, train a tokenizer with more levels.";
  if (told.rate > 0.1) return ["bad", "Crowded.", rate + rule];
  if (told.rate > 0.05) return ["warn", "Filling up.", rate + rule];
  return ["good", "Room enough.", rate + " The suffix tells such items apart."];
}

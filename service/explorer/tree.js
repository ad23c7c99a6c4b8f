// The live tree as a sunburst, opened on demand, beside a list that tells the same.

import { prefix, scope } from "./api.js";
import { byId, chain, copy, count, el, items, letter, named, percent, problem, svg, whenSeen } from "./dom.js";

const RINGS = 3;
const INNER = 74;
const RING = 58;
const OPENED = [0, 48, 72]; // of each ring, the largest are opened without being asked for
const AT_ONCE = 6;
const NARROWEST = 0.0006; // of a turn: what is narrower is in the list alone
const PAGE = 12;

const known = new Map(); // a prefix -> its listing, {count, children}
let focus = "";
let chosen = null;
let arcs = [];
let generation = 0; // answers to what is looked at no longer are dropped
let drawing = false;

export function start() {
  whenSeen(byId("tree"), () => {
    from("");
    scope.addEventListener("changed", () => {
      known.clear();
      from("");
    });
    scope.addEventListener("assigned", () => {
      known.clear();
      from(focus);
    });
  });
}

const levelsOf = () => scope.manifest.codebook_sizes.length;
const codesOf = (text) => (text ? text.split("-").map(Number) : []);
const shown = (text) => (text ? chain(codesOf(text), null, { levels: levelsOf() }) : el("span", { class: "root" }, "all items"));

async function listing(text) {
  if (!known.has(text)) {
    const { count: live, children } = await prefix(text);
    known.set(text, { count: live, children });
  }
  return known.get(text);
}

/** Look at the tree from a prefix. */
async function from(text) {
  const now = ++generation;
  focus = text;
  chosen = null;
  crumbs();
  try {
    const root = await listing(text);
    if (now !== generation) return;
    draw();
    overview(root);
    let ring = [...root.children];
    for (let depth = 1; depth < RINGS && codesOf(text).length + depth < levelsOf(); depth += 1) {
      const largest = ring.filter((child) => child.count > 1).sort((one, other) => other.count - one.count).slice(0, OPENED[depth]);
      await each(largest, async (child) => {
        if (now === generation) await listing(child.prefix);
        if (now === generation) soon();
      });
      ring = largest.flatMap((child) => known.get(child.prefix)?.children ?? []);
    }
  } catch (error) {
    if (now === generation) byId("tree-figure").replaceChildren(problem(error));
  }
}

async function each(list, work) {
  const queue = [...list];
  await Promise.all(Array.from({ length: AT_ONCE }, async () => {
    while (queue.length) await work(queue.shift());
  }));
}

function soon() {
  if (drawing) return;
  drawing = true;
  requestAnimationFrame(() => {
    drawing = false;
    draw();
  });
}

function crumbs() {
  const codes = codesOf(focus);
  const ways = codes.map((_, depth) => codes.slice(0, depth + 1).join("-"));
  byId("tree-crumbs").replaceChildren(
    el("ol", {}, ["", ...ways].map((text) =>
      el("li", {}, text === focus
        ? el("span", { "aria-current": "true" }, shown(text))
        : el("button", { type: "button", class: "quiet small", onclick: () => from(text) }, shown(text))),
    )),
  );
}

/** The arcs to draw: of each opened prefix its children, each as wide as its share of the whole. */
function laidOut() {
  const found = [];
  const place = (text, depth, begin, end, hue) => {
    const node = known.get(text);
    if (!node || depth >= RINGS || !node.count) return;
    let at = begin;
    node.children.forEach((child, index) => {
      const to = at + ((end - begin) * child.count) / node.count;
      const own = depth ? hue : 150 + 200 * ((at + to) / 2);
      const arc = { ...child, depth, begin: at, end: to, hue: own, parent: text, place: index + 1, of: node.children.length };
      if (to - at >= NARROWEST) found.push(arc);
      place(child.prefix, depth + 1, at, to, own);
      at = to;
    });
  };
  place(focus, 0, 0, 1, 0);
  return found;
}

function draw() {
  const root = known.get(focus);
  const place = byId("tree-figure");
  if (!root) return; // it was forgotten since, to be read anew
  if (!root.count) {
    place.replaceChildren(el("p", { class: "empty" }, `The namespace ${scope.namespace} has no live items yet. Assign one above, or send it a catalogue.`));
    return;
  }
  const held = place.contains(document.activeElement) ? document.activeElement.dataset.prefix : null;
  arcs = laidOut();
  const stop = held ?? chosen ?? arcs[0]?.prefix;
  const edge = INNER + RINGS * RING + 6;
  const rings = Array.from({ length: Math.min(RINGS, levelsOf() - codesOf(focus).length) }, (_, depth) => depth);
  const paths = arcs.map((arc) =>
    svg("path", {
      d: sector(arc), class: arc.prefix === chosen ? "arc chosen" : "arc", "data-prefix": arc.prefix, "data-depth": arc.depth,
      "--hue": arc.hue.toFixed(0), role: "treeitem", tabindex: arc.prefix === stop ? 0 : -1,
      "aria-level": arc.depth + 1, "aria-posinset": arc.place, "aria-setsize": arc.of, "aria-selected": arc.prefix === chosen,
      "aria-label": `prefix ${arc.prefix}, ${items(arc.count)}, ${percent(arc.count / root.count, 1)}`,
    }, svg("title", {}, `${arc.prefix} · ${items(arc.count)} · ${percent(arc.count / root.count, 1)}`)),
  );
  const labels = arcs.filter((arc) => arc.end - arc.begin > 0.014 * (1 + (arc.depth === 0))).map(label);
  place.replaceChildren(
    svg("svg", { viewBox: `${-edge} ${-edge} ${2 * edge} ${2 * edge}`, class: "sunburst" },
      svg("g", { "aria-hidden": "true" }, rings.map((depth) =>
        svg("circle", { class: "ground", r: INNER + depth * RING + RING / 2 - 1, "stroke-width": RING - 2 }))),
      svg("g", { role: "tree", "aria-label": `Sunburst of ${items(root.count)}`, onclick: clicked, onkeydown: pressed }, paths),
      svg("g", { class: "labels", "aria-hidden": "true" }, labels,
        svg("text", { class: "centre", y: -2 }, count(root.count)),
        svg("text", { class: "centre under", y: 18 }, focus ? `under ${focus}` : root.count === 1 ? "live item" : "live items")),
    ),
  );
  if (held) place.querySelector(`[data-prefix="${held}"]`)?.focus({ preventScroll: true });
}

function point(turn, radius) {
  const angle = 2 * Math.PI * turn - Math.PI / 2;
  return `${(radius * Math.cos(angle)).toFixed(2)} ${(radius * Math.sin(angle)).toFixed(2)}`;
}

function sector({ begin, end, depth }) {
  const inside = INNER + depth * RING;
  const outside = inside + RING - 2;
  const last = Math.min(end, begin + 0.99995); // a whole turn would begin where it ends, and be nothing
  const large = last - begin > 0.5 ? 1 : 0;
  return `M${point(begin, inside)}L${point(begin, outside)}A${outside} ${outside} 0 ${large} 1 ${point(last, outside)}L${point(last, inside)}A${inside} ${inside} 0 ${large} 0 ${point(begin, inside)}Z`;
}

function label({ begin, end, depth, code, prefix: text }) {
  const middle = (begin + end) / 2;
  const turned = 360 * middle - 90 + (middle > 0.5 ? 180 : 0);
  const [x, y] = point(middle, INNER + depth * RING + RING / 2 - 1).split(" ");
  return svg("text", { class: text === chosen ? "chosen" : null, transform: `translate(${x} ${y}) rotate(${turned.toFixed(1)})` }, String(code));
}

function clicked(event) {
  const text = event.target.closest("[data-prefix]")?.dataset.prefix;
  if (text) choose(text);
}

function pressed(event) {
  const at = arcs.findIndex((arc) => arc.prefix === event.target.dataset.prefix);
  if (at < 0) return;
  const arc = arcs[at];
  const ring = arcs.filter((other) => other.depth === arc.depth);
  const beside = (step) => ring[(ring.indexOf(arc) + step + ring.length) % ring.length];
  const moves = {
    ArrowRight: () => beside(1),
    ArrowLeft: () => beside(-1),
    ArrowDown: () => arcs.find((other) => other.parent === arc.prefix),
    ArrowUp: () => arcs.find((other) => other.prefix === arc.parent),
    Home: () => ring[0],
    End: () => ring.at(-1),
  };
  if (event.key === "Enter" || event.key === " ") choose(arc.prefix);
  else if (event.key === "Escape" && focus) from(codesOf(focus).slice(0, -1).join("-"));
  else if (moves[event.key]) walk(moves[event.key]());
  else return;
  event.preventDefault();
}

function walk(arc) {
  if (!arc) return;
  const place = byId("tree-figure");
  place.querySelector('[tabindex="0"]')?.setAttribute("tabindex", "-1");
  const next = place.querySelector(`[data-prefix="${arc.prefix}"]`);
  next.setAttribute("tabindex", "0");
  next.focus();
}

/** List the items of a prefix and copy it; where it is chosen already, look from there. */
async function choose(text) {
  const inner = codesOf(text).length < levelsOf();
  if (text === chosen && inner) return from(text);
  chosen = text;
  draw();
  copy(text, `the prefix ${text}`);
  const now = generation;
  const place = byId("tree-detail");
  try {
    const page = await prefix(text, { limit: PAGE });
    if (now !== generation || chosen !== text) return;
    known.set(text, { count: page.count, children: page.children });
    soon();
    const list = el("ul", { class: "items" }, page.items.map(line));
    place.replaceChildren(
      el("h3", {}, shown(text)),
      el("p", { class: "row tight" },
        el("span", { class: "faint grow" }, items(page.count)),
        inner && el("button", { type: "button", class: "quiet small", onclick: () => from(text) }, "Look from here"),
        el("button", { type: "button", class: "quiet small", onclick: () => copy(text, `the prefix ${text}`) }, "Copy prefix")),
      list,
      el("p", { class: "row tight" },
        more(text, list, page.next_cursor),
        el("button", { type: "button", class: "quiet small", onclick: () => back() }, "Back to the largest")),
    );
  } catch (error) {
    if (now === generation) place.replaceChildren(problem(error));
  }
}

function back() {
  chosen = null;
  draw();
  overview(known.get(focus));
}

const line = (item) => el("li", {}, named(item), chain(item.codes, item.suffix, { levels: levelsOf() }));

/** A button that lists the next page, where there is one. */
function more(text, list, cursor) {
  if (!cursor) return "";
  const button = el("button", { type: "button", class: "quiet small", onclick: async () => {
    button.disabled = true;
    try {
      const page = await prefix(text, { limit: PAGE, cursor });
      list.append(...page.items.map(line));
      button.replaceWith(more(text, list, page.next_cursor));
    } catch (error) {
      button.replaceWith(problem(error));
    }
  } }, "More");
  return button;
}

/** What stands beside the sunburst while nothing is chosen: its largest prefixes. */
function overview(root) {
  const largest = [...root.children].sort((one, other) => other.count - one.count).slice(0, 12);
  const level = codesOf(focus).length;
  byId("tree-detail").replaceChildren(
    el("h3", {}, root.children.length === 1 ? `The one code at level ${letter(level)}` : `Largest of ${count(root.children.length)} codes at level ${letter(level)}`),
    root.count
      ? el("ol", { class: "bars" }, largest.map((child) =>
        el("li", {},
          el("button", { type: "button", class: "plain", onclick: () => choose(child.prefix), "aria-label": `prefix ${child.prefix}, ${items(child.count)}` },
            shown(child.prefix),
            el("span", { class: "track" }, el("span", { class: "fill", "--share": child.count / largest[0].count })),
            el("span", { class: "num" }, count(child.count))))))
      : el("p", { class: "empty" }, "Nothing is under it."),
  );
}

// A text's path down the levels, the ID it would get, and what stands near it.

import { assign, explain, Problem, scope } from "./api.js";
import { byId, chain, copy, count, el, figure, hueOf, items, letter, named, notice, percent, problem } from "./dom.js";
import { errorScale } from "./scale.js";

const CLOSE = 0.005; // of the latent's norm: so little would change the code

let asked = new AbortController();

export function start() {
  byId("try-form").addEventListener("submit", (event) => {
    event.preventDefault();
    run(event.submitter?.value === "assign");
  });
  scope.addEventListener("changed", () => empty());
  empty();
}

function empty() {
  asked.abort();
  byId("try-said").textContent = "";
  byId("try-result").replaceChildren(
    el("p", { class: "empty" }, "Its path will stand here: a codeword a level, how sure each choice was, and what is left to say."),
  );
}

async function run(assigning) {
  const text = byId("try-text").value.trim();
  const itemId = byId("try-item").value.trim();
  if (!text) return byId("try-text").focus();
  if (assigning && !itemId) {
    byId("try-said").textContent = "An item needs an item id to be assigned.";
    return byId("try-item").focus();
  }
  asked.abort();
  asked = new AbortController();
  const place = byId("try-result");
  place.setAttribute("aria-busy", "true");
  byId("try-said").textContent = assigning ? "Assigning …" : "Asking …";
  let said = null;
  try {
    if (assigning) said = await assigned({ item_id: itemId, text });
    const answer = await explain(itemId ? { item_id: itemId, text } : { text }, asked.signal);
    place.replaceChildren(...shown(answer));
    byId("try-said").textContent = said ?? summary(answer);
  } catch (error) {
    if (error.name === "AbortError") return;
    place.replaceChildren(problem(error));
    byId("try-said").textContent = said ?? ""; // it is assigned, though its path cannot be shown
  } finally {
    place.setAttribute("aria-busy", "false");
  }
}

async function assigned(item) {
  const [entry] = (await assign(item)).items;
  if (entry.error) throw new Problem({ ...entry.error, title: `${entry.error.title}.` });
  scope.dispatchEvent(new Event("assigned"));
  return entry.created ? `Assigned ${entry.semantic_id}.` : `It holds ${entry.semantic_id} already.`;
}

const summary = (answer) =>
  answer.semantic_id ? `${answer.held ? "It holds" : "It would get"} ${answer.semantic_id}.` : "Its codes have no suffix left.";

function shown(answer) {
  return [
    head(answer),
    path(answer),
    ...novelty(answer),
    el("h3", {}, "Nearest in the catalogue"),
    answer.prefix_is_coarse_to_fine ? null : notice("plain", "Prefixes of this tokenizer are no coarser descriptions:", "items that share one are alike in some parts only."),
    nearest(answer),
  ].filter(Boolean);
}

function head(answer) {
  const levels = answer.codes.length;
  const label = answer.retired ? "Held by this item, which was retired" : answer.held ? "This item holds" : "It would get";
  const numbers = answer.semantic_id?.split("-").map(Number);
  return el(
    "div",
    { class: "given" },
    el("p", { class: "label" }, label),
    numbers ? el("p", { class: "big" }, chain(numbers.slice(0, -1), numbers.at(-1), { levels })) : notice("bad", "These codes have no collision suffix left."),
    el(
      "p",
      { class: "under" },
      answer.tokens && el("code", { class: "tokens" }, answer.tokens.join("")),
      answer.semantic_id && el("button", { type: "button", class: "quiet small", onclick: () => copy(answer.semantic_id, answer.semantic_id) }, "Copy"),
    ),
    answer.content_changed && notice("warn", "This text has other codes:", answer.codes.join("-"), ". The item keeps the ID that it holds."),
    answer.group_size > 0 && !answer.held && el("p", { class: "faint" }, `${items(answer.group_size)} got these codes before it; the suffix tells them apart.`),
  );
}

function path(answer) {
  const levels = answer.codes.length;
  const rows = answer.levels.map((level, at) => {
    const left = level.residual_norm / answer.latent_norm;
    const close = level.margin !== null && level.margin < CLOSE * answer.latent_norm;
    return el(
      "tr",
      { "--hue": hueOf(at, levels) },
      el("th", { scope: "row" }, el("span", { class: "link", "data-level": letter(at) }, String(level.code))),
      el("td", { class: "left" }, el("span", { class: "track" }, el("span", { class: "fill", "--share": Math.min(1, left) })), el("span", { class: "num" }, percent(left))),
      el("td", { class: "num" }, figure(level.margin, 2), close && el("span", { class: "tag" }, "close call")),
      el("td", { class: "num" }, count(level.count)),
    );
  });
  const column = (title, hint, kind) => el("th", { scope: "col", class: kind, title: hint }, title);
  return el(
    "table",
    { class: "path" },
    el("caption", {}, "Level by level"),
    el("thead", {}, el("tr", {},
      column("Code", "The codeword chosen"),
      column("Residual left", "Norm of what is left, as a share of the latent's"),
      column("Margin", "How far, in units of the latent, from another codeword's being chosen", "num"),
      column("Live items", "Under the prefix up to this level", "num"),
    )),
    el("tbody", {}, rows),
  );
}

function novelty(answer) {
  const title = el("h3", {}, "How far from the training");
  if (!answer.training) return [title, el("p", { class: "faint" }, `Quantization error ${figure(answer.quantization_error)}. The tokenizer's manifest does not tell those of its training items.`)];
  const { quantization_error: training, share_below: below } = answer.training;
  const more = below >= 0.99 ? "more than 99%" : below <= 0.01 ? "less than 1%" : percent(below);
  const verdict =
    below >= 0.99 ? "It is unlike most of what the tokenizer was trained on, so its codes describe it less well."
    : below >= 0.95 ? "It is further from what the tokenizer was trained on than most."
    : "It is like what the tokenizer was trained on.";
  return [
    title,
    errorScale(training, [{ value: answer.quantization_error, label: `this text ${figure(answer.quantization_error)}` }]),
    el("p", {}, `Its quantization error is larger than that of ${more} of the training items. ${verdict}`),
  ];
}

function nearest(answer) {
  if (!answer.nearest.length) return el("p", { class: "empty" }, "No live item shares its first code.");
  const levels = answer.codes.length;
  return el(
    "ul",
    { class: "items" },
    answer.nearest.map((item) =>
      el(
        "li",
        {},
        named(item),
        chain(item.codes, item.suffix, { levels, shared: item.shared_levels }),
        el("span", { class: "faint shares" }, item.shared_levels === levels ? "all codes" : `${item.shared_levels} of ${levels}`),
      ),
    ),
  );
}

// From a Semantic ID to its item, and from an item id to its Semantic ID.

import { assignment, lookUp, scope } from "./api.js";
import { byId, chain, el, notice, problem } from "./dom.js";

const SEMANTIC_ID = /^(\d+(-\d+)+|(<[a-z]_\d+>)+)$/;
let asked = 0; // answers to what is asked no longer are dropped
const time = new Intl.DateTimeFormat("en-GB", { dateStyle: "medium", timeStyle: "medium" });

export function start() {
  byId("lookup-form").addEventListener("submit", (event) => {
    event.preventDefault();
    run(byId("lookup-key").value.trim());
  });
  scope.addEventListener("changed", () => {
    asked += 1;
    byId("lookup-result").replaceChildren();
  });
}

async function run(key) {
  const place = byId("lookup-result");
  if (!key) return;
  const now = ++asked;
  try {
    const answer = await found(key);
    if (now === asked) place.replaceChildren(shown(answer));
  } catch (error) {
    if (now === asked) place.replaceChildren(error.members?.retired_at || error.retired_at ? retired(error) : problem(error));
  }
}

/** What looks like a Semantic ID may still be an item id, so the other reading is tried where the first finds nothing. */
async function found(key) {
  if (!SEMANTIC_ID.test(key)) return assignment(key);
  const [entry] = (await lookUp(key)).items;
  if (!entry.error) return entry;
  const other = await assignment(key).catch(() => null);
  if (other) return other;
  throw { ...entry.error, title: `${entry.error.title}.` };
}

const retired = (error) => notice("warn", "The item was retired.", error.detail, " No listing has it, and nobody else will get its ID.");

/** What the item holds under another tokenizer, which may have other levels. */
function counterpart([tokenizer, semanticId]) {
  const numbers = semanticId?.split("-").map(Number) ?? [];
  const suffix = numbers.pop();
  return el(
    "li",
    { "data-tokenizer": tokenizer },
    semanticId ? chain(numbers, suffix, { levels: numbers.length }) : el("span", { class: "faint" }, "holds no Semantic ID"),
    el("span", { class: "id" }, tokenizer),
  );
}

function shown(answer) {
  const row = (label, ...value) => [el("dt", {}, label), el("dd", {}, ...value)];
  const others = Object.entries(answer.counterparts ?? {});
  return el(
    "div",
    { class: "card" },
    el("dl", { class: "facts" },
      answer.display && row("Title", el("span", { class: "title" }, answer.display)),
      row("Item id", el("span", { class: "id" }, answer.item_id)),
      row("Semantic ID", chain(answer.codes, answer.suffix, { levels: answer.codes.length })),
      row("Tokens", el("code", { class: "tokens" }, answer.tokens.join(""))),
      others.length > 0 && row(others.length === 1 ? "Other tokenizer" : "Other tokenizers", el("ul", { class: "counterparts" }, others.map(counterpart))),
      row("Assigned", el("time", { datetime: answer.assigned_at }, time.format(new Date(answer.assigned_at)))),
    ),
    answer.content_changed && notice("warn", "Its content has changed", "since: it would get other codes now."),
    answer.replaced_by && notice("warn", "Replaced.", `The item holds ${answer.replaced_by} now.`),
  );
}

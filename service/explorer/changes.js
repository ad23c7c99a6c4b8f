// The change feed, as a decoder follows it: asked with a cursor, waited for by the service.

import { changes, Problem, scope } from "./api.js";
import { byId, chain, count, el, named, problem, whenSeen } from "./dom.js";

const SHOWN = 60;
const BACK = 25; // so many of the past to begin with
const WAIT_S = 20;
const PAUSE_MS = 1000;
const RETRY_MS = 5000;

let paused = false;
let following = new AbortController();

export function start() {
  byId("changes-pause").addEventListener("click", () => {
    paused = !paused;
    byId("changes-pause").textContent = paused ? "Go on" : "Pause";
    byId("changes-pause").setAttribute("aria-pressed", String(paused));
  });
  whenSeen(byId("changes"), () => {
    follow();
    scope.addEventListener("changed", follow);
  });
}

async function follow() {
  following.abort();
  following = new AbortController();
  const { signal } = following;
  byId("changes-list").replaceChildren(nothing());
  let cursor = null;
  let back = BACK;
  while (!signal.aborted) {
    try {
      if (paused || document.hidden) await pause(PAUSE_MS, signal);
      else cursor = cursor === null ? await beginning(back, signal) : await next(cursor, signal);
    } catch (error) {
      if (signal.aborted) return;
      const gone = error.status === 410; // so far back is not kept, or the record has begun another epoch
      if (gone) [cursor, back] = [null, 0];
      else tell(error);
      await pause(gone ? PAUSE_MS : RETRY_MS, signal).catch(() => {});
    }
  }
}

/** So many changes before the record's revision. */
async function beginning(back, signal) {
  const { revision, epoch } = await changes(0, { limit: 1, signal }).catch((error) => {
    if (error instanceof Problem && error.status === 410) return { revision: error.members.revision, epoch: null };
    throw error;
  });
  return { after: Math.max(0, revision - back), epoch };
}

async function next({ after, epoch }, signal) {
  const answer = await changes(after, { epoch: epoch || null, wait: WAIT_S, signal });
  while (paused) await pause(PAUSE_MS, signal); // since it was asked
  signal.throwIfAborted(); // answered as another namespace was chosen
  byId("changes-hint").textContent = `Every assignment, return, retirement and replacement, as a decoder follows them. The record is at revision ${count(answer.revision)}.`;
  recovered();
  if (answer.changes.length) add(answer.changes);
  else await pause(PAUSE_MS, signal); // the service may not wait as long as it was asked to
  return { after: answer.next_after, epoch: answer.epoch || epoch };
}

function add(found) {
  const list = byId("changes-list");
  list.querySelectorAll(".empty").forEach((line) => line.remove());
  list.prepend(...found.reverse().map(line));
  while (list.children.length > SHOWN) list.lastElementChild.remove();
}

/** What failed before does not stand there any more once the service answers. */
function recovered() {
  const list = byId("changes-list");
  list.querySelectorAll(".failed").forEach((line) => line.remove());
  if (!list.children.length) list.append(nothing());
}

const nothing = () => el("li", { class: "empty" }, "Nothing has changed yet.");

function tell(error) {
  const list = byId("changes-list");
  list.querySelectorAll(".empty, .failed").forEach((line) => line.remove());
  list.prepend(el("li", { class: "failed" }, problem(error)));
}

function line(change) {
  const numbers = change.semantic_id.split("-").map(Number);
  return el("li", {},
    el("span", { class: "revision num" }, count(change.revision)),
    el("span", { class: `badge ${change.change}` }, change.change),
    named(change),
    chain(numbers.slice(0, -1), numbers.at(-1), { levels: numbers.length - 1 }),
  );
}

const pause = (ms, signal) => new Promise((resolve, reject) => {
  const timer = setTimeout(resolve, ms);
  signal.addEventListener("abort", () => {
    clearTimeout(timer);
    reject(new DOMException("Stopped", "AbortError"));
  }, { once: true });
});

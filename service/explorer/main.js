// Puts the page together: what is loaded, what is looked at, and the sections that show it.

import { scope, tokenizers, useKey } from "./api.js";
import * as changes from "./changes.js";
import { byId, count, el, notice, problem } from "./dom.js";
import * as health from "./health.js";
import * as lookup from "./lookup.js";
import * as tree from "./tree.js";
import * as trial from "./try.js";

const SENDABLE = /^[!-~]+$/;
const loaded = new Map();
const sections = () => document.querySelectorAll("main > section:not(.intro)");

async function begin() {
  try {
    const answer = await tokenizers();
    for (const manifest of answer.tokenizers) loaded.set(manifest.tokenizer, manifest);
  } catch (error) {
    byId("about").replaceChildren(problem(error));
    byId("scope").hidden = true;
    for (const section of sections()) section.inert = true;
    return;
  }
  const asked = new URLSearchParams(location.search);
  byId("tokenizer").replaceChildren(...[...loaded.keys()].map((name) => el("option", { value: name }, name)));
  if (loaded.has(asked.get("tokenizer"))) byId("tokenizer").value = asked.get("tokenizer");
  if (asked.get("namespace")) byId("namespace").value = asked.get("namespace");
  if (!byId("namespace").checkValidity()) byId("namespace").value = "default";
  const elsewhere = elsewhereThan(asked);
  for (const section of sections()) section.inert = false;
  look();
  byId("about").append(...elsewhere);
  for (const section of [trial, tree, health, lookup, changes]) section.start();
}

/** In words, where the address names what the page cannot look at. */
const elsewhereThan = (asked) =>
  [["tokenizer", "is not loaded"], ["namespace", "is no name of a namespace"]]
    .filter(([name]) => asked.get(name) && asked.get(name) !== byId(name).value)
    .map(([name, why]) => ` The ${name} of the address, ${asked.get(name)}, ${why}: this is ${byId(name).value}.`);

/** Look at the tokenizer and the namespace that are chosen. */
function look() {
  scope.tokenizer = byId("tokenizer").value;
  scope.namespace = byId("namespace").value;
  scope.manifest = loaded.get(scope.tokenizer);
  byId("about").textContent = about(scope.manifest);
  const address = new URL(location);
  const usual = scope.tokenizer === [...loaded.keys()][0] && scope.namespace === "default";
  address.search = usual ? "" : new URLSearchParams({ tokenizer: scope.tokenizer, namespace: scope.namespace });
  history.replaceState(null, "", address);
  scope.dispatchEvent(new Event("changed"));
}

function about(manifest) {
  const sizes = manifest.codebook_sizes;
  const alike = sizes.every((size) => size === sizes[0]);
  const shape = `${sizes.length} ${sizes.length === 1 ? "level" : "levels"} of ${alike ? sizes[0] : sizes.join(", ")} codewords`;
  const items = manifest.report?.items ? `, trained on ${count(manifest.report.items)} items` : "";
  return `${manifest.name}: ${manifest.family}, ${shape} and a collision suffix${items}.`;
}

byId("scope").addEventListener("submit", (event) => {
  event.preventDefault();
  look();
});
byId("tokenizer").addEventListener("change", look);
byId("key").addEventListener("submit", (event) => {
  event.preventDefault();
  const key = byId("key-value").value.trim();
  if (!SENDABLE.test(key)) { // no request could carry it
    byId("about").replaceChildren(notice("bad", "That is no key.", "A key has letters of a to z, digits, - and _ only."));
    return;
  }
  useKey(key);
  location.reload();
});
scope.addEventListener("key-wanted", () => {
  byId("key").hidden = false;
});

begin();

// Elements are built, never parsed: whatever an item id says, it is text.

const SVG = "http://www.w3.org/2000/svg";
const number = new Intl.NumberFormat("en-GB");

function build(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name.startsWith("--")) node.style.setProperty(name, value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

/** An HTML element; strings among its children become text. */
export const el = (tag, attributes = {}, ...children) => build(document.createElement(tag), attributes, children);

/** The same of SVG. */
export const svg = (tag, attributes = {}, ...children) => build(document.createElementNS(SVG, tag), attributes, children);

export const byId = (id) => document.getElementById(id);

export const count = (value) => number.format(value);
export const items = (value) => `${number.format(value)} ${value === 1 ? "item" : "items"}`;

/** A figure with so many significant digits. */
export function figure(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  if (value !== 0 && Math.abs(value) < 1e-4) return value.toExponential(1);
  return Number(value.toPrecision(digits)).toString();
}

export const percent = (share, digits = 0) =>
  share > 0 && share < 0.5 / 10 ** (2 + digits) ? `<${10 ** -digits}%` : `${(100 * share).toFixed(digits)}%`;

/** The letter of a level, from 0, as tokens have it. */
export const letter = (level) => String.fromCharCode(97 + level);

/** The hue of a level: coarse ones are blue, fine ones orange. */
export const hueOf = (level, levels) => Math.round(235 + (155 * level) / Math.max(1, levels)) % 360;

/**
 * A Semantic ID or a prefix as a chain of its codes.
 * @param {number[]} codes of the first levels
 * @param {number|null} suffix where it is a whole ID
 * @param {{levels: number, shared?: number}} options how many levels the tokenizer has; how many codes to bring out
 */
export function chain(codes, suffix, { levels, shared = codes.length }) {
  const links = codes.map((code, level) =>
    el("span", { class: level < shared ? "link" : "link dim", "--hue": hueOf(level, levels), "data-level": letter(level) }, String(code)),
  );
  if (suffix !== null && suffix !== undefined) links.push(el("span", { class: "link suffix", "data-level": letter(levels) }, String(suffix)));
  const written = [...codes, ...(suffix === null || suffix === undefined ? [] : [suffix])].join("-");
  return el("span", { class: "chain", role: "img", "aria-label": written || "root" }, links);
}

/** An item: its title, where one is kept, and its id. */
export function named(item) {
  const id = el("span", { class: "id" }, item.item_id);
  return item.display ? el("span", { class: "named" }, el("span", { class: "title" }, item.display), id) : id;
}

/** What went wrong, in words, in its place. */
export const notice = (kind, title, ...detail) => el("p", { class: `notice ${kind}` }, el("strong", {}, title), " ", ...detail);

export const problem = (error) => notice("bad", error.title ?? "The page failed.", error.detail ?? String(error));

let fading;
/** Say it for a moment, aloud too. */
export function toast(text) {
  const place = byId("toast");
  place.textContent = text;
  place.classList.add("shown");
  clearTimeout(fading);
  fading = setTimeout(() => place.classList.remove("shown"), 2600);
}

/** Copy a text and say so; by the old way where the page was not served over TLS or from this machine. */
export async function copy(text, what) {
  let done = false;
  try {
    await navigator.clipboard.writeText(text);
    done = true;
  } catch {
    const before = document.activeElement;
    const field = el("textarea", { class: "unseen", readonly: true, "aria-hidden": "true", tabindex: "-1" });
    field.value = text;
    document.body.append(field);
    field.select();
    done = document.execCommand("copy");
    field.remove();
    before?.focus?.({ preventScroll: true });
  }
  toast(done ? `Copied ${what}` : `The browser does not let the page copy: ${text}`);
}

/** Call once, when the element is first about to be seen. */
export function whenSeen(element, work) {
  const observer = new IntersectionObserver((entries) => {
    if (!entries.some((entry) => entry.isIntersecting)) return;
    observer.disconnect();
    work();
  }, { rootMargin: "120px" });
  observer.observe(element);
}

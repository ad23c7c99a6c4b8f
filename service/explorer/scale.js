// Where an error lies among those of the training items: a box of their quantiles, and marks on it.

import { el, figure } from "./dom.js";

/**
 * @param {Object<string, number>} training mean and quantiles q01 to q99
 * @param {{value: number, label: string}[]} marks
 */
export function errorScale(training, marks) {
  const end = Math.max(training.q99 * 1.15, ...marks.map((mark) => mark.value * 1.08));
  const band = (from, to, kind) => el("span", { class: `band ${kind}`, "--from": training[from] / end, "--to": training[to] / end });
  const side = (value) => (value / end > 0.75 ? "before" : value / end < 0.25 ? "after" : "around");
  const mark = ({ value, label }, kind) =>
    el("span", { class: `mark ${kind}`, "--from": value / end }, el("span", { class: `tell ${side(value)}` }, label));
  return el(
    "div",
    { class: "scale" },
    el("div", { class: "axis" },
      band("q01", "q99", "outer"), band("q05", "q95", "most"), band("q25", "q75", "half"),
      mark({ value: training.q50, label: `training median ${figure(training.q50)}` }, "median"),
      marks.map((one) => mark(one, "here"))),
    el("p", { class: "key" }, ["half", "most", "outer"].map((kind, at) =>
      el("span", {}, el("span", { class: `swatch ${kind}`, "aria-hidden": "true" }), `${[50, 90, 98][at]}% of the training items`))),
  );
}

// Where an error lies among those of the training items: a box of their quantiles, and marks on it.

import { el, figure, svg } from "./dom.js";

const WIDTH = 600;
const HEIGHT = 58;

/**
 * @param {Object<string, number>} training mean and quantiles q01 to q99
 * @param {{value: number, label: string}[]} marks
 */
export function errorScale(training, marks) {
  const end = Math.max(training.q99 * 1.15, ...marks.map((mark) => mark.value * 1.06));
  const x = (value) => (WIDTH * value) / end;
  const box = (from, to, kind) => svg("rect", { class: kind, x: x(from), y: 24, width: x(to) - x(from), height: 16, rx: 3 });
  const text = (value, label, y, anchor) => svg("text", { x: x(value), y, "text-anchor": anchor }, label);
  const anchorOf = (value) => (value / end > 0.85 ? "end" : value / end < 0.15 ? "start" : "middle");
  const drawing = svg(
    "svg",
    { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "scale", "aria-hidden": "true", focusable: "false" },
    svg("line", { class: "axis", x1: 0, x2: WIDTH, y1: 32, y2: 32 }),
    box(training.q01, training.q99, "outer"),
    box(training.q05, training.q95, "most"),
    box(training.q25, training.q75, "half"),
    svg("line", { class: "median", x1: x(training.q50), x2: x(training.q50), y1: 22, y2: 42 }),
    text(training.q50, `training median ${figure(training.q50)}`, 55, anchorOf(training.q50)),
    marks.map(({ value, label }) => [
      svg("path", { class: "mark", d: `M${x(value)} 22l-5 -8h10z` }),
      svg("line", { class: "mark", x1: x(value), x2: x(value), y1: 20, y2: 42 }),
      svg("text", { class: "mark", x: x(value), y: 10, "text-anchor": anchorOf(value) }, label),
    ]),
  );
  return el("figure", { class: "scale" }, drawing);
}

"""Ratios as bars on a logarithmic scale, an SVG that can be read on a light page and on a dark one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, LABELS, RIGHT = 920, 430, 70
ROW, HEADING, TOP, BOTTOM = 20, 30, 40, 30

STYLE = """
text { font: 12px system-ui, sans-serif; fill: #24292f; }
.heading { font-weight: 600; }
.faint { fill: #57606a; }
.grid { stroke: #8c959f; stroke-opacity: .35; }
.one { stroke: #57606a; }
.ahead { fill: #2f81f7; }
.behind { fill: #d4823a; }
.spread { stroke: #24292f; stroke-width: 1.5; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3; }
  .faint { fill: #9da7b3; }
  .one, .spread { stroke: #e6edf3; }
}
"""


class Bar(NamedTuple):
    """One of our paths over one peer.

    Attributes:
        group: What is compared.
        path: Ours.
        peer: The other.
        median: How many times the peer's figure ours is, the median over the rounds.
        low: The smallest over the rounds.
        high: The largest.
    """

    group: str
    path: str
    peer: str
    median: float
    low: float
    high: float


def plot(bars: Sequence[Bar]) -> str:
    """The SVG document: a group for each comparison, a bar from 1 to each ratio, its spread as a line."""
    lowest = min([0.1, *(bar.low for bar in bars)])
    highest = max([10.0, *(bar.high for bar in bars)])
    first, last = math.floor(math.log10(lowest)), math.ceil(math.log10(highest))

    def x(ratio: float) -> float:
        return LABELS + (math.log10(ratio) - first) / (last - first) * (WIDTH - LABELS - RIGHT)

    drawn, y = [], TOP
    for number, bar in enumerate(bars):
        if number == 0 or bar.group != bars[number - 1].group:
            y += HEADING
            drawn.append(f'<text class="heading" x="8" y="{y - 8}">{escape(bar.group)}</text>')
        drawn.append(_row(bar, y, x(1), x(bar.median), (x(bar.low), x(bar.high))))
        y += ROW
    grid = [_tick(10.0**power, x(10.0**power), y) for power in range(first, last + 1)]
    title = "Ours over each peer: times as fast (to the right of 1 ours is ahead), medians and spread over the rounds"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y + BOTTOM}" role="img">',
            f"<title>{title}</title>",
            f"<style>{STYLE}</style>",
            f'<text class="faint" x="8" y="20">{title}</text>',
            *grid,
            *drawn,
            "</svg>\n",
        ]
    )


def _tick(ratio: float, x: float, bottom: float) -> str:
    kind = "one" if ratio == 1 else "grid"
    return (
        f'<line class="{kind}" x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{bottom}"/>'
        f'<text class="faint" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{ratio:g}</text>'
    )


def _row(bar: Bar, y: float, one: float, median: float, ends: tuple[float, float]) -> str:
    kind, middle = ("ahead" if bar.median >= 1 else "behind"), y + ROW / 2
    label = f"{bar.path} / {bar.peer}"
    return (
        f'<text x="{LABELS - 10}" y="{middle + 4}" text-anchor="end">{escape(label)}</text>'
        f'<rect class="{kind}" x="{min(one, median):.1f}" y="{y + 4}" width="{abs(median - one):.1f}" '
        f'height="{ROW - 8}"/>'
        f'<line class="spread" x1="{ends[0]:.1f}" y1="{middle}" x2="{ends[1]:.1f}" y2="{middle}"/>'
        f'<text class="faint" x="{max(one, ends[1]) + 6:.1f}" y="{middle + 4}">{bar.median:.3g}</text>'
    )

"""Plots as inline SVG that follows the page's colours. Drawn with matplotlib, of the extra `semid[train]`.

A plot is drawn in placeholder colours, which become the page's: text and lines `currentColor`, series `var(--s0)`, ...
Text stays text, so it can be read, searched and scaled.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from html import escape
from io import StringIO
from typing import Any

from models.evaluation.page import SERIES

WITHOUT_PLOTS = "There are no plots: matplotlib is not installed. pip install 'semid[train]' brings it."

# Inches; the page scales it to its column.
SIZE = (4.6, 3.1)

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

INK = "#000001"
LINE = "#000002"


def available() -> bool:
    """Whether plots can be drawn; a matplotlib that is there and does not load cannot."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def colour(number: int) -> str:
    """The placeholder colour of a series."""
    return f"#0001{number % len(SERIES):02x}"


def marker(number: int) -> str:
    """The marker of a series; where colours come again, another one goes with each."""
    return MARKERS[(number + number // len(SERIES)) % len(MARKERS)]


def draw(name: str, alt: str, paint: Callable[[Any], None], *, size: tuple[float, float] = SIZE) -> str:
    """An SVG element.

    Args:
        name: Of the plot, its own on the page: ids inside the drawing begin from it.
        alt: What a reader who does not see it is told.
        paint: Draws into the axes.
        size: In inches.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_settings(name)):
        figure = Figure(figsize=size, layout="constrained")
        paint(figure.add_subplot())
        return _for_page(_svg(figure), alt)


def draw_alone(name: str, paints: Sequence[Callable[[Any], None]]) -> str:
    """Several plots in one SVG file, in colours of its own on white.

    Args:
        name: Of the drawing.
        paints: Each draws into axes of its own.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_settings(name)):
        columns = min(3, len(paints))
        rows = -(-len(paints) // max(1, columns))
        figure = Figure(figsize=(SIZE[0] * columns, SIZE[1] * rows), layout="constrained")
        for number, paint in enumerate(paints, 1):
            paint(figure.add_subplot(rows, columns, number))
        svg = _svg(figure, transparent=False)
    svg = re.sub(r"#0001([0-9a-f]{2})\b", lambda found: SERIES[int(found[1], 16)][0], svg)
    return svg.replace(INK, "#1b1f24").replace(LINE, "#d9d5cd")


def _svg(figure: Any, *, transparent: bool = True) -> str:
    out = StringIO()
    figure.savefig(out, format="svg", transparent=transparent, metadata={"Date": None, "Creator": None})
    return out.getvalue()


def _settings(name: str) -> Any:
    """Of matplotlib: little ink, the placeholder colours, text as text, ids that begin from the name."""
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.family": "sans-serif",
        "font.size": 9.5,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": LINE,
        "xtick.color": INK,
        "ytick.color": INK,
        "grid.color": LINE,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.linewidth": 0.6,
        "axes.titlesize": 10.5,
        "axes.titleweight": "bold",
        "lines.markersize": 5,
        "lines.linewidth": 1.6,
        "path.simplify": False,
    }


def swatch(number: int) -> str:
    """A series' line and marker for a legend."""
    shapes = {
        "o": '<circle cx="16" cy="8" r="4.5"/>',
        "s": '<path d="M11.5 3.5h9v9h-9z"/>',
        "^": '<path d="M16 3l5 9.500h-10z"/>',
        "D": '<path d="M16 2.500l5.500 5.500-5.500 5.500-5.500-5.500z"/>',
        "v": '<path d="M16 13l5-9.500h-10z"/>',
        "P": '<path d="M14 3h4v3h3v4h-3v3h-4v-3h-3v-4h3z"/>',
        "X": '<path d="M12 3l4 3 4-3 1 1-3 4 3 4-1 1-4-3-4 3-1-1 3-4-3-4z"/>',
        "*": '<path d="M16 2l1.600 4.300 4.600.200-3.600 2.800 1.200 4.400-3.800-2.500-3.800 2.500 1.200-4.400z"/>',
    }
    shape = shapes[marker(number)]
    variable = f"var(--s{number % len(SERIES)})"
    return (
        f'<svg viewBox="0 0 32 16" aria-hidden="true" fill="{variable}" stroke="{variable}">'
        f'<path d="M0 8h32" stroke-width="2"/>{shape}</svg>'
    )


def legend(names: Sequence[str], more: str = "") -> str:
    """Which series is which, the nameless ones left out; `more` says what line styles mean."""
    entries = "".join(f"<li>{swatch(number)}{escape(name)}</li>" for number, name in enumerate(names) if name)
    return f'<ul class="legend">{entries}</ul>' + (f'<p class="faint">{escape(more)}</p>' if more else "")


def _for_page(svg: str, alt: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) version="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"#0001([0-9a-f]{2})\b", lambda found: f"var(--s{int(found[1], 16)})", svg)
    svg = svg.replace(INK, "currentColor").replace(LINE, "var(--line)")
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(alt)}"', 1).strip()

"""A self-contained HTML page: no script, nothing fetched, light and dark, for phones too. It escapes texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

# Of series in plots and legends, light and dark; chosen to be told apart by most eyes, and each has its own marker.
SERIES = (
    ("#0b62a4", "#6cb6f0"),
    ("#c4500c", "#f2a267"),
    ("#1a7f4b", "#6fd39c"),
    ("#8a3ea8", "#d59bec"),
    ("#a3123f", "#f58aa8"),
    ("#6b5900", "#d9c65a"),
    ("#00707a", "#5fd0d6"),
    ("#5b5f66", "#b4bac2"),
)

# Where there is no figure.
NO_FIGURE = "\N{EN DASH}"

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fbfaf8; --card: #ffffff; --line: #d9d5cd; --faint: #596068;
  --accent: #0b5a7d; --best: #e3f1e4; LIGHT }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --paper: #15181c; --card: #1b1f24; --line: #3a4149;
  --faint: #a2abb5; --accent: #6cc3e8; --best: #1f3a2a; DARK } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 78rem; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { margin: 0 0 .3rem; font-size: 1.6rem; } h2 { margin: 2.6rem 0 .4rem; font-size: 1.25rem; }
h3 { margin: 1.4rem 0 .3rem; font-size: 1rem; }
p { max-width: 46rem; margin: .4rem 0; } .faint { color: var(--faint); } a { color: var(--accent); }
.scroll { overflow-x: auto; margin: .7rem 0; border: 1px solid var(--line); border-radius: .4rem;
  background: var(--card); }
.scroll:focus-visible { outline: 3px solid var(--accent); }
table { border-collapse: separate; border-spacing: 0; width: 100%;
  font-variant-numeric: tabular-nums; font-size: .92rem; }
caption { padding: .5rem .6rem; text-align: left; color: var(--faint); font-size: .88rem; }
th, td { padding: .4rem .5rem; text-align: right; border-top: 1px solid var(--line); white-space: nowrap; }
thead th { vertical-align: bottom; white-space: normal; min-width: 4.3rem; font-weight: 600; }
thead th small { display: block; font-weight: 400; color: var(--faint); }
th[scope=row], thead th:first-child { text-align: left; position: sticky; left: 0; background: var(--card); }
th[scope=row] { font-weight: 600; white-space: normal; overflow-wrap: anywhere; min-width: 8rem; max-width: 13rem; }
th[scope=row] small, td small { display: block; font-weight: 400; color: var(--faint); }
td.best { background: var(--best); font-weight: 700; }
summary { cursor: pointer; color: var(--accent); margin: .5rem 0; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(22rem, 100%), 1fr)); gap: .8rem 1.6rem; }
dt { font-weight: 600; } dd { margin: 0; font-size: .92rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(21rem, 100%), 1fr)); gap: 1rem;
  margin: .7rem 0; }
figure { margin: 0; padding: .6rem; border: 1px solid var(--line); border-radius: .4rem; background: var(--card); }
figure svg { display: block; width: 100%; height: auto; } figcaption { font-size: .88rem; color: var(--faint); }
ul.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin: .6rem 0; padding: 0; list-style: none;
  font-size: .92rem; }
ul.legend svg { width: 1.6rem; height: .8rem; margin-right: .35rem; vertical-align: baseline; }
"""


@dataclass(frozen=True)
class Cell:
    """A table's cell.

    Attributes:
        text: What it says.
        best: Whether it is the best of its column, or shares that.
        note: A few words below, in small.
    """

    text: str
    best: bool = False
    note: str = ""


@dataclass(frozen=True)
class Plot:
    """A figure.

    Attributes:
        svg: Its drawing, as `models.evaluation.plots` makes it.
        caption: What it shows and how to read it.
    """

    svg: str
    caption: str


def page(title: str, body: Iterable[str]) -> str:
    """The whole document around a body of HTML."""
    light = " ".join(f"--s{number}: {light};" for number, (light, _) in enumerate(SERIES))
    dark = " ".join(f"--s{number}: {dark};" for number, (_, dark) in enumerate(SERIES))
    style = _STYLE.replace("LIGHT", light).replace("DARK", dark)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{escape(title)}</title>\n<link rel="icon" href="data:,">\n<style>{style}</style>\n</head>\n<body>\n'
        f"<main>\n<h1>{escape(title)}</h1>\n" + "\n".join(body) + "\n</main>\n</body>\n</html>\n"
    )


def heading(text: str) -> str:
    """A section's heading."""
    return f"<h2>{escape(text)}</h2>"


def paragraph(text: str, *, faint: bool = False) -> str:
    """A paragraph of plain words."""
    return f'<p class="faint">{escape(text)}</p>' if faint else f"<p>{escape(text)}</p>"


def table(caption: str, columns: Sequence[tuple[str, str]], rows: Iterable[tuple[Cell, Sequence[Cell]]]) -> str:
    """A table that scrolls sideways where it is wider than the page.

    Args:
        caption: What the table holds.
        columns: Title and a few words below it, the first one of the rows' heads.
        rows: The head and the other cells of each row.
    """
    head = "".join(f'<th scope="col">{_with_note(Cell(title, note=note))}</th>' for title, note in columns)
    body = "".join(
        f'<tr><th scope="row">{_with_note(name)}</th>' + "".join(map(_cell, cells)) + "</tr>\n" for name, cells in rows
    )
    return (
        f'<div class="scroll" role="region" aria-label="{escape(caption)}" tabindex="0"><table>'
        f"<caption>{escape(caption)}</caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>"
    )


def plots(figures: Iterable[Plot | None]) -> str:
    """Figures side by side where there is room; nothing where there are none."""
    drawn = [figure for figure in figures if figure]
    inner = "".join(f"<figure>{f.svg}<figcaption>{escape(f.caption)}</figcaption></figure>" for f in drawn)
    return f'<div class="plots">{inner}</div>' if drawn else ""


def definitions(entries: Iterable[tuple[str, str]]) -> str:
    """Terms and what they mean."""
    parts = (f"<div><dt>{escape(term)}</dt><dd>{escape(words)}</dd></div>" for term, words in entries)
    return f"<dl>{''.join(parts)}</dl>"


def details(title: str, inner: str) -> str:
    """What is opened by whoever wants it."""
    return f"<details><summary>{escape(title)}</summary>{inner}</details>"


def _cell(cell: Cell) -> str:
    if not cell.best:
        return f"<td>{_with_note(cell)}</td>"
    return f'<td class="best" title="best of the column">{_with_note(cell)} <span aria-label="best">★</span></td>'


def _with_note(cell: Cell) -> str:
    return escape(cell.text) + (f"<small>{escape(cell.note)}</small>" if cell.note else "")

"""The report of a comparison: `report.json` and `report.html`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from models.evaluation import page, plots, report_codes, report_likeness
from models.evaluation.compare import Comparison
from models.evaluation.figures import Result
from models.evaluation.page import NO_FIGURE, Cell
from models.evaluation.report_parts import kind, measured
from models.evaluation.summary import COLUMNS, FEW, ON_FEW, SEEN_TOO, summary_cells
from models.whole_files import write_whole

HTML = "report.html"
JSON = "report.json"


def write_report(comparison: Comparison, out: Path) -> None:
    """Write both files, each whole or not at all, into a directory, which is made where it does not exist."""
    texts = {
        JSON: json.dumps(comparison.as_dict(), indent=1, allow_nan=False) + "\n",
        HTML: report_page(comparison),
    }
    for name, text in texts.items():
        write_whole(out / name, text)


def report_page(comparison: Comparison) -> str:
    """The page."""
    results = comparison.results
    sections = [
        *_head(comparison),
        *_summary(comparison),
        *report_codes.collisions(results),
        *report_codes.usage(results),
        *report_codes.reconstruction(results),
        *report_likeness.categories(results),
        *report_likeness.users(comparison),
        *report_likeness.neighbours(comparison),
        *report_likeness.stability(comparison),
        *report_likeness.cold_start(results),
        *_sources(results),
    ]
    return page.page("Tokenizers side by side", [section for section in sections if section])


def _head(comparison: Comparison) -> list[str]:
    catalogue = comparison.catalogue
    words = f"{len(comparison.results)} tokenizers on {catalogue['file']}, {catalogue['items']:,} items"
    if comparison.interactions:
        words += f", and {comparison.interactions['file']}, {comparison.interactions['users']:,} users"
    lines = [page.paragraph(words + ". All figures are in report.json beside this page.")]
    if not plots.available():
        lines.append(page.paragraph(plots.WITHOUT_PLOTS))
    return lines


def _summary(comparison: Comparison) -> list[str]:
    results = comparison.results
    columns = [("Tokenizer", ""), ("Unseen items", "")]
    columns += [(column.title, ("higher" if column.higher else "lower") + " is better") for column in COLUMNS]
    rows = []
    summary = summary_cells(results)
    for result, cells in zip(results, summary, strict=True):
        unseen = "not known" if result.unseen_items is None else f"{measured(result):,}"
        note = "few: rough figures" if result.unseen_items is not None and 0 < measured(result) < FEW else ""
        rows.append((Cell(result.name, note=kind(result)), [Cell(unseen, note=note), *cells]))
    lines = [
        page.heading("Which one?"),
        page.paragraph(
            "No tokenizer is best at everything: the star marks the best of each column, and below the table stands "
            "what each figure means and what it costs. Figures that a tokenizer could flatter by having learned the "
            "items by heart are measured on items that it never saw."
        ),
        page.table("The figures that decide", columns, rows),
    ]
    if sum(result.on_unseen is not None for result in results) > 1:
        lines.append(page.paragraph(_which_unseen(comparison), faint=True))
    if any(result.on_unseen is None for result in results):
        lines.append(
            page.paragraph(
                f"{SEEN_TOO} on all items: which of them this tokenizer has seen is not known, or it saw all."
            )
        )
    if any(ON_FEW in cell.text for cells in summary for cell in cells):
        lines.append(
            page.paragraph(
                f"{ON_FEW} of fewer than {FEW:,} items, or pairs of items: which is best there may be chance, so no "
                "star is given."
            )
        )
    if any(cell.text == NO_FIGURE for cells in summary for cell in cells):
        lines.append(
            page.paragraph(
                f"{NO_FIGURE} not measured: the tokenizer, the catalogue or the users lack what it needs (embeddings, "
                "texts, categories, sequences), or no unseen item was among those drawn."
            )
        )
    return [*lines, page.definitions((column.title, column.words) for column in COLUMNS)]


def _which_unseen(comparison: Comparison) -> str:
    if comparison.unseen_in_common is not None:
        words = f"Unseen: the same {comparison.unseen_in_common:,} items for all tokenizers of which they are known."
    else:
        words = (
            "Unseen: each tokenizer's own unseen items, as there are too few in common. Where all were held out by "
            "lot the figures compare as samples of one catalogue do; how the items are known stands at the end of "
            "this page."
        )
    fewest = min(measured(result) for result in comparison.results if result.on_unseen)
    error = 98 / fewest**0.5  # 1.96 standard errors of a share of one half, in points
    return f"{words} Of {fewest:,} items a share is known to {error:.0f} points at worst: less than that may be chance."


def _sources(results: Sequence[Result]) -> list[str]:
    rows = []
    for result in results:
        number = "not known" if result.unseen_items is None else f"{result.unseen_items:,} of {result.items:,}"
        coarse = {True: "coarse to fine", False: "no coarser description", None: "not known"}[
            result.prefix_is_coarse_to_fine
        ]
        cells = [Cell(number), Cell(result.unseen_how), Cell(coarse), Cell(f"{result.items:,}")]
        rows.append((Cell(result.name, note=kind(result)), cells))
    columns = [
        ("Tokenizer", ""),
        ("Unseen items", ""),
        ("How that is known", ""),
        ("A prefix is", ""),
        ("Items with codes", ""),
    ]
    return [
        page.heading("What is known of the tokenizers"),
        page.table("Items never seen, and how that is known", columns, rows),
    ]

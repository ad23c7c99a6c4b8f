"""Sections of a comparison's page on the codes themselves: collisions, use of the codewords, reconstruction."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from models.evaluation import page, report_plots
from models.evaluation.figures import Figures, Result
from models.evaluation.page import NO_FIGURE, Cell
from models.evaluation.report_parts import legend, levels


def collisions(results: Sequence[Result]) -> list[str]:
    """Raw and resolved collisions."""
    columns = [
        ("Tokenizer", ""),
        ("Raw collisions", "before the suffix"),
        ("Equal contents", "no tokenizer parts them"),
        ("Items in a group", "of two or more"),
        ("Largest group", ""),
        ("Largest suffix", ""),
        ("Beyond max_suffix", "after the suffix"),
        *((f"Depth {depth}", "collisions of a prefix") for depth in range(1, levels(results) + 1)),
    ]
    rows = []
    for result in results:
        resolved = result.resolved
        beyond = "0, unbounded" if resolved.max_suffix is None else f"{resolved.beyond:,} of {result.items:,}"
        depths = [f"{rate:.1%}" for rate in result.collisions_by_depth]
        texts = [
            f"{result.collisions.rate:.2%}",
            f"{result.collisions.duplicates:.2%}" if result.kind == "checkpoint" else NO_FIGURE,
            f"{result.on_all.colliding:.2%}",
            f"{result.collisions.largest_group:,}",
            f"{resolved.largest_suffix:,}",
            beyond,
            *depths,
            *[NO_FIGURE] * (levels(results) - len(depths)),
        ]
        rows.append((Cell(result.name), [Cell(text) for text in texts]))
    return [
        page.heading("Collisions"),
        page.paragraph(
            "Raw: before the collision suffix. With the suffix every Semantic ID is unique; what is left after it are "
            "items beyond the largest suffix that a tokenizer allows, which are refused or moved to another codeword."
        ),
        legend(results),
        page.plots([report_plots.growth(results), report_plots.group_sizes(results), report_plots.depths(results)]),
        page.table("Raw and resolved collisions of the whole catalogue", columns, rows),
    ]


def usage(results: Sequence[Result]) -> list[str]:
    """Use of each level's codewords."""
    columns = [("Tokenizer", "codewords used · perplexity · entropy in bits")]
    columns += [(f"Level {number}", "") for number in range(1, levels(results) + 1)]
    rows = []
    for result in results:
        cells = [
            Cell(f"{level.used:.0%} · {level.perplexity:.0f} · {abs(level.entropy):.2f}", note=f"of {size:,}")
            for level, size in zip(result.on_all.levels, result.codebook_sizes, strict=True)
        ]
        rows.append((Cell(result.name), [*cells, *[Cell(NO_FIGURE)] * (levels(results) - len(cells))]))
    return [
        page.heading("Use of the codewords"),
        page.paragraph(
            "Perplexity is how many codewords, equally used, would have the same entropy. Of a hierarchical "
            "tokenizer a code means another thing under every prefix, so its deeper levels are not comparable."
        ),
        legend(results),
        page.plots([report_plots.usage(results)]),
        page.table("Use of each level's codewords by the whole catalogue", columns, rows),
    ]


def reconstruction(results: Sequence[Result]) -> list[str]:
    """What the codes lose; nothing where that was not measured."""
    measured = [result for result in results if result.on_all.reconstruction_error is not None]
    if not measured:
        return []
    rows = [
        (Cell(result.name), [Cell(_or_dash(result.on_all, _error)), Cell(_or_dash(result.on_unseen, _error))])
        for result in measured
    ]
    return [
        page.heading("Reconstruction"),
        page.paragraph(
            "|x - x^|² over all items as a share of their variance. What it loses on unseen items more than on all "
            "is what it had learned by heart."
        ),
        page.table("Reconstruction error", [("Tokenizer", ""), ("All items", ""), ("Unseen items", "")], rows),
    ]


def _error(figures: Figures) -> str:
    return NO_FIGURE if figures.reconstruction_error is None else f"{figures.reconstruction_error:.3f}"


def _or_dash(figures: Figures | None, text: Callable[[Figures], str]) -> str:
    return NO_FIGURE if figures is None else text(figures)

"""The report of a comparison: `report.json` and `report.html`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from models.evaluation import page, plots, report_plots
from models.evaluation.compare import Comparison
from models.evaluation.figures import Figures, Result
from models.evaluation.page import NO_FIGURE, Cell
from models.evaluation.summary import COLUMNS, SEEN_TOO, summary_cells
from models.whole_files import write_whole

HTML = "report.html"
JSON = "report.json"

# Unseen items below which a figure on them is said to be rough.
FEW = 200


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
        *_collisions(results),
        *_usage(results),
        *_reconstruction(results),
        *_categories(results),
        *_users(comparison),
        *_neighbours(comparison),
        *_stability(comparison),
        *_cold_start(results),
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
    for result, cells in zip(results, summary_cells(results), strict=True):
        unseen = "not known" if result.unseen_items is None else f"{_measured(result):,}"
        note = "few: rough figures" if result.unseen_items is not None and 0 < _measured(result) < FEW else ""
        rows.append((Cell(result.name, note=_kind(result)), [Cell(unseen, note=note), *cells]))
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
    fewest = min(_measured(result) for result in comparison.results if result.on_unseen)
    error = 98 / fewest**0.5  # 1.96 standard errors of a share of one half, in points
    return f"{words} Of {fewest:,} items a share is known to {error:.0f} points at worst: less than that may be chance."


def _collisions(results: Sequence[Result]) -> list[str]:
    columns = [
        ("Tokenizer", ""),
        ("Raw collisions", "before the suffix"),
        ("Equal contents", "no tokenizer parts them"),
        ("Items in a group", "of two or more"),
        ("Largest group", ""),
        ("Largest suffix", ""),
        ("Beyond max_suffix", "after the suffix"),
        *((f"Depth {depth}", "collisions of a prefix") for depth in range(1, _levels(results) + 1)),
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
            *[NO_FIGURE] * (_levels(results) - len(depths)),
        ]
        rows.append((Cell(result.name), [Cell(text) for text in texts]))
    return [
        page.heading("Collisions"),
        page.paragraph(
            "Raw: before the collision suffix. With the suffix every Semantic ID is unique; what is left after it are "
            "items beyond the largest suffix that a tokenizer allows, which are refused or moved to another codeword."
        ),
        _legend(results),
        page.plots([report_plots.growth(results), report_plots.group_sizes(results), report_plots.depths(results)]),
        page.table("Raw and resolved collisions of the whole catalogue", columns, rows),
    ]


def _usage(results: Sequence[Result]) -> list[str]:
    columns = [("Tokenizer", "codewords used · perplexity · entropy in bits")]
    columns += [(f"Level {number}", "") for number in range(1, _levels(results) + 1)]
    rows = []
    for result in results:
        cells = [
            Cell(f"{level.used:.0%} · {level.perplexity:.0f} · {abs(level.entropy):.2f}", note=f"of {size:,}")
            for level, size in zip(result.on_all.levels, result.codebook_sizes, strict=True)
        ]
        rows.append((Cell(result.name), [*cells, *[Cell(NO_FIGURE)] * (_levels(results) - len(cells))]))
    return [
        page.heading("Use of the codewords"),
        page.paragraph(
            "Perplexity is how many codewords, equally used, would have the same entropy. Of a hierarchical "
            "tokenizer a code means another thing under every prefix, so its deeper levels are not comparable."
        ),
        _legend(results),
        page.plots([report_plots.usage(results)]),
        page.table("Use of each level's codewords by the whole catalogue", columns, rows),
    ]


def _reconstruction(results: Sequence[Result]) -> list[str]:
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


def _categories(results: Sequence[Result]) -> list[str]:
    names = list(dict.fromkeys(name for result in results for name in result.on_all.purity))
    if not names:
        return []
    depths = _levels(results)
    lines = [
        page.heading("Categories"),
        page.paragraph(
            "Purity: the share of items whose category is the most frequent one under their prefix. The deeper the "
            "prefix, the smaller its groups, and small groups are pure by chance: beside each figure stands that of "
            "the same codes shuffled among the items."
        ),
        _legend(results, "Full lines: the codes; dotted: the same codes shuffled among the items."),
        page.plots(report_plots.purity(results, name) for name in (names[0], names[-1])[: len(names)]),
    ]
    for name in names:
        rows = []
        for result in results:
            found = result.on_all.purity.get(name)
            unseen = result.on_unseen.purity.get(name) if result.on_unseen else None
            if found:
                cells = [
                    Cell(f"{p:.1%}", note=f"shuffled {s:.1%}")
                    for p, s in zip(found.by_depth, found.shuffled, strict=True)
                ]
                cells += [Cell(NO_FIGURE)] * (depths - len(cells))
                rows.append((Cell(result.name), [*cells, Cell(f"{unseen.by_depth[0]:.1%}" if unseen else NO_FIGURE)]))
        count = next(result.on_all.purity[name].categories for result in results if name in result.on_all.purity)
        columns = [("Tokenizer", ""), *((f"Depth {depth}", "") for depth in range(1, depths + 1))]
        table = page.table(
            f"Purity by the category's {name} ({count:,} categories), all items",
            [*columns, ("Depth 1", "unseen items")],
            rows,
        )
        lines.append(table if name in (names[0], names[-1]) else page.details(f"Purity by {name}", table))
    return lines


def _users(comparison: Comparison) -> list[str]:
    results = [result for result in comparison.results if result.on_all.consecutive]
    if not results or not comparison.interactions:
        return []
    rows = []
    for result in results:
        cells = []
        for figures in (result.on_all, result.on_unseen):
            found = figures.consecutive if figures else None
            pairs = zip(found.shared, found.shuffled, strict=True) if found else ()
            texts = [Cell(f"{shared:.2%}", note=f"shuffled {chance:.2%}") for shared, chance in pairs][:2]
            cells += [*texts, *[Cell(NO_FIGURE)] * (2 - len(texts))]
        rows.append((Cell(result.name), cells))
    columns = [
        ("Tokenizer", ""),
        *((f"Levels 1-{d}" if d > 1 else "Level 1", what) for what in ("all items", "an unseen item") for d in (1, 2)),
    ]
    return [
        page.heading("Users"),
        page.paragraph(
            f"{comparison.interactions['pairs']:,} pairs of items that a user chose one after the other: how often "
            "both share the first codes, beside what codes shuffled among the items would share. A repeat of one "
            "item is no pair."
        ),
        _legend(comparison.results, "Full lines: the codes; dotted: the same codes shuffled among the items.", results),
        page.plots([report_plots.consecutive(comparison.results)]),
        page.table("Consecutive items that share their first codes", columns, rows),
    ]


def _neighbours(comparison: Comparison) -> list[str]:
    results = [result for result in comparison.results if result.on_all.neighbours]
    if not results:
        return []
    depths = _levels(results)
    rows = []
    for result in results:
        found, unseen = result.on_all.neighbours, result.on_unseen.neighbours if result.on_unseen else None
        assert found is not None
        cells = [
            Cell(f"{recall:.1%}", note=f"{size:,.1f} items, random {chance:.2%}")
            for recall, size, chance in zip(found.recall, found.set_size, found.random, strict=True)
        ]
        cells += [Cell(NO_FIGURE)] * (depths - len(cells))
        last = [
            Cell(f"{found.of_nearest_by_prefix:.1%}"),
            Cell(f"{unseen.of_nearest_by_prefix:.1%}" if unseen else NO_FIGURE),
        ]
        rows.append((Cell(result.name), [*cells, *last]))
    columns = [("Tokenizer", ""), *((f"Depth {depth}", "") for depth in range(1, depths + 1))]
    columns += [("Nearest 100 by prefix", "all items"), ("Nearest 100 by prefix", "unseen items")]
    queries = max(result.on_all.neighbours.queries for result in results if result.on_all.neighbours)
    return [
        page.heading("Neighbours kept"),
        page.paragraph(
            "Of the 10 nearest items in the embedding, how many are among the items that share the prefix; of "
            f"{queries:,} items by lot (seed {comparison.config.seed}), searched exactly. A larger set holds more by "
            "itself, so the mean size of the set stands beside it, and what random sets of that size hold. In the "
            "plot, further left at the same height is better."
        ),
        _legend(
            comparison.results, "Each line goes from the whole prefix (left) to the first code alone (right).", results
        ),
        page.plots([report_plots.neighbours(comparison.results)]),
        page.table("Neighbours among the items that share a prefix", columns, rows),
    ]


def _stability(comparison: Comparison) -> list[str]:
    results = [result for result in comparison.results if result.on_all.stability]
    if not results:
        return []
    kinds = list(dict.fromkeys(kind for result in results for kind in result.on_all.stability))
    rows = []
    for result in results:
        cells = []
        for kind in kinds:
            found = result.on_all.stability.get(kind)
            if found is None:
                cells.append(Cell(NO_FIGURE))
                continue
            two = f"{found.by_depth[1]:.0%} · " if len(found.by_depth) > 2 else ""
            cells.append(
                Cell(f"{found.by_depth[0]:.0%} · {two}{found.by_depth[-1]:.0%}", note=f"{found.items:,} items")
            )
        rows.append((Cell(result.name), cells))
    return [
        page.heading("Stability under paraphrase"),
        page.paragraph(
            f"The texts of {comparison.config.paraphrased:,} items by lot (seed {comparison.config.seed}), changed "
            "without a change of meaning: how many keep level 1, levels 1-2 and all codes. Items that a change "
            "leaves as they are do not count. Items never seen go first into the sample."
        ),
        _legend(comparison.results, shown=results),
        page.plots([report_plots.stability(comparison.results, 1), report_plots.stability(comparison.results, None)]),
        page.table(
            "Items that keep level 1 · levels 1-2 · all codes",
            [("Tokenizer", ""), *((kind, "") for kind in kinds)],
            rows,
        ),
    ]


def _cold_start(results: Sequence[Result]) -> list[str]:
    measured = [result for result in results if result.cold_start]
    if not measured:
        return []
    rows = []
    for result in measured:
        found = result.cold_start
        assert found is not None
        beyond = found.beyond_training
        cells = [
            Cell(f"{found.unseen:,}", note=f"beside {found.seen:,} seen"),
            _beside(*(shares[0] for shares in found.nearest_shares)),
            _beside(*(shares[min(1, len(shares) - 1)] for shares in found.nearest_shares)),
            _beside(*(shares[0] for shares in found.neighbours_share)),
            _beside(*found.colliding),
            Cell(f"{found.quantization_error[0] / max(found.quantization_error[1], 1e-12):.2f} x"),
            _beside(*beyond) if beyond else Cell(NO_FIGURE),
        ]
        rows.append((Cell(result.name), cells))
    columns = [
        ("Tokenizer", ""),
        ("Unseen items", ""),
        ("Nearest seen item shares level 1", "seen items beside"),
        ("... levels 1-2", "seen items beside"),
        ("10 nearest share level 1", "seen items beside"),
        ("Items that collide", "seen items beside"),
        ("Quantization error", "unseen : seen"),
        ("Beyond the training's 95%", "5% where alike"),
    ]
    return [
        page.heading("Cold start"),
        page.paragraph(
            "Items never seen among those that were: do they land where their nearest neighbours are, do they "
            "collide more, are they further from every codeword than what was trained on?"
        ),
        _legend(results, "Filled: unseen items; hollow: seen ones.", measured),
        page.plots([report_plots.cold_start(results)]),
        page.table("Unseen items, seen ones beside them", columns, rows),
    ]


def _sources(results: Sequence[Result]) -> list[str]:
    rows = []
    for result in results:
        number = "not known" if result.unseen_items is None else f"{result.unseen_items:,} of {result.items:,}"
        coarse = {True: "coarse to fine", False: "no coarser description", None: "not known"}[
            result.prefix_is_coarse_to_fine
        ]
        cells = [Cell(number), Cell(result.unseen_how), Cell(coarse), Cell(f"{result.items:,}")]
        rows.append((Cell(result.name, note=_kind(result)), cells))
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


def _legend(results: Sequence[Result], more: str = "", shown: Sequence[Result] | None = None) -> str:
    """Of all tokenizers, so that each has one colour on the whole page, those that are shown."""
    if not plots.available():
        return ""
    names = {result.name for result in (results if shown is None else shown)}
    return plots.legend([result.name if result.name in names else "" for result in results], more)


def _kind(result: Result) -> str:
    sizes = set(result.codebook_sizes)
    shape = (
        f"{len(result.codebook_sizes)} x {sizes.pop()}"
        if len(sizes) == 1
        else " x ".join(map(str, result.codebook_sizes))
    )
    return f"{result.family or 'index file'}, {shape}"


def _measured(result: Result) -> int:
    return result.on_unseen.items if result.on_unseen else 0


def _levels(results: Sequence[Result]) -> int:
    return max(len(result.codebook_sizes) for result in results)


def _error(figures: Figures) -> str:
    return NO_FIGURE if figures.reconstruction_error is None else f"{figures.reconstruction_error:.3f}"


def _or_dash(figures: Figures | None, text: Callable[[Figures], str]) -> str:
    return NO_FIGURE if figures is None else text(figures)


def _beside(unseen: float, seen: float) -> Cell:
    return Cell(f"{unseen:.1%}", note=f"seen {seen:.1%}")

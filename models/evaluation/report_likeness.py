"""Sections of a comparison's page on what prefixes keep: categories, users, neighbours, paraphrases, new items.

Each is empty where nothing of it was measured.
"""

from __future__ import annotations

from collections.abc import Sequence

from models.evaluation import page, report_plots
from models.evaluation.compare import Comparison
from models.evaluation.figures import Result
from models.evaluation.page import NO_FIGURE, Cell
from models.evaluation.report_parts import legend, levels


def categories(results: Sequence[Result]) -> list[str]:
    """Purity, level by level of the category."""
    names = list(dict.fromkeys(name for result in results for name in result.on_all.purity))
    if not names:
        return []
    depths = levels(results)
    lines = [
        page.heading("Categories"),
        page.paragraph(
            "Purity: the share of items whose category is the most frequent one under their prefix. The deeper the "
            "prefix, the smaller its groups, and small groups are pure by chance: beside each figure stands that of "
            "the same codes shuffled among the items."
        ),
        legend(results, "Full lines: the codes; dotted: the same codes shuffled among the items."),
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


def users(comparison: Comparison) -> list[str]:
    """Consecutive items of users."""
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
        legend(comparison.results, "Full lines: the codes; dotted: the same codes shuffled among the items.", results),
        page.plots([report_plots.consecutive(comparison.results)]),
        page.table("Consecutive items that share their first codes", columns, rows),
    ]


def neighbours(comparison: Comparison) -> list[str]:
    """Neighbours of the embedding under a prefix."""
    results = [result for result in comparison.results if result.on_all.neighbours]
    if not results:
        return []
    depths = levels(results)
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
        legend(
            comparison.results, "Each line goes from the whole prefix (left) to the first code alone (right).", results
        ),
        page.plots([report_plots.neighbours(comparison.results)]),
        page.table("Neighbours among the items that share a prefix", columns, rows),
    ]


def stability(comparison: Comparison) -> list[str]:
    """Codes kept under paraphrase."""
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
        legend(comparison.results, shown=results),
        page.plots([report_plots.stability(comparison.results, 1), report_plots.stability(comparison.results, None)]),
        page.table(
            "Items that keep level 1 · levels 1-2 · all codes",
            [("Tokenizer", ""), *((kind, "") for kind in kinds)],
            rows,
        ),
    ]


def cold_start(results: Sequence[Result]) -> list[str]:
    """Unseen items beside seen ones."""
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
        legend(results, "Filled: unseen items; hollow: seen ones.", measured),
        page.plots([report_plots.cold_start(results)]),
        page.table("Unseen items, seen ones beside them", columns, rows),
    ]


def _beside(unseen: float, seen: float) -> Cell:
    return Cell(f"{unseen:.1%}", note=f"seen {seen:.1%}")

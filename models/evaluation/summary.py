"""The figures that decide: one row a tokenizer, and what each figure means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from models.evaluation.figures import Figures, Result
from models.evaluation.page import NO_FIGURE, Cell

SEEN_TOO = "†"
ON_FEW = "‡"

# Items below which a figure is rough: of 200, a share is known to 7 points at worst.
FEW = 200


@dataclass(frozen=True)
class Column:
    """A figure of the summary.

    Attributes:
        title: Its name.
        unseen: Whether it is measured on items never seen, where these are known.
        higher: Whether more is better.
        words: What it means, which direction is good and what it costs.
        value: The figure, from the result and its figures on unseen items or, where there are none, on all; None where
            the tokenizer has none.
        text: How it is written.
        rests_on: How many items or pairs it is a mean of, of the same; those that it is measured on where None.
    """

    title: str
    unseen: bool
    higher: bool
    words: str
    value: Callable[[Result, Figures], float | None]
    text: Callable[[float], str] = "{:.1%}".format
    rests_on: Callable[[Figures], int] | None = None

    def is_rough(self, result: Result) -> bool:
        """Whether it is a mean of so few that it may be best by chance."""
        if not self.unseen:
            return result.items < FEW
        figures = result.on_unseen or result.on_all
        return (self.rests_on(figures) if self.rests_on else figures.items) < FEW


def summary_cells(results: Sequence[Result]) -> list[list[Cell]]:
    """The cells of each tokenizer's row, a cell for each of `COLUMNS`.

    Best are those that are written like the best value. A figure on all items, seen ones included, is marked and does
    not compete with figures on unseen ones. One on few items is marked and competes with none.
    """
    rows: list[list[Cell]] = [[] for _ in results]
    for column in COLUMNS:
        values = [column.value(result, result.on_unseen or result.on_all) for result in results]
        marked = [column.unseen and result.on_unseen is None for result in results]
        rough = [value is not None and column.is_rough(r) for r, value in zip(results, values, strict=True)]
        out = [few or (mark and not all(marked)) for mark, few in zip(marked, rough, strict=True)]
        competing = [v for v, alone in zip(values, out, strict=True) if v is not None and not alone]
        best = column.text((max if column.higher else min)(competing)) if len(competing) > 1 else None
        for row, value, mark, few, alone in zip(rows, values, marked, rough, out, strict=True):
            if value is None:
                row.append(Cell(NO_FIGURE))
                continue
            text = column.text(value)
            signs = (SEEN_TOO if mark else "") + (ON_FEW if few else "")
            row.append(Cell(text + signs, best=text == best and not alone))
    return rows


def _first_purity(_: Result, figures: Figures) -> float | None:
    purity = next(iter(figures.purity.values()), None)
    return purity.above_chance[0] if purity else None


def _next_item(_: Result, figures: Figures) -> float | None:
    found = figures.consecutive
    return found.shared[0] - found.shuffled[0] if found else None


def _neighbours(_: Result, figures: Figures) -> float | None:
    return figures.neighbours.of_nearest_by_prefix if figures.neighbours else None


def _stability(_: Result, figures: Figures) -> float | None:
    kept = [found.by_depth[min(2, len(found.by_depth)) - 1] for found in figures.stability.values()]
    return sum(kept) / len(kept) if kept else None


def _evenness(result: Result, _: Figures) -> float | None:
    levels = zip(result.on_all.levels, result.codebook_sizes, strict=True)
    return min(level.perplexity / size for level, size in levels)


COLUMNS: Sequence[Column] = (
    Column(
        "Raw collisions",
        unseen=False,
        higher=False,
        words="Share of the catalogue's items that get a collision suffix because an earlier item has all their "
        "codes: 1 - distinct codes / items. Lower is better: a suffix says nothing of the content, and a "
        "generator has to learn it by heart. More or larger levels lower it, and so do codes that ignore what "
        "items have in common.",
        value=lambda result, _: result.collisions.rate,
        text="{:.2%}".format,
    ),
    Column(
        "Largest group",
        unseen=False,
        higher=False,
        words="Items under the most crowded codes. Lower is better: it is how many suffixes the generator's vocabulary "
        "needs.",
        value=lambda result, _: float(result.collisions.largest_group),
        text="{:,.0f}".format,
    ),
    Column(
        "Unseen items that collide",
        unseen=True,
        higher=False,
        words="Share of the items that share all codes with any other of the catalogue. Lower is better: a "
        "tokenizer that has learned its own items by heart puts each new one on top of an old one.",
        value=lambda _, figures: figures.colliding,
    ),
    Column(
        "Least even level",
        unseen=False,
        higher=True,
        words="Perplexity of the level that is used least evenly, as a share of its codebook. Higher is better: "
        "codewords that are never chosen are wasted vocabulary. A tokenizer of many domains uses few "
        "codewords of level 1 on one catalogue; its deeper levels should be even.",
        value=_evenness,
        text="{:.0%}".format,
    ),
    Column(
        "Reconstruction error",
        unseen=True,
        higher=False,
        words="What the codes lose of the embedding, as a share of its variance: 0 is nothing, 1 is answering the "
        "mean. Lower is better. It pulls against collisions: codes that rebuild well spend their bits where "
        "most of the variance is, not where items differ.",
        value=lambda _, figures: figures.reconstruction_error,
        text="{:.3f}".format,
    ),
    Column(
        "Neighbours kept",
        unseen=True,
        higher=True,
        words="Of an item's 10 nearest in the embedding, the share among the 100 items with the longest common prefix. "
        "Higher is better: near items are then near in the tree, which is what a generator generalises by.",
        value=_neighbours,
        rests_on=lambda figures: figures.neighbours.queries if figures.neighbours else 0,
    ),
    Column(
        "Category purity above chance",
        unseen=True,
        higher=True,
        words="How well level 1 follows the uppermost category level that parts the items: 0 is shuffled codes, 1 "
        "is every first code within one category. Higher is better where users shop by category; the "
        "embedding may have found other likenesses that serve as well.",
        value=_first_purity,
    ),
    Column(
        "Next item shares level 1",
        unseen=True,
        higher=True,
        words="How much more often a user's next item has the same first code than with shuffled codes, in points. "
        "Higher is better: the first step of a recommendation is then easier to guess. A coarse level 1 "
        "raises it by itself.",
        value=_next_item,
        rests_on=lambda figures: figures.consecutive.pairs if figures.consecutive else 0,
    ),
    Column(
        "First two codes kept under paraphrase",
        unseen=True,
        higher=True,
        words="Share of the items whose first two codes stay when the text is changed and its meaning is not, mean "
        "over the kinds of change. Higher is better: equal goods described otherwise get related IDs. Fewer "
        "and larger cells are stabler, and tell less.",
        value=_stability,
        # Kinds of change that few items have count alike, but the same items are behind all of them.
        rests_on=lambda figures: max((found.items for found in figures.stability.values()), default=0),
    ),
)

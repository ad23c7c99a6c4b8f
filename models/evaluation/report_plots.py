"""The plots of a comparison. Each gives None where there is nothing to draw or nothing to draw with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from models.evaluation import plots
from models.evaluation.figures import Result
from models.evaluation.page import Plot

DOTTED = (0, (1, 2))


def growth(results: Sequence[Result]) -> Plot | None:
    """Raw collisions as the catalogue grows."""

    def paint(axes: Any) -> None:
        for number, result in enumerate(results):
            _line(axes, number, [p.items for p in result.growth], [100 * p.rate for p in result.growth])
        axes.set(
            xscale="log", xlabel="items of the catalogue", ylabel="raw collisions, %", title="As the catalogue grows"
        )
        axes.set_ylim(bottom=0)

    return _plot(
        "growth",
        "Raw collisions as the catalogue grows, a line for each tokenizer.",
        "Expected raw collisions of a part of the catalogue drawn at random.",
        paint,
    )


def group_sizes(results: Sequence[Result]) -> Plot | None:
    """Items by the size of their group, summed from the largest."""

    def paint(axes: Any) -> None:
        for number, result in enumerate(results):
            sizes = sorted(result.collisions.group_sizes)
            items = [size * result.collisions.group_sizes[size] for size in sizes]
            shares = [100 * sum(items[place:]) / result.items for place in range(len(sizes))]
            _line(axes, number, sizes, shares)
        axes.set(xscale="log", yscale="log", xlabel="n", ylabel="items, %", title="In groups of at least n items")

    alt = "Share of the items in groups of at least n, a line for each tokenizer."
    return _plot("groups", alt, "How many items share all codes with how many; both axes are logarithmic.", paint)


def depths(results: Sequence[Result]) -> Plot | None:
    """Collisions of prefixes."""

    def paint(axes: Any) -> None:
        for number, result in enumerate(results):
            rates = [100 * rate for rate in result.collisions_by_depth]
            _line(axes, number, range(1, len(rates) + 1), rates)
        _depth_axis(axes, results)
        axes.set(ylabel="collisions, %", title="Had it only the first levels")

    return _plot(
        "depths", "Collisions of prefixes by depth, a line for each tokenizer.", "What each further level parts.", paint
    )


def usage(results: Sequence[Result]) -> Plot | None:
    """Perplexity of each level as a share of its codebook."""

    def paint(axes: Any) -> None:
        width = 0.8 / len(results)
        for number, result in enumerate(results):
            shares = [
                100 * level.perplexity / size
                for level, size in zip(result.on_all.levels, result.codebook_sizes, strict=True)
            ]
            places = [depth + (number - (len(results) - 1) / 2) * width for depth in range(1, len(shares) + 1)]
            axes.bar(places, shares, width * 0.9, color=plots.colour(number))
        axes.grid(visible=False, axis="x")
        axes.set_xticks(range(1, max(len(result.codebook_sizes) for result in results) + 1))
        axes.set(xlabel="level", ylabel="perplexity, % of the codebook", ylim=(0, 100), title="Evenness of each level")

    return _plot(
        "usage",
        "Perplexity of each level as a share of its codebook, bars by tokenizer.",
        "100%: all codewords are chosen equally often.",
        paint,
    )


def purity(results: Sequence[Result], name: str) -> Plot | None:
    """Purity by depth beside shuffled codes."""

    def paint(axes: Any) -> None:
        for number, result in enumerate(results):
            found = result.on_all.purity.get(name)
            if found:
                places = range(1, len(found.by_depth) + 1)
                _line(axes, number, places, [100 * p for p in found.by_depth])
                _line(axes, number, places, [100 * p for p in found.shuffled], dotted=True)
        _depth_axis(axes, results)
        axes.set(ylabel="purity, %", ylim=(0, 102), title=f"Category: {name}")

    return _plot(
        f"purity {name}",
        f"Purity by depth for the category's {name}, and shuffled.",
        "Further above its dotted line is better.",
        paint,
    )


def consecutive(results: Sequence[Result]) -> Plot | None:
    """Consecutive items that share a prefix, beside shuffled codes."""

    def paint(axes: Any) -> None:
        for number, result in enumerate(results):
            found = result.on_all.consecutive
            if found:
                places = range(1, len(found.shared) + 1)
                _line(axes, number, places, [100 * share for share in found.shared])
                _line(axes, number, places, [100 * share for share in found.shuffled], dotted=True)
        _depth_axis(axes, results)
        axes.set(yscale="log", ylabel="pairs that share it, %", title="Consecutive items of a user")

    return _plot(
        "consecutive",
        "Share of consecutive items that share a prefix, by depth, and shuffled.",
        "Logarithmic: the distance to the dotted line is how many times more often than by chance.",
        paint,
    )


def neighbours(results: Sequence[Result]) -> Plot | None:
    """Recall against the size of the set."""

    def paint(axes: Any) -> None:
        for number, result in enumerate(results):
            found = result.on_all.neighbours
            if found:
                places = [
                    (size, 100 * recall) for size, recall in zip(found.set_size, found.recall, strict=True) if size
                ]
                _line(axes, number, [size for size, _ in places], [recall for _, recall in places])
        axes.set(
            xscale="log", xlabel="other items that share the prefix (mean)", ylabel="of the 10 nearest among them, %"
        )
        axes.set(title="Neighbours kept")
        axes.set_ylim(bottom=0)

    return _plot(
        "neighbours",
        "Recall of the 10 nearest neighbours against the mean size of the set that shares the prefix.",
        "Each point is a depth: the whole prefix on the left, the first code alone on the right.",
        paint,
    )


def stability(results: Sequence[Result], depth: int | None) -> Plot | None:
    """Items that keep their first `depth` codes, or all of them, by kind of paraphrase."""
    kinds = list(dict.fromkeys(kind for result in results for kind in result.on_all.stability))
    what = "all codes" if depth is None else "level 1"
    # A kind's row is 1 high: its markers stay within it, however many tokenizers there are.
    apart = min(0.11, 0.8 / len(results))

    def paint(axes: Any) -> None:
        for number, result in enumerate(results):
            found = result.on_all.stability
            places = [
                (100 * found[kind].by_depth[(depth or 0) - 1], row) for row, kind in enumerate(kinds) if kind in found
            ]
            axes.plot(
                [x for x, _ in places],
                [y + (number - (len(results) - 1) / 2) * apart for _, y in places],
                linestyle="none",
                marker=plots.marker(number),
                color=plots.colour(number),
            )
        axes.set_yticks(range(len(kinds)), kinds)
        axes.invert_yaxis()
        axes.set(xlim=(0, 102), xlabel="items that keep them, %", title=f"Keep {what}")

    return _plot(
        f"stability {what}",
        f"Share of items that keep {what}, by kind of paraphrase.",
        f"Items that keep {what} when their text is changed so.",
        paint,
    )


def cold_start(results: Sequence[Result]) -> Plot | None:
    """How often the nearest seen item shares a prefix: unseen items beside seen ones."""

    def paint(axes: Any) -> None:
        for number, result in enumerate(results):
            if result.cold_start:
                unseen, seen = result.cold_start.nearest_shares
                places = range(1, len(unseen) + 1)
                _line(axes, number, places, [100 * share for share in unseen])
                _line(axes, number, places, [100 * share for share in seen], dotted=True, hollow=True)
        _depth_axis(axes, results)
        axes.set(ylabel="share it, %", title="With the nearest seen item")
        axes.set_ylim(bottom=0)

    return _plot(
        "cold start",
        "How often the nearest seen item shares a prefix, unseen beside seen items.",
        "How often an item shares its prefix with the nearest seen item in the embedding.",
        paint,
    )


def _plot(name: str, alt: str, caption: str, paint: Callable[[Any], None]) -> Plot | None:
    return Plot(plots.draw(name, alt, paint), caption) if plots.available() else None


def _line(
    axes: Any, number: int, x: Sequence[float], y: Sequence[float], *, dotted: bool = False, hollow: bool = False
) -> None:
    axes.plot(
        x,
        y,
        color=plots.colour(number),
        linestyle=DOTTED if dotted else "-",
        marker="" if dotted and not hollow else plots.marker(number),
        markerfacecolor="none" if hollow else plots.colour(number),
    )


def _depth_axis(axes: Any, results: Sequence[Result]) -> None:
    axes.set_xticks(range(1, max(len(result.codebook_sizes) for result in results) + 1))
    axes.set_xlabel("codes of the prefix")

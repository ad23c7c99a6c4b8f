"""What prefixes of codes keep: groups by depth, collisions as a catalogue grows, categories, users' next items.

Everything here needs codes alone, of any tokenizer or of a published index file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import lgamma

import torch
from torch import Tensor

SHUFFLES = 3
GROWTH_POINTS = 12


class PrefixGroups:
    """The items under each prefix, depth by depth.

    Args:
        codes: (N, L) int64.

    Attributes:
        numbers: (N, L) int64; items of equal number at depth d (column d - 1) share their first d codes.
        counts: For each depth (G_d,) int64, the items of each group.
    """

    def __init__(self, codes: Tensor) -> None:
        numbers: list[Tensor] = []
        self.counts: list[Tensor] = []
        for level in range(codes.shape[1]):
            above = numbers[-1] * (int(codes[:, level].max()) + 1) if numbers else 0
            _, number, count = (above + codes[:, level]).unique(return_inverse=True, return_counts=True)
            numbers.append(number)
            self.counts.append(count)
        self.numbers = torch.stack(numbers, dim=1)

    @property
    def depths(self) -> int:
        """L."""
        return self.numbers.shape[1]

    def sizes(self, depth: int) -> Tensor:
        """(N,) int64: how many items share each item's first `depth` codes, itself included."""
        return self.counts[depth - 1][self.numbers[:, depth - 1]]

    def collisions_by_depth(self) -> list[float]:
        """1 - distinct prefixes / N, had a tokenizer only the first 1, 2, ..., L levels."""
        return [1 - len(count) / len(self.numbers) for count in self.counts]

    def shared(self, first: Tensor, second: Tensor) -> Tensor:
        """(P, L) bool: whether items in rows first (P,) and second (P,) share their first 1, 2, ..., L codes."""
        return self.numbers[first] == self.numbers[second]

    def chance(self) -> list[float]:
        """By depth, the probability that two items drawn at random share the prefix; codes shuffled among items.

        sum over groups of n_g (n_g - 1) / (N (N - 1)), which is the mean over all N! shuffles.
        """
        pairs = max(1, len(self.numbers) * (len(self.numbers) - 1))
        return [float((count.double() * (count - 1)).sum()) / pairs for count in self.counts]


@dataclass(frozen=True)
class GrowthPoint:
    """What a part of a catalogue would collide.

    Attributes:
        items: n of the catalogue's N items, drawn at random.
        rate: The expected 1 - unique / n.
    """

    items: int
    rate: float


def growth(group_sizes: Mapping[int, int], points: int = GROWTH_POINTS) -> list[GrowthPoint]:
    """How raw collisions come as a catalogue grows to what it is, in expectation over the order of arrival.

    Of a group of g items, n drawn from N without replacement leave out all with probability C(N - g, n) / C(N, n), so
    E[unique] = sum over groups of 1 - C(N - g, n) / C(N, n). Exact: nothing is sampled.

    Args:
        group_sizes: Group size -> number of groups, see `models.evaluation.measures.Collisions`.
        points: How many n, evenly spaced in log n up to N.
    """
    total = sum(size * count for size, count in group_sizes.items())
    least = min(total, 100)
    numbers = sorted({round(least * (total / least) ** (i / max(1, points - 1))) for i in range(points)})
    return [GrowthPoint(n, max(0.0, 1 - _expected_groups(group_sizes, total, n) / n)) for n in numbers if n]


@dataclass(frozen=True)
class Purity:
    """How well prefixes follow a level of the categories.

    Attributes:
        items: Items that have a category of this level.
        categories: How many there are.
        by_depth: Share of the items whose category is the most frequent one under their prefix of 1, 2, ..., L codes.
        shuffled: The same with the codes shuffled among the items, mean of `SHUFFLES`: small groups are pure by chance.
    """

    items: int
    categories: int
    by_depth: tuple[float, ...]
    shuffled: tuple[float, ...]

    @property
    def above_chance(self) -> tuple[float, ...]:
        """(purity - shuffled) / (1 - shuffled): 0 as by chance, 1 when every group has one category."""
        return tuple((p - s) / max(1e-9, 1 - s) for p, s in zip(self.by_depth, self.shuffled, strict=True))


def purity_by_depth(groups: PrefixGroups, categories: Tensor, rows: Tensor, seed: int = 0) -> Purity | None:
    """Purity at each depth.

    Args:
        groups: Of N items.
        categories: (N,) int64, the category's number, -1 where an item has none of this level.
        rows: (n,) int64, the items that are counted; the most frequent category is that of all items.
        seed: Of the shuffles.

    Returns:
        None where no counted item has a category.
    """
    valid = (categories >= 0).nonzero().flatten()
    counted = torch.zeros(len(categories), dtype=torch.bool)
    counted[rows] = True
    counted = counted[valid]
    if not bool(counted.any()):
        return None
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(valid), generator=generator) for _ in range(SHUFFLES)]
    names = categories[valid]
    found, shuffled = [], []
    for depth in range(groups.depths):
        numbers = groups.numbers[valid, depth]
        found.append(_share(typical(numbers, names), counted))
        shuffled.append(sum(_share(typical(numbers[order], names), counted) for order in orders) / SHUFFLES)
    return Purity(int(counted.sum()), len(names.unique()), tuple(found), tuple(shuffled))


def typical(numbers: Tensor, categories: Tensor) -> Tensor:
    """(N,) bool: whether an item's category is the most frequent one in its group; of equally frequent ones the first.

    Args:
        numbers: (N,) int64, each item's group.
        categories: (N,) int64, at least 0.
    """
    width = int(categories.max()) + 1
    pairs, counts = (numbers * width + categories).unique(return_counts=True)
    group, category = pairs // width, pairs % width
    most = torch.zeros(int(group.max()) + 1, dtype=torch.int64).scatter_reduce(0, group, counts, "amax")
    winners = torch.full_like(most, width)
    first = counts == most[group]
    winners = winners.scatter_reduce(0, group[first], category[first], "amin")
    return winners[numbers] == categories


@dataclass(frozen=True)
class Consecutive:
    """How often one user's consecutive items share a prefix.

    Attributes:
        pairs: Pairs of consecutive items; a repeat of the same item is no pair.
        shared: Share of the pairs that share their first 1, 2, ..., L codes.
        shuffled: The same expected of codes shuffled among the items.
    """

    pairs: int
    shared: tuple[float, ...]
    shuffled: tuple[float, ...]


def consecutive(groups: PrefixGroups, pairs: Tensor) -> Consecutive | None:
    """Consecutive items of users, as rows (P, 2) int64; None where there are none."""
    if not len(pairs):
        return None
    shared = groups.shared(pairs[:, 0], pairs[:, 1]).double().mean(dim=0)
    return Consecutive(len(pairs), tuple(shared.tolist()), tuple(groups.chance()))


def consecutive_pairs(sequences: Sequence[Sequence[int]]) -> Tensor:
    """Consecutive rows (P, 2) int64 of sequences, without repeats of one item."""
    flat = torch.tensor([row for sequence in sequences for row in sequence], dtype=torch.int64)
    ends = torch.tensor([len(sequence) for sequence in sequences], dtype=torch.int64).cumsum(0) - 1
    within = torch.ones(len(flat), dtype=torch.bool)
    within[ends[ends >= 0]] = False
    pairs = torch.stack([flat, flat.roll(-1)], dim=1)[within]
    return pairs[pairs[:, 0] != pairs[:, 1]]


def _expected_groups(group_sizes: Mapping[int, int], total: int, drawn: int) -> float:
    return sum(count * (1 - _none_of(size, total, drawn)) for size, count in group_sizes.items())


def _none_of(size: int, total: int, drawn: int) -> float:
    """C(total - size, drawn) / C(total, drawn)."""
    if total - size < drawn:
        return 0.0
    logarithm = (
        lgamma(total - size + 1) - lgamma(total - size - drawn + 1) - lgamma(total + 1) + lgamma(total - drawn + 1)
    )
    return min(1.0, float(torch.tensor(logarithm, dtype=torch.float64).exp()))


def _share(hits: Tensor, counted: Tensor) -> float:
    return float(hits[counted].double().mean())

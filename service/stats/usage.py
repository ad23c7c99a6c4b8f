"""How the live items of a trie are spread over codewords and over groups of equal codes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from models import Trie


class LevelUse(NamedTuple):
    """How many live items chose each codeword of a level.

    Attributes:
        counts: (K_l,) int64.
    """

    counts: Tensor

    @property
    def used(self) -> int:
        """Codewords that a live item has."""
        return int((self.counts > 0).sum())

    @property
    def entropy(self) -> float:
        """Of the choice, in bits; at most log2 K_l."""
        shares = self.counts[self.counts > 0].double() / max(1, int(self.counts.sum()))
        return max(0.0, float(-(shares * shares.log2()).sum()))

    @property
    def perplexity(self) -> float:
        """So many codewords, equally used, would have the same entropy; 0 where there are no items."""
        return 2.0**self.entropy if self.used else 0.0


class Use(NamedTuple):
    """How a record's codes are used at one revision.

    Attributes:
        revision: Of the record.
        items: Live ones.
        levels: See `LevelUse`.
        group_sizes: How many groups of equal codes have so many live items, by size, ascending.
    """

    revision: int
    items: int
    levels: tuple[LevelUse, ...]
    group_sizes: dict[int, int]

    @property
    def groups(self) -> int:
        """Distinct codes of live items."""
        return sum(self.group_sizes.values())

    @property
    def largest_group(self) -> int:
        """Live items of the most crowded codes."""
        return max(self.group_sizes, default=0)

    @property
    def collision_rate(self) -> float:
        """1 - unique / N, of the codes without suffixes."""
        return 1 - self.groups / self.items if self.items else 0.0


def use_of(trie: Trie) -> Use:
    """How the live items of a trie use its codes; one pass over its edges, from the suffixes up."""
    live = torch.ones_like(trie.numbers[-1])  # items that each edge leads to
    levels: list[LevelUse] = []
    sizes: dict[int, int] = {}
    for level in range(len(trie.codebook_sizes), 0, -1):
        offsets = trie.offsets[level]
        below = torch.cat([live.new_zeros(1), live.cumsum(0)])
        live = below[offsets[1:]] - below[offsets[:-1]]  # a node of this depth is an edge of the level before it
        if level == len(trie.codebook_sizes):
            numbers, counts = live.unique(return_counts=True)
            sizes = dict(zip(numbers.tolist(), counts.tolist(), strict=True))
        counted = torch.zeros(trie.codebook_sizes[level - 1], dtype=torch.int64)
        levels.append(LevelUse(counted.index_add_(0, trie.numbers[level - 1], live)))
    return Use(trie.revision, len(trie.numbers[-1]), tuple(reversed(levels)), sizes)

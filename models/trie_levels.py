"""The levels of a trie in compressed sparse rows: made of sorted rows, searched, and changed.

    changes --> where each stands, or would --> edges that come and go, level by level --> spliced levels

The levels are sorted, so a change needs a binary search a level and no sort of the rest. An edge comes with the first
row beneath it and goes with the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Levels(NamedTuple):
    """The arrays of a trie, a level at a time, as `Trie` describes them."""

    offsets: tuple[Tensor, ...]
    numbers: tuple[Tensor, ...]


class Place(NamedTuple):
    """Where rows stand on one level.

    Attributes:
        edges: (B,) int64, the edge of each row; where it has none, the one before which it belongs.
        found: (B,) bool, whether the numbers up to this level are there.
    """

    edges: Tensor
    found: Tensor


def compressed(rows: Tensor) -> Levels:
    """The levels of sorted distinct rows (N, L + 1)."""
    parents = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    offsets, numbers = [], []
    nodes = 1
    for column, begins in zip(rows.unbind(dim=1), _begins(rows), strict=True):
        offsets.append(_cumulated(torch.bincount(parents[begins], minlength=nodes)))
        numbers.append(column[begins])
        parents = begins.cumsum(dim=0) - 1
        nodes = len(numbers[-1])
    return Levels(tuple(offsets), tuple(numbers))


def settled(rows: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (N, L + 1) sorted, each once, and (N,) bool: what the last of equal ones says of whether it is live."""
    order = torch.arange(len(rows), device=rows.device)
    for column in reversed(range(rows.shape[1])):
        order = order[torch.argsort(rows[order, column], stable=True)]
    rows = rows[order]
    last = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    last[:-1] = (rows[1:] != rows[:-1]).any(dim=1)
    return rows[last], live[order][last]


def places(rows: Tensor, levels: Levels) -> list[Place]:
    """Where rows (B, t) int64 stand on each of the first t levels."""
    nodes = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    found = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    stand: list[Place] = []
    for column, offsets, numbers in zip(rows.unbind(dim=1), *levels, strict=False):
        first = offsets[nodes]
        # What is not there belongs before all that is beneath the next number that is.
        end = torch.where(found, offsets[(nodes + 1).clamp(max=len(offsets) - 1)], first)
        nodes = _lower_bound(numbers, first, end, column)
        found = found & (nodes < end)
        if len(numbers):
            found = found & (numbers[nodes.clamp(max=len(numbers) - 1)] == column)
        stand.append(Place(nodes, found))
    return stand


def updated(levels: Levels, rows: Tensor, live: Tensor) -> Levels:
    """The levels after changes; those in which no edge came or went are the same tensors.

    Args:
        levels: Before.
        rows: (C, L + 1) int64, sorted and distinct.
        live: (C,) bool, whether the row is live now.
    """
    stand = places(rows, levels)
    came = _came(rows, stand, live)
    gone = _gone(levels, stand, came, live)
    offsets, numbers = [], []
    above: _Splice | None = None
    for level, (bounds, values) in enumerate(zip(*levels, strict=True)):
        if not len(came[level]) and not len(gone[level]):
            offsets.append(bounds)
            numbers.append(values)
            above = None
            continue
        counts = bounds.diff()
        if level:
            parents, known = stand[level - 1]
            old = came[level][known[came[level]]]
            new = came[level][~known[came[level]]]
        else:
            parents, old, new = torch.zeros_like(stand[0].edges), came[0], came[0][:0]
        counts.index_add_(0, parents[old], torch.ones_like(old))
        counts.index_add_(0, parents[gone[level]], -torch.ones_like(gone[level]))
        if above is not None:
            under = torch.searchsorted(came[level - 1], new, right=True) - 1
            counts = above(counts, torch.bincount(under, minlength=len(came[level - 1])))
        offsets.append(_cumulated(counts))
        above = _Splice(len(values), stand[level].edges[came[level]], stand[level].edges[gone[level]])
        numbers.append(above(values, rows[came[level], level]))
    return Levels(tuple(offsets), tuple(numbers))


def _came(rows: Tensor, stand: Sequence[Place], live: Tensor) -> list[Tensor]:
    """For each level, a row for each edge that comes: the first beneath it; in order."""
    added = (live & ~stand[-1].found).nonzero().flatten()
    begins = _begins(rows[added])
    return [added[begins[level] & ~place.found[added]] for level, place in enumerate(stand)]


def _gone(levels: Levels, stand: Sequence[Place], came: Sequence[Tensor], live: Tensor) -> list[Tensor]:
    """For each level, a row for each edge that goes: the first beneath it; in order."""
    gone = [(~live & stand[-1].found).nonzero().flatten()]
    for level in reversed(range(len(stand) - 1)):
        (edges, found), offsets, children = stand[level], levels.offsets[level + 1], gone[0]
        parents, lost = torch.unique_consecutive(edges[children], return_counts=True)
        rows = children[lost.cumsum(dim=0) - lost]
        new = came[level + 1]
        gains = torch.isin(parents, edges[new[found[new]]])
        gone.insert(0, rows[(offsets[parents + 1] - offsets[parents] == lost) & ~gains])
    return gone


class _Splice:
    """Takes elements out of an array and puts others in, by one gather; for all arrays of one length."""

    def __init__(self, length: int, before: Tensor, taken: Tensor) -> None:
        """Puts elements before old positions (I,), ascending, and takes out the old positions (R,), ascending."""
        self._length = length + len(before) - len(taken)
        taken_before = torch.searchsorted(taken, before)
        self._inserted = before - taken_before + torch.arange(len(before), device=before.device)
        shift = torch.zeros(self._length + 1, dtype=torch.int64, device=before.device)
        shift.index_add_(0, self._inserted + 1, -torch.ones_like(before))
        closed = taken - torch.arange(len(taken), device=taken.device)
        closed += torch.searchsorted(before, taken, right=True)
        shift.index_add_(0, closed, torch.ones_like(taken))
        self._source = shift[:-1].cumsum(dim=0) + torch.arange(self._length, device=before.device)

    def __call__(self, values: Tensor, inserted: Tensor) -> Tensor:
        """The array with its new elements (I,) in place."""
        if not len(values):
            return inserted
        return values[self._source.clamp_(0, len(values) - 1)].index_copy_(0, self._inserted, inserted)


def _lower_bound(numbers: Tensor, first: Tensor, end: Tensor, wanted: Tensor) -> Tensor:
    """The first edge from `first` up to `end` whose number is not below the wanted one, else `end`."""
    if not len(numbers) or not len(wanted):
        return first
    last = end
    for _ in range(int((end - first).max()).bit_length()):
        middle = (first + last) // 2
        open_ = first < last
        below = open_ & (numbers[middle.clamp(max=len(numbers) - 1)] < wanted)
        first = torch.where(below, middle + 1, first)
        last = torch.where(open_ & ~below, middle, last)
    return first


def _begins(rows: Tensor) -> list[Tensor]:
    """For each level l, (N,) bool: which of sorted rows are the first with their first l + 1 numbers."""
    begins = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    begins[:1] = True
    found = []
    for column in rows.unbind(dim=1):
        begins = begins.clone()
        begins[1:] |= column[1:] != column[:-1]
        found.append(begins)
    return found


def _cumulated(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(dim=0)])

"""Sequences of items as batches for the generator: windows of one length each, so that nothing is padded.

sequences --> without cold items --> windows of at most history + 1 items --> batches of equal length
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Windows(NamedTuple):
    """Parts of sequences, all of one length; the items from `first` on are targets, each after those before it.

    Attributes:
        users: (W,) int64, whose sequence it is: a position.
        items: (W, n) int64, rows of the catalogue, oldest first.
        first: The first target, from 1 to n - 1.
    """

    users: Tensor
    items: Tensor
    first: int

    @property
    def targets(self) -> int:
        """How many targets a window has."""
        return self.items.shape[1] - self.first


class Histories(NamedTuple):
    """Histories of one length.

    Attributes:
        users: (B,) int64 positions.
        items: (B, n) int64 rows of the catalogue, oldest first.
    """

    users: Tensor
    items: Tensor


def windows(sequences: Sequence[Sequence[int]], history: int, *, one_target: bool) -> list[Windows]:
    """All windows in which every item but a sequence's first is a target once, after at most `history` items.

    Args:
        sequences: Rows of the catalogue; a position is a user. One item alone is no target.
        history: Items that a target may be after, at most.
        one_target: A window for each target, its last item. If not, a sequence is cut into as few windows as leave
            each target at least half of the history, or all that it has.

    Returns:
        A group for each length and first target.
    """
    grouped: dict[tuple[int, int], tuple[list[int], list[Sequence[int]]]] = {}
    for user, sequence in enumerate(sequences):
        ends = _ends(len(sequence), history, one_target=one_target)
        before = 1
        for end in ends:
            window = sequence[max(0, end - history - 1) : end]
            users, items = grouped.setdefault((len(window), len(window) - (end - before)), ([], []))
            users.append(user)
            items.append(window)
            before = end
    return [
        Windows(torch.tensor(users), torch.tensor(items), first)
        for (_, first), (users, items) in sorted(grouped.items())
    ]


def _ends(length: int, history: int, *, one_target: bool) -> Iterator[int]:
    """Where windows of a sequence end; the targets of each are those since the end of the one before."""
    if length < 2:
        return
    if one_target:
        yield from range(2, length + 1)
        return
    end = min(length, history + 1)
    yield end
    while end < length:
        end = min(length, end + (history + 1) // 2)
        yield end


def batches(groups: Sequence[Windows], targets: int, generator: torch.Generator) -> Iterator[Windows]:
    """An epoch in random order: every window once, in batches of one length with about so many targets."""
    drawn: list[tuple[int, Tensor]] = []
    for number, group in enumerate(groups):
        order = torch.randperm(len(group.users), generator=generator)
        drawn += [(number, rows) for rows in order.split(max(1, targets // group.targets))]
    for place in torch.randperm(len(drawn), generator=generator).tolist():
        number, rows = drawn[place]
        users, items, first = groups[number]
        yield Windows(users[rows], items[rows], first)


def histories(sequences: Sequence[Sequence[int]], users: Tensor, history: int, batch_rows: int) -> Iterator[Histories]:
    """The last items of some users' sequences, in batches of one length.

    Args:
        sequences: Rows of the catalogue, by user.
        users: (U,) int64, positions; each of them has at least one item.
        history: Items, at most.
        batch_rows: Users of a batch, at most.
    """
    by_length: dict[int, list[int]] = {}
    for user in users.tolist():
        by_length.setdefault(min(history, len(sequences[user])), []).append(user)
    for length, chosen in sorted(by_length.items()):
        for rows in torch.tensor(chosen).split(batch_rows):
            yield Histories(rows, torch.tensor([sequences[user][-length:] for user in rows.tolist()]))

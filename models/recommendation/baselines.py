"""Recommenders that cost nothing, to see beside: what a generator has to be better than."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

BATCH_USERS = 128


def by_popularity(sequences: Sequence[Sequence[int]], items: int, count: int) -> Tensor:
    """The items (count,) int64 that most sequences of rows have, of `items` rows; ties go to the lowest row."""
    chosen = torch.tensor([row for sequence in sequences for row in set(sequence)], dtype=torch.int64)
    return torch.bincount(chosen, minlength=items).sort(descending=True, stable=True).indices[:count]


def by_last_item(sequences: Sequence[Sequence[int]], histories: Sequence[Sequence[int]], popular: Tensor) -> Tensor:
    """For each history, the items (H, count) int64 most often right after its last one, then popular ones.

    Args:
        sequences: Rows of the catalogue, what is counted.
        histories: At least one item each.
        popular: (count,) int64, see `by_popularity`.
    """
    after: dict[int, Counter[int]] = {}
    for sequence in sequences:
        for row, following in pairwise(sequence):
            after.setdefault(row, Counter())[following] += 1
    filling = popular.tolist()
    found = []
    for history in histories:
        nearest = [row for row, _ in after.get(history[-1], Counter()).most_common(len(filling))]
        found.append((nearest + [row for row in filling if row not in nearest])[: len(filling)])
    return torch.tensor(found, dtype=torch.int64)


@torch.inference_mode()
def by_co_occurrence(
    sequences: Sequence[Sequence[int]], histories: Sequence[Sequence[int]], items: int, count: int
) -> Tensor:
    """Item-kNN: for each history, the items (H, count) int64 nearest to its items, none of them among these.

    The similarity of two items is the cosine of which sequences they are in; those to a history's items are added up.
    """
    pairs = sorted({(user, row) for user, sequence in enumerate(sequences) for row in sequence})
    places = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T
    sizes = torch.bincount(places[1], minlength=items).clamp_min(1).float()
    shares = sizes[places[1]].rsqrt()
    chosen = torch.sparse_coo_tensor(places, shares, (len(sequences), items), check_invariants=False).coalesce()
    found = []
    for start in range(0, len(histories), BATCH_USERS):
        batch = histories[start : start + BATCH_USERS]
        asked = torch.zeros(items, len(batch))
        for column, history in enumerate(batch):
            asked[list(history), column] = 1.0
        near = torch.sparse.mm(chosen.t(), torch.sparse.mm(chosen, asked))
        found.append(near.masked_fill_(asked > 0, -1.0).T.topk(min(count, items), dim=1).indices)
    return torch.cat(found)


@torch.inference_mode()
def by_content(embeddings: Tensor, histories: Sequence[Sequence[int]], among: Tensor, count: int) -> Tensor:
    """For each history, the items (H, count) int64 whose embeddings are nearest to the mean of its items', by cosine.

    A history's own items, which are nearest to themselves, come last.

    Args:
        embeddings: (N, D) float, of each row of the catalogue.
        histories: At least one item each.
        among: (A,) int64, the rows that may be found.
        count: How many; fewer where there are not so many rows.
    """
    directions = torch.nn.functional.normalize(embeddings, dim=1)
    found = []
    for start in range(0, len(histories), BATCH_USERS):
        batch = histories[start : start + BATCH_USERS]
        asked = torch.stack([directions[list(history)].mean(dim=0) for history in batch])
        near = asked @ directions[among].T
        for row, history in enumerate(batch):
            near[row, torch.isin(among, torch.tensor(history))] = -torch.inf
        found.append(among[near.topk(min(count, len(among)), dim=1).indices])
    return torch.cat(found)

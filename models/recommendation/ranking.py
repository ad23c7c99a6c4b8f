"""Recall and NDCG of rankings that have one right answer each."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

CUTOFFS = (5, 10)
ABSENT = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class Ranking:
    """How well the right answers were ranked.

    Attributes:
        users: How many rankings.
        recall: At each cutoff k, the share of the users whose answer is among the first k.
        ndcg: At each cutoff k, the mean of 1 / log2(rank + 1) over all users, rank from 1, 0 beyond k.
        error: Standard error of recall at the last cutoff, from the draw of users alone.
    """

    users: int
    recall: dict[int, float]
    ndcg: dict[int, float]
    error: float


def ranks(found: Tensor, wanted: Tensor) -> Tensor:
    """The place (B,) int64 of each answer, from 0; ABSENT where it is not there.

    Args:
        found: (B, k, ...) int64, best first.
        wanted: (B, ...) int64.
    """
    hits = (found == wanted[:, None]).flatten(2).all(dim=2) if found.ndim > 2 else found == wanted[:, None]
    return torch.where(hits.any(dim=1), hits.int().argmax(dim=1), ABSENT)


def ranking(places: Tensor, cutoffs: tuple[int, ...] = CUTOFFS) -> Ranking:
    """The measures of places (U,) int64 from 0, see `ranks`."""
    users = len(places)
    recall = {k: float((places < k).double().mean()) if users else math.nan for k in cutoffs}
    gain = 1 / (places.double().clamp(max=1e15) + 2).log2()
    ndcg = {k: float(gain.where(places < k, 0.0).mean()) if users else math.nan for k in cutoffs}
    last = recall[cutoffs[-1]]
    return Ranking(users, recall, ndcg, math.sqrt(last * (1 - last) / users) if users else math.nan)

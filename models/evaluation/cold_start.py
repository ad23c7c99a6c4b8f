"""Cold start: what becomes of items that a tokenizer never saw, among those that it did."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.evaluation.neighbours import nearest
from models.evaluation.prefixes import PrefixGroups


@dataclass(frozen=True)
class ColdStart:
    """Unseen items beside seen ones. Each pair holds first the figure of unseen items, then that of seen ones.

    Attributes:
        unseen: How many unseen items.
        seen: How many seen items the catalogue has.
        queries: So many of either were asked for their neighbours.
        nearest_shares: How often the embedding's nearest other seen item shares the first 1, 2, ..., L codes.
        neighbours_share: The same of the 10 nearest.
        colliding: Share of the items that share all codes with another of the catalogue.
        quantization_error: Mean |z - q|^2.
        beyond_training: Share of the items whose quantization error exceeds the training's 95% quantile: 5% where they
            are like what was trained on. None where the manifest does not tell it.
    """

    unseen: int
    seen: int
    queries: tuple[int, int]
    nearest_shares: tuple[tuple[float, ...], tuple[float, ...]]
    neighbours_share: tuple[tuple[float, ...], tuple[float, ...]]
    colliding: tuple[float, float]
    quantization_error: tuple[float, float]
    beyond_training: tuple[float, float] | None


def cold_start(
    groups: PrefixGroups,
    embeddings: Tensor,
    errors: Tensor,
    unseen: Tensor,
    *,
    sample: int,
    training_q95: float | None = None,
    seed: int = 0,
) -> ColdStart | None:
    """Measure unseen items beside seen ones.

    Args:
        groups: Of the N items.
        embeddings: (N, D) float32.
        errors: (N,) float, quantization errors.
        unseen: (N,) bool.
        sample: Items of either kind that are asked for their neighbours, at most.
        training_q95: The 95% quantile of the training's quantization error.
        seed: Of the sample.

    Returns:
        None where there is no unseen item, or fewer than two seen ones.
    """
    kinds = [mask.nonzero().flatten() for mask in (unseen, ~unseen)]
    if not len(kinds[0]) or len(kinds[1]) < 2:
        return None
    generator = torch.Generator().manual_seed(seed)
    colliding = (groups.sizes(groups.depths) > 1).double()
    shares = []
    queries = [rows[torch.randperm(len(rows), generator=generator)[:sample]] for rows in kinds]
    for rows in queries:
        neighbours = nearest(embeddings, rows, among=kinds[1])
        shared = (groups.numbers[neighbours] == groups.numbers[rows][:, None]).double()
        shares.append((tuple(shared[:, 0].mean(dim=0).tolist()), tuple(shared.mean(dim=(0, 1)).tolist())))
    return ColdStart(
        unseen=len(kinds[0]),
        seen=len(kinds[1]),
        queries=(len(queries[0]), len(queries[1])),
        nearest_shares=(shares[0][0], shares[1][0]),
        neighbours_share=(shares[0][1], shares[1][1]),
        colliding=_of_both(colliding, kinds),
        quantization_error=_of_both(errors, kinds),
        beyond_training=None if training_q95 is None else _of_both((errors > training_q95).double(), kinds),
    )


def _of_both(values: Tensor, kinds: list[Tensor]) -> tuple[float, float]:
    return float(values[kinds[0]].double().mean()), float(values[kinds[1]].double().mean())

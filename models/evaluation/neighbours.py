"""Neighbours kept: whether what lies near in the embedding shares a prefix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.evaluation.prefixes import PrefixGroups

NEIGHBOURS = 10
NEAREST_BY_PREFIX = 100

# Distances held at once.
DISTANCES = 2**24

# Items held at once beside the queries.
BLOCK_ROWS = 65_536


@dataclass(frozen=True)
class NeighboursKept:
    """How many of the embedding's nearest items share a prefix.

    Attributes:
        queries: Items whose neighbours were searched, exactly, among all others.
        recall: Share of the 10 nearest that share the item's first 1, 2, ..., L codes.
        set_size: Mean number of other items that share them: the recall of a larger set is larger by itself.
        random: Recall expected of a random set of the same size as each item's.
        of_nearest_by_prefix: Recall of the `NEAREST_BY_PREFIX` items that share the longest prefix, ties by lot (the
            expectation). One set size for all, so this compares tokenizers.
    """

    queries: int
    recall: tuple[float, ...]
    set_size: tuple[float, ...]
    random: tuple[float, ...]
    of_nearest_by_prefix: float


@torch.inference_mode()
def nearest(embeddings: Tensor, queries: Tensor, among: Tensor | None = None, count: int = NEIGHBOURS) -> Tensor:
    """The nearest other items of each query by Euclidean distance, exactly.

    Args:
        embeddings: (N, D) float32.
        queries: (Q,) int64 rows.
        among: (n,) int64 rows that are searched; all where None. A query is never its own neighbour.
        count: How many.

    Returns:
        (Q, min(count, n or n - 1)) int64 rows, the nearest first.
    """
    among = torch.arange(len(embeddings)) if among is None else among
    # Centred: the expanded square would lose its digits to an offset.
    centre = embeddings[among[:: max(1, len(among) // 10_000)]].mean(dim=0)
    asked = embeddings[queries] - centre
    kept = min(count, len(among) - int(torch.isin(queries, among).any()))
    distances = torch.full((len(queries), kept), torch.inf)
    found = torch.zeros(len(queries), kept, dtype=torch.int64)
    for block in among.split(BLOCK_ROWS):
        others = embeddings[block] - centre
        norms = others.square().sum(dim=1)
        for start in range(0, len(queries), max(1, DISTANCES // len(block))):
            rows = slice(start, start + max(1, DISTANCES // len(block)))
            here = torch.addmm(norms, asked[rows], others.T, alpha=-2)
            here.masked_fill_(queries[rows, None] == block, torch.inf)
            both = torch.cat([distances[rows], here], dim=1)
            distances[rows], places = both.topk(kept, largest=False)
            found[rows] = torch.cat([found[rows], block.expand(len(here), -1)], dim=1).gather(1, places)
    return found


def neighbours_kept(groups: PrefixGroups, queries: Tensor, neighbours: Tensor) -> NeighboursKept:
    """What prefixes keep of the neighbours (Q, k) int64 of the queries (Q,) int64, rows of the N items of groups."""
    shared = (groups.numbers[neighbours] == groups.numbers[queries][:, None]).double()
    hits = shared.sum(dim=1)
    sizes = torch.stack([groups.sizes(depth)[queries] - 1 for depth in range(1, groups.depths + 1)], dim=1).double()
    others = len(groups.numbers) - 1
    return NeighboursKept(
        queries=len(queries),
        recall=tuple(shared.mean(dim=(0, 1)).tolist()),
        set_size=tuple(sizes.mean(dim=0).tolist()),
        random=tuple((sizes.mean(dim=0) / max(1, others)).tolist()),
        of_nearest_by_prefix=float(_hits_within(hits, sizes, others, neighbours.shape[1]).mean()) / neighbours.shape[1],
    )


def _hits_within(hits: Tensor, sizes: Tensor, others: int, neighbours: int) -> Tensor:
    """Expected neighbours (Q,) among the first `NEAREST_BY_PREFIX` items by shared prefix.

    The sets S_L within ... within S_1 within all others nest. Those that fit are taken whole, of the next ring as many
    as there is room for, by lot: hits + room / |ring| x hits in the ring.
    """
    room = torch.full_like(sizes[:, 0], float(min(NEAREST_BY_PREFIX, others)))
    found = torch.zeros_like(room)
    inner_hits, inner_size = torch.zeros_like(room), torch.zeros_like(room)
    rings = [(hits[:, level], sizes[:, level]) for level in reversed(range(hits.shape[1]))]
    rings.append((torch.full_like(room, float(neighbours)), torch.full_like(room, float(others))))
    for ring_hits, ring_size in rings:
        size = ring_size - inner_size
        share = (room / size.clamp_min(1)).clamp(max=1)
        found += share * (ring_hits - inner_hits)
        room = (room - size).clamp_min(0)
        inner_hits, inner_size = ring_hits, ring_size
    return found

"""Item embeddings from co-occurrence: a truncated SVD of positive pointwise mutual information (PPMI).

With n(i, j) how often j is chosen at most w steps before or after i, and sums over rows written n(i):

    PPMI(i, j) = max(0, log (n(i, j) n^a / (n(i) n(j)^a)))     n^a the sum of n(j)^a over j
    PPMI ~ U diag(s) V^T,   E = U diag(s)^p                    the c largest singular values

What skip-gram with negative sampling learns step by step is such a factorisation (Levy and Goldberg, NeurIPS 2014);
a below 1 keeps rare items from looking too close to whatever they occurred with, and p below 1 does better than 1
(Levy, Goldberg and Dagan, TACL 2015). It knows no order and takes seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

OVERSAMPLED = 16
ITERATIONS = 6


@dataclass(frozen=True)
class PPMIConfig:
    """Hyper-parameters of PPMI and SVD.

    Attributes:
        width: c.
        window: w.
        smoothing: a.
        power: p.
        seed: Of the randomised SVD.
    """

    width: int = 32
    window: int = 5
    smoothing: float = 0.75
    power: float = 0.5
    seed: int = 0


def ppmi_embeddings(sequences: Sequence[tuple[int, ...]], items: int, config: PPMIConfig) -> Tensor:
    """Item embeddings E.

    Args:
        sequences: Rows of items, in order; rows are below `items`.
        items: N.
        config: Hyper-parameters.

    Returns:
        (N, c) float32; zeros where an item never occurs with another. Columns beyond N are zeros.

    Raises:
        ValueError: No two items occur together.
    """
    associations = ppmi(sequences, items, config)
    rank = min(config.width + OVERSAMPLED, items)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        left, values, _ = torch.svd_lowrank(associations, q=rank, niter=ITERATIONS)
    kept = min(config.width, rank)
    embeddings = torch.zeros(items, config.width)
    embeddings[:, :kept] = left[:, :kept] * values[:kept].clamp_min(0).pow(config.power)
    return embeddings


def ppmi(sequences: Sequence[tuple[int, ...]], items: int, config: PPMIConfig) -> Tensor:
    """PPMI, (N, N) float32, sparse and of symmetric counts.

    Raises:
        ValueError: No two items occur together.
    """
    pairs, counts = cooccurrences(sequences, items, config.window)
    if not len(counts):
        raise ValueError("no two items occur together in a user's interactions")
    first, second = pairs.div(items, rounding_mode="floor"), pairs % items
    occurrences = torch.zeros(items, dtype=torch.float64).index_add_(0, first, counts)
    smoothed = occurrences.pow(config.smoothing)
    information = (counts * smoothed.sum() / (occurrences[first] * smoothed[second])).log()
    positive = information > 0
    indices = torch.stack([first[positive], second[positive]])
    return torch.sparse_coo_tensor(
        indices, information[positive].float(), (items, items), check_invariants=False
    ).coalesce()


def cooccurrences(sequences: Sequence[tuple[int, ...]], items: int, window: int) -> tuple[Tensor, Tensor]:
    """How often two items are chosen by one user within a window, in either order; an item with itself does not count.

    Returns:
        Distinct pairs (P,) int64 as i N + j, ascending, and their counts (P,) float64.
    """
    rows = torch.tensor([row for sequence in sequences for row in sequence], dtype=torch.int64)
    users = torch.repeat_interleave(torch.tensor([len(sequence) for sequence in sequences], dtype=torch.int64))
    found = []
    for distance in range(1, window + 1):
        first, second = rows[:-distance], rows[distance:]
        together = (users[:-distance] == users[distance:]) & (first != second)
        first, second = first[together], second[together]
        found += [first * items + second, second * items + first]
    pairs, counts = torch.cat(found).unique(return_counts=True)
    return pairs, counts.double()

"""A linear start for the encoder network: the directions along which near neighbours differ.

Principal components keep what tells domains apart; a catalogue of one domain then fills few cells of them and its
items collide. Differences of near neighbours are alike in every domain, so directions that hold those also part
items of a domain that was never seen. With G the covariance and S the mean of dd^T/|d|^2 over the differences d of
near neighbours, both scaled to trace 1, M = (1 - a) G + a S = V diag(e) V^T:

    z = diag(e_1..d)^(-w/2) V_1..d^T (x - mean)      w = 0 keeps the variances, 1 makes them equal (of M)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from models.chunks import CHUNK_BYTES

QUERY_ROWS = 1024


@dataclass(frozen=True)
class ProjectionConfig:
    """What the projection keeps.

    Attributes:
        local: a, share of the neighbours' differences.
        whitening: w.
        pool_rows: Rows among which neighbours are sought; drawn by weight.
        query_rows: Rows whose neighbours are sought.
        neighbours: Of each query row.
    """

    local: float = 1.0
    whitening: float = 0.5
    pool_rows: int = 40_000
    query_rows: int = 8_000
    neighbours: int = 10


class Centred(NamedTuple):
    """Rows of embeddings less their mean; they are computed when they are looked at.

    Attributes:
        embeddings: (M, D) float32.
        rows: (N,) int64, which of them.
        centre: (D,) float32.
    """

    embeddings: Tensor
    rows: Tensor
    centre: Tensor

    def some(self, places: Tensor | slice) -> Tensor:
        """Those at some places, (n, D)."""
        return self.embeddings[self.rows[places]] - self.centre


def projection(
    centred: Centred, weights: Tensor, latent: int, config: ProjectionConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The map into the latent space and its least-squares inverse.

    Args:
        centred: N rows, of weighted mean 0.
        weights: (N,) float, what each row counts.
        latent: d, at most D.
        config: What to keep.
        generator: Of the rows drawn.

    Returns:
        (d, D) and (D, d) float32; the second minimises the weighted squared error of the rebuilt rows.

    Raises:
        ValueError: d exceeds D, or float32 holds no difference between the rows.
    """
    width = centred.embeddings.shape[1]
    if latent > width:
        msg = f"a projection of {width} numbers cannot have {latent}"
        raise ValueError(msg)
    covariance = torch.zeros(width, width, dtype=torch.float64, device=centred.embeddings.device)
    share = weights / weights.sum()
    step = max(1, CHUNK_BYTES // (4 * width))
    for start in range(0, len(centred.rows), step):
        chunk = centred.some(slice(start, start + step))
        covariance += (chunk * share[start : start + step, None]).T.double() @ chunk.double()
    mixed = (1 - config.local) * covariance / covariance.trace().clamp_min(1e-12)
    if config.local > 0:
        mixed = mixed + config.local * _local_scatter(centred, weights, config, generator)
    if not float(mixed.trace()) > 0:
        # No two neighbours differ, as far as float32 tells: there is only the covariance to go by.
        mixed = covariance
    if not bool(mixed.isfinite().all()) or not float(mixed.trace()) > 0:
        msg = "the embeddings that are trained on differ too little, or are too large, for a projection in float32"
        raise ValueError(msg)
    values, vectors = torch.linalg.eigh(mixed)
    values, vectors = values.flip(0)[:latent], vectors.flip(1)[:, :latent]
    # Directions without any variance would be blown up to infinity; they carry nothing.
    scales = values.clamp_min(float(values[0]) * 1e-6).pow(-config.whitening / 2)
    down = (vectors * scales).T
    down = down / (down @ covariance @ down.T).trace().clamp_min(1e-12).sqrt()
    gram = down @ covariance @ down.T
    up = covariance @ down.T @ torch.linalg.pinv(gram, hermitian=True)
    return down.float(), up.float()


def _local_scatter(centred: Centred, weights: Tensor, config: ProjectionConfig, generator: torch.Generator) -> Tensor:
    """S: (D, D) float64, of trace 1."""
    pool = draw_rows(weights, min(config.pool_rows, len(centred.rows)), generator).unique()
    rows = centred.some(pool)
    queries = torch.randperm(len(rows), generator=generator)[: config.query_rows]
    scatter = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    count = min(config.neighbours + 1, len(rows))
    norms = rows.square().sum(dim=1)
    for chunk in queries.split(QUERY_ROWS):
        near = torch.addmm(norms, rows[chunk], rows.T, alpha=-2).topk(count, largest=False).indices
        differences = (rows[chunk][:, None] - rows[near]).flatten(0, 1)
        # The row itself and its equals have no direction.
        lengths = differences.norm(dim=1, keepdim=True)
        directions = torch.where(lengths > 1e-4, differences / lengths.clamp_min(1e-4), 0.0)
        scatter += (directions.T @ directions).double()
    return scatter / scatter.trace().clamp_min(1e-12)


def draw_rows(weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Row numbers (count,) int64 drawn with their weight as probability, with replacement."""
    cumulative = weights.double().cumsum(dim=0)
    thresholds = torch.rand(count, generator=generator, dtype=torch.float64) * cumulative[-1]
    return torch.searchsorted(cumulative, thresholds, right=True).clamp_max(len(weights) - 1)

"""Mini-batch k-means, level by level on residuals: one batch of rows is in memory, however many there are.

Sculley, Web-Scale K-Means Clustering (WWW 2010): with m_k what the rows of a batch nearest to codeword k weigh and x_k
their weighted mean, and v_k what all rows it ever received weigh,

    v_k <- v_k + m_k        c_k <- c_k + m_k / v_k (x_k - c_k)

so that a codeword is the mean of what it received. Each pass takes the rows in a new order. Residual k-means (RK-Means)
clusters so what the levels before leave over, computed anew of each batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from models.residual import ResidualQuantizer
from models.training.codebooks import ROUNDING
from models.training.kmeans import assign, plus_plus

# k-means++ looks at so many rows for each codeword, and at a batch at least.
SEEDING_ROWS_PER_CODEWORD = 8


@dataclass(frozen=True)
class MiniBatchConfig:
    """How the batches of mini-batch k-means are taken.

    Attributes:
        starts: So many k-means++ starts, of which the one that serves the rows it was drawn from best goes on.
        batch_rows: Rows of a batch.
        passes: Over all rows for each level, at most.
        tolerance: Stop where the inertia of a pass is less than this share of itself below the last one's.
        memory: What is left of each v_k at the start of a pass: 1 is Sculley's rule; less forgets rows of the passes
            before, of which a codeword that has moved since would receive others.
        restart: A codeword that received less than this share of an even one's in a pass restarts at a row that is
            served badly; 0: none does.
    """

    starts: int = 1
    batch_rows: int = 4096
    passes: int = 20
    tolerance: float = 1e-3
    memory: float = 0.5
    restart: float = 0.1


@torch.no_grad()
def minibatch_residuals(
    quantizer: ResidualQuantizer,
    latents: Callable[[Tensor], Tensor],
    weights: Tensor,
    config: MiniBatchConfig,
    generator: torch.Generator,
    *,
    block_rows: int = 1,
) -> None:
    """Fit each level of a residual quantizer to what it receives.

    Args:
        quantizer: Its codebooks are written.
        latents: The latents (n, d) float32 of row numbers (n,) int64 among N.
        weights: (N,) float, not negative, what each row counts.
        config: Of each level.
        generator: Of the orders and the random starts.
        block_rows: Rows that follow each other are drawn in blocks of so many, which a disk reads at once.
    """
    sample = latents(_seeding_rows(weights, quantizer.codebook_sizes[0], config, generator))
    rounding = ROUNDING * float(sample.square().sum(dim=1).mean().sqrt())
    for level, codebook in enumerate(quantizer.codebooks):
        received = _Received(latents, quantizer, level, rounding) if level else latents
        codebook.copy_(minibatch_kmeans(received, len(codebook), weights, config, generator, block_rows=block_rows))
    quantizer.initialised.fill_(value=True)


class _Received:
    """What a level other than the first receives of rows; the levels before it are fitted."""

    def __init__(
        self, latents: Callable[[Tensor], Tensor], quantizer: ResidualQuantizer, level: int, rounding: float
    ) -> None:
        self._latents = latents
        self._rounding = rounding
        self._before = ResidualQuantizer(quantizer.codebook_sizes[:level], quantizer.dimension)
        for own, fitted in zip(self._before.codebooks, quantizer.codebooks, strict=False):
            own.copy_(fitted)
        self._before.prepare()

    def __call__(self, rows: Tensor) -> Tensor:
        residuals = self._before.quantize(self._latents(rows)).residuals[:, -1]
        # What rounding left is nothing, see `models.training.codebooks`.
        return torch.where(residuals.norm(dim=1, keepdim=True) > self._rounding, residuals, 0.0)


@torch.no_grad()
def minibatch_kmeans(
    points: Callable[[Tensor], Tensor],
    size: int,
    weights: Tensor,
    config: MiniBatchConfig,
    generator: torch.Generator,
    *,
    block_rows: int = 1,
) -> Tensor:
    """A codebook (K, d) float32 of points that are read batch by batch, from a k-means++ start on some of them.

    Args:
        points: The points (n, d) float32 of row numbers (n,) int64 among N.
        size: K.
        weights: (N,) float, not negative, what each row counts; not all zero.
        config: Of the batches.
        generator: Of the orders and the random start.
        block_rows: As of `minibatch_residuals`.

    Raises:
        ValueError: A number is not finite.
    """
    rows = _seeding_rows(weights, size, config, generator)
    sample = points(rows)
    if not bool(sample.isfinite().all()):
        raise ValueError("k-means needs finite points")
    centre = sample.mean(dim=0)
    starts = [plus_plus(sample, centre, size, weights[rows], generator) for _ in range(config.starts)]
    best = (
        min(starts, key=lambda start: float(assign(sample, start, centre)[1] @ weights[rows]))
        if starts[1:]
        else starts[0]
    )
    codebook = (best + centre).double()
    total = torch.zeros(size, dtype=torch.float64)
    previous = float("inf")
    for number in range(config.passes):
        total *= config.memory
        mass, inertia = torch.zeros_like(total), 0.0
        for rows in _batches(len(weights), config.batch_rows, block_rows, generator):
            batch, counts = points(rows), weights[rows].double()
            codes, distances = assign(batch, codebook.to(batch))
            here = torch.zeros_like(total).index_add_(0, codes, counts)
            sums = torch.zeros_like(codebook).index_add_(0, codes, batch.double() * counts[:, None])
            mass += here
            total += here
            codebook += (sums - here[:, None] * codebook) / total.clamp_min(torch.finfo(total.dtype).tiny)[:, None]
            inertia += float((distances.double() * counts).sum())
        dead = mass < config.restart * mass.mean()
        if number == config.passes - 1 or (previous - inertia <= config.tolerance * inertia and not bool(dead.any())):
            break
        previous = inertia
        chances = distances.double() * counts
        if bool(dead.any()) and float(chances.sum()) > 0:
            codebook[dead] = _drawn(batch, chances, int(dead.sum()), generator)
            total[dead] = 0.0
    return codebook.float()


def _seeding_rows(weights: Tensor, size: int, config: MiniBatchConfig, generator: torch.Generator) -> Tensor:
    """Row numbers (n,) to start from, none twice, of positive weight."""
    count = max(config.batch_rows, SEEDING_ROWS_PER_CODEWORD * size)
    rows = torch.randperm(len(weights), generator=generator)
    rows = rows[: 2 * count][weights[rows[: 2 * count]] > 0][:count]
    return rows if len(rows) else weights.argmax()[None]


def _batches(rows: int, batch_rows: int, block_rows: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Row numbers (n,) of batches of about one size, each row once, blocks of neighbours in random order."""
    blocks = torch.randperm(-(-rows // block_rows), generator=generator)
    for part in blocks.tensor_split(max(1, round(rows / batch_rows))):
        batch = (part.sort().values[:, None] * block_rows + torch.arange(block_rows)).flatten()
        if len(batch := batch[batch < rows]):
            yield batch


def _drawn(batch: Tensor, chances: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Rows (count, d) of a batch (n, d), drawn by their chances (n,)."""
    return batch[torch.multinomial(chances, count, replacement=True, generator=generator)].double()

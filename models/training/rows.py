"""Rows that are trained on, rows that are held out, and what both fits draw from the former alone."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from models.chunks import all_equal, squared_distances, weighted_sum
from models.training.spool import in_reading_order

# Rows that are held out at most: more do not measure better.
HELD_OUT_ROWS = 5_000


class Rows(NamedTuple):
    """Embeddings, and which of them are trained on.

    Attributes:
        embeddings: (N, D) float32.
        weights: (N,) float32, what each row counts.
        held_out: (H,) int64, row numbers that decide when to stop and are not trained on.
        training: (N - H,) int64, the others, in the order in which they are read best.
        centre: (D,) float32, the weighted mean of the training rows.
        variance: Of the training rows, summed over features, weighted.
    """

    embeddings: Tensor
    weights: Tensor
    held_out: Tensor
    training: Tensor
    centre: Tensor
    variance: float

    @property
    def counting(self) -> Tensor:
        """What each row counts (N,), 0 where it is held out."""
        return self.weights.index_fill(0, self.held_out, 0.0)

    @property
    def measured(self) -> Tensor:
        """The rows that a fit is measured on: those held out, or some of the others where none are."""
        return self.held_out if len(self.held_out) else self.training[:HELD_OUT_ROWS]

    def batch(self, rows: Tensor, device: torch.device) -> Tensor:
        """Embeddings (n, D) float32 of row numbers (n,), on a device."""
        batch = self.embeddings[rows]
        return batch.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else batch


def drawn_rows(embeddings: Tensor, weights: Tensor | None, held_out: float, generator: torch.Generator) -> Rows:
    """Draw the rows that are held out.

    Args:
        embeddings: (N, D) float32, finite.
        weights: (N,) float; equal where None.
        held_out: The share of the rows that is held out, `HELD_OUT_ROWS` at most; 2 rows at least are trained on.
        generator: Draws them.

    Raises:
        ValueError: There are too few rows, they are all equal, or too large for float32.
    """
    if len(embeddings) < 2:
        raise ValueError(f"training needs at least 2 items that differ, got {len(embeddings)}")
    if all_equal(embeddings):
        raise ValueError(f"training needs items that differ: all {len(embeddings):,} have the same embedding")
    weights = torch.ones(1).expand(len(embeddings)) if weights is None else weights.float()
    order = torch.randperm(len(embeddings), generator=generator)
    count = min(HELD_OUT_ROWS, round(held_out * len(embeddings)), len(embeddings) - 2)
    out, training = order[:count].clone(), in_reading_order(order[count:], embeddings)
    del order
    share = weights.index_fill(0, out, 0.0)
    share /= share.sum()
    centre = weighted_sum(embeddings, share)
    variance = float(squared_distances(embeddings, centre).mul_(share).sum().clamp_min(1e-12))
    if not math.isfinite(variance):
        raise ValueError(f"the variance of the embeddings is {variance}: not finite, or too large for float32")
    return Rows(embeddings, weights, out, training, centre, variance)

"""Codebooks that follow the residuals they receive, without a gradient: exponential moving averages.

Van den Oord et al., Neural Discrete Representation Learning (2017), appendix A.1, for each codeword i of a level, with
n_i the rows of a batch that chose it, r_j what the level receives of them, g the decay:

    N_i <- g N_i + (1 - g) n_i
    m_i <- g m_i + (1 - g) sum_j r_j
    e_i  = m_i / N'_i        N'_i = (N_i + s) N / (N + K s),   N = sum_i N_i

N' is Laplace's smoothing: a codeword that nobody chooses for long is divided by no zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from models.quantizer import Quantization


@dataclass(frozen=True)
class EMAConfig:
    """How fast codebooks follow.

    Attributes:
        decay: g, of a batch.
        smoothing: s, in rows.
    """

    decay: float = 0.99
    smoothing: float = 1e-5

    def check(self) -> None:
        """Refuse averages that are none.

        Raises:
            ValueError: Says which setting is wrong.
        """
        if not 0 <= self.decay < 1 or not self.smoothing > 0:
            raise ValueError(f"ema.decay must be from 0 to below 1 and ema.smoothing above 0, not {self}")


class RunningCodebooks(nn.Module):
    """The running counts N (K_l,) and sums m (K_l, d) of every level, as buffers: they are state of a training.

    Args:
        codebook_sizes: K_l for each level.
        dimension: d.
        config: How fast they follow.
    """

    def __init__(self, codebook_sizes: Sequence[int], dimension: int, config: EMAConfig) -> None:
        super().__init__()
        config.check()
        self.config = config
        for level, size in enumerate(codebook_sizes):
            self.register_buffer(f"counts_{level}", torch.zeros(size))
            self.register_buffer(f"sums_{level}", torch.zeros(size, dimension))

    @torch.no_grad()
    def start(self, level: int, codebook: Tensor, counts: Tensor, batch_rows: int) -> None:
        """Take over a codebook (K_l, d) that rows chose so many times (K_l,), as if batches had been like that."""
        shares = counts.to(codebook) / counts.sum().clamp_min(1)
        self._counts(level).copy_(shares * batch_rows)
        self._sums(level).copy_(codebook * self._counts(level)[:, None])

    @torch.no_grad()
    def follow(self, codebooks: Iterable[Tensor], quantization: Quantization) -> None:
        """Move the codebooks by what a batch chose and what its levels received."""
        keep, smoothing = self.config.decay, self.config.smoothing
        for level, codebook in enumerate(codebooks):
            counts, sums = self._counts(level), self._sums(level)
            codes, received = quantization.codes[:, level], quantization.residuals[:, level].detach().to(sums)
            # A product of matrices: adding by index has no fixed order on a GPU.
            choices = one_hot(codes, len(counts)).to(sums)
            counts.mul_(keep).add_(choices.sum(dim=0), alpha=1 - keep)
            sums.mul_(keep).add_(choices.T @ received, alpha=1 - keep)
            total = counts.sum()
            smoothed = (counts + smoothing) * total / (total + len(counts) * smoothing)
            codebook.copy_(sums / smoothed[:, None])

    @torch.no_grad()
    def restart(self, level: int, dead: Tensor, codebook: Tensor) -> None:
        """Codewords that were moved, (K_l,) bool, count as if each had had an equal share of the rows."""
        counts = self._counts(level)
        counts[dead] = counts.mean()
        self._sums(level)[dead] = codebook[dead] * counts[dead][:, None]

    def _counts(self, level: int) -> Tensor:
        return self.get_buffer(f"counts_{level}")

    def _sums(self, level: int) -> Tensor:
        return self.get_buffer(f"sums_{level}")

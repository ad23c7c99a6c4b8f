"""The contract every family of quantizers keeps, and the nearest codeword they all search.

A quantizer turns latents into codes and codes back into latents. It knows nothing of texts, items or suffixes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

# Distances closer than this (relative to the larger one) are one distance: the lowest index wins. float64 rounds at
# 1e-16, so contrived ties (symmetric codebooks) resolve alike on every processor.
TIE_TOLERANCE = 1e-12


class NearestCodeword(NamedTuple):
    """The nearest codeword of each residual.

    Attributes:
        code: (B,) int64.
        margin: (B,) float, the residual's distance to the plane midway between the nearest and the second codeword,
            `(d2 - d1) / (2 |c1 - c2|)` with squared distances. A latent error of norm e cannot change the code while
            the margin exceeds e. Infinite where the codebook has one codeword.
    """

    code: Tensor
    margin: Tensor


class Quantization(NamedTuple):
    """What a quantizer makes of a batch of latents.

    Attributes:
        codes: (B, L) int64.
        margins: (B, L) float, see `NearestCodeword.margin`.
        residuals: (B, L + 1, d) float; `[:, l]` is what level l receives, `[:, L]` what no level took. The gradient
            reaches the latents through every level (codewords are subtracted detached).
    """

    codes: Tensor
    margins: Tensor
    residuals: Tensor


class Quantizer(nn.Module, ABC):
    """latents (B, d) -> codes (B, L) -> latents (B, d)."""

    @property
    @abstractmethod
    def codebook_sizes(self) -> tuple[int, ...]:
        """K_l for each level, coarse to fine."""

    @property
    @abstractmethod
    def dimension(self) -> int:
        """d, the width of a latent."""

    @abstractmethod
    def quantize(self, latents: Tensor, *, exact: bool = False) -> Quantization:
        """Codes of each latent.

        Args:
            latents: (B, d) float, finite.
            exact: Compute every distance by differences and settle ties by `TIE_TOLERANCE`; slower, the canonical
                path's choice.
        """

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """The quantized latent of codes (B, L) int64, shape (B, d).

        Raises:
            ValueError: The shape is wrong or a code is out of range.
        """

    def check_codes(self, codes: Tensor) -> None:
        """Raise ValueError unless codes is (B, L) int64 within the codebooks."""
        sizes = torch.tensor(self.codebook_sizes, device=codes.device)
        if codes.ndim != 2 or codes.shape[1] != len(sizes):
            msg = f"codes have shape {tuple(codes.shape)}, expected (B, {len(sizes)})"
            raise ValueError(msg)
        if codes.dtype != torch.int64:
            msg = f"codes have dtype {codes.dtype}, expected torch.int64"
            raise ValueError(msg)
        if bool(((codes < 0) | (codes >= sizes)).any()):
            msg = f"a code is outside its codebook; codebook sizes are {self.codebook_sizes}"
            raise ValueError(msg)


def nearest_codeword(residuals: Tensor, codebook: Tensor, *, exact: bool = False) -> NearestCodeword:
    """The nearest codeword by Euclidean distance; ties go to the lowest index.

    The fast form expands the square around the codebook's mean (uncentred, `|x|^2 + |c|^2 - 2xc` loses its digits to
    the offset) and then measures the two candidates again by differences, so that the margin is sound even where it
    is small.

    Args:
        residuals: (B, d) float.
        codebook: (K, d), same dtype and device.
        exact: Measure all K distances by differences.

    Raises:
        ValueError: The shapes do not fit.
    """
    if residuals.ndim != 2 or codebook.ndim != 2 or residuals.shape[1] != codebook.shape[1]:
        msg = f"residuals {tuple(residuals.shape)} do not fit the codebook {tuple(codebook.shape)}"
        raise ValueError(msg)
    if codebook.shape[0] == 1:
        zeros = residuals.new_zeros(residuals.shape[0])
        return NearestCodeword(zeros.long(), torch.full_like(zeros, torch.inf))
    scores = _squared_distances(residuals, codebook) if exact else _scores(residuals, codebook)
    first = _lowest_minimum(scores) if exact else scores.argmin(dim=1)
    second = scores.scatter(1, first[:, None], torch.inf).argmin(dim=1)
    first_distance = (residuals - codebook[first]).square().sum(dim=1)
    second_distance = (residuals - codebook[second]).square().sum(dim=1)
    if not exact:
        swap = (second_distance < first_distance) | ((second_distance == first_distance) & (second < first))
        first, second = torch.where(swap, second, first), torch.where(swap, first, second)
    gap = (codebook[first] - codebook[second]).square().sum(dim=1).sqrt()
    margin = (second_distance - first_distance).abs() / (2 * gap).clamp_min(torch.finfo(gap.dtype).tiny)
    return NearestCodeword(first, margin)


def _scores(residuals: Tensor, codebook: Tensor) -> Tensor:
    """Squared distances less the term every codeword shares, (B, K)."""
    centre = codebook.mean(dim=0)
    codewords = codebook - centre
    return torch.addmm(codewords.square().sum(dim=1), residuals - centre, codewords.T, alpha=-2)


def _squared_distances(residuals: Tensor, codebook: Tensor) -> Tensor:
    """Squared distances by differences, (B, K)."""
    return (residuals[:, None, :] - codebook[None, :, :]).square().sum(dim=2)


def _lowest_minimum(distances: Tensor) -> Tensor:
    """The lowest index within `TIE_TOLERANCE` of each row's minimum, (B,)."""
    smallest = distances.amin(dim=1, keepdim=True)
    return (distances <= smallest * (1 + TIE_TOLERANCE) + torch.finfo(distances.dtype).tiny).int().argmax(dim=1)

"""Product quantization: each level looks at a part of the latent of its own (Jegou et al., PAMI 2011).

As in VQ-Rec (Hou et al., WWW 2023). The latent is cut into L runs of numbers, as equal in length as can be; each run
has a codebook. With a rotation in front, which the encoder network holds, this is OPQ (Ge et al., CVPR 2013). A prefix
names some parts of the latent and says nothing of the others: it is no coarser description of the item.

Why codes are exact: a latent error of norm e moves no run by more than e, since a run's norm is at most the whole's.
The margin of a level is its run's distance to the nearest plane midway between the codeword chosen and any other, so no
code changes while e is below the smallest margin; levels do not even wait for each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.quantizer import (
    Quantization,
    Quantizer,
    Ranking,
    SearchTable,
    nearest_codeword,
    rank_codewords,
    search_table,
)


class ProductQuantizer(Quantizer):
    """L codebooks, each on a part of the latent.

    Args:
        codebook_sizes: K_l for each level.
        dimension: d, the width of a latent; at least L.
    """

    def __init__(self, codebook_sizes: Sequence[int], dimension: int) -> None:
        super().__init__()
        if not codebook_sizes or min(codebook_sizes) < 1 or dimension < len(codebook_sizes):
            msg = (
                f"a product quantizer needs levels with codewords, and a number of the latent for each; got sizes "
                f"{tuple(codebook_sizes)} of dimension {dimension}"
            )
            raise ValueError(msg)
        runs = torch.arange(dimension).tensor_split(len(codebook_sizes))
        self.widths = tuple(len(run) for run in runs)
        self.codebooks = nn.ParameterList(
            torch.zeros(size, width) for size, width in zip(codebook_sizes, self.widths, strict=True)
        )
        self._tables: list[SearchTable | None] = [None] * len(self.widths)

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """K_l for each level."""
        return tuple(codebook.shape[0] for codebook in self.codebooks)

    @property
    def dimension(self) -> int:
        """The width d of a latent."""
        return sum(self.widths)

    @property
    def scale(self) -> float:
        """Root mean square of the sums of all levels' codewords; see `Quantizer.scale`."""
        squares = [codebook.detach().square().sum(dim=1).mean() for codebook in self.codebooks]
        return float(torch.stack(squares).sum().sqrt())

    def parts(self, latents: Tensor) -> tuple[Tensor, ...]:
        """What each level looks at (B, d_l) of latents (B, d)."""
        parts: tuple[Tensor, ...] = latents.split(self.widths, dim=1)
        return parts

    def prepare(self) -> None:
        """See `Quantizer.prepare`."""
        self._tables = [search_table(codebook.detach()) for codebook in self.codebooks]

    def quantize(self, latents: Tensor, *, exact: bool = False) -> Quantization:
        """See `Quantizer.quantize`; what a level receives is the latent less the parts that are quantized already."""
        codes, margins = [], []
        for part, codebook, table in zip(self.parts(latents.detach()), self.codebooks, self._tables, strict=True):
            nearest = nearest_codeword(part, codebook.detach(), exact=exact, table=table)
            codes.append(nearest.code)
            margins.append(nearest.margin)
        chosen = torch.stack(codes, 1)
        left = list(self.parts(latents))
        residuals = [latents]
        for level, codewords in enumerate(self.parts(self.decode(chosen).detach())):
            left[level] = left[level] - codewords
            residuals.append(torch.cat(left, dim=1))
        return Quantization(chosen, torch.stack(margins, 1), torch.stack(residuals, 1))

    def rank(self, quantization: Quantization, count: int, *, exact: bool = False) -> Ranking:
        """The last level's codewords by their distance to its part, see `Quantizer.rank`."""
        part = self.parts(quantization.residuals[:, -2].detach())[-1]
        return rank_codewords(part, self.codebooks[-1].detach(), count, quantization.codes[:, -1], exact=exact)

    def decode(self, codes: Tensor) -> Tensor:
        """The chosen codewords side by side, (B, d).

        Raises:
            ValueError: The shape is wrong or a code is out of range.
        """
        self.check_codes(codes)
        return torch.cat([codebook[codes[:, level]] for level, codebook in enumerate(self.codebooks)], dim=1)

"""Residual quantization: the only residual loop in torch; `models.native` and `models.device` have the compiled ones.

Level l takes the codeword nearest to what the levels before it left over (RQ-VAE: Lee et al., CVPR 2022, eq. 2;
Semantic IDs: Rajput et al., TIGER, NeurIPS 2023, section 3.1).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.device.search import FusedSearch, fused_search
from models.native import CompiledSearch, compiled_search
from models.quantizer import (
    Codes,
    Quantization,
    Quantizer,
    Ranking,
    SearchTable,
    nearest_codeword,
    rank_codewords,
    search_table,
)


class ResidualQuantizer(Quantizer):
    """L codebooks, one after the other on the residual.

    The codebooks and the flag that says they were initialised are state: a trained quantizer that was loaded is not
    clustered again at the start of a fit.

    Args:
        codebook_sizes: K_l for each level.
        dimension: d, the width of a latent.
    """

    initialised: Tensor

    def __init__(self, codebook_sizes: Sequence[int], dimension: int) -> None:
        super().__init__()
        if not codebook_sizes or min(codebook_sizes) < 1 or dimension < 1:
            msg = f"a quantizer needs levels with codewords; got sizes {tuple(codebook_sizes)} of dimension {dimension}"
            raise ValueError(msg)
        self.codebooks = nn.ParameterList(torch.zeros(size, dimension) for size in codebook_sizes)
        self.register_buffer("initialised", torch.tensor(False))
        self._tables: list[SearchTable | None] = [None] * len(codebook_sizes)
        self._search: CompiledSearch | FusedSearch | None = None

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """K_l for each level."""
        return tuple(codebook.shape[0] for codebook in self.codebooks)

    @property
    def dimension(self) -> int:
        """The width d of a latent."""
        return int(self.codebooks[0].shape[1])

    @property
    def scale(self) -> float:
        """See `Quantizer.scale`."""
        return float(self.codebooks[0].detach().square().sum(dim=1).mean().sqrt())

    @property
    def search(self) -> str:
        """See `Quantizer.search`."""
        return super().search if self._search is None else f"compiled, {self._search.processor}"

    def prepare(self) -> None:
        """See `Quantizer.prepare`."""
        codebooks = [codebook.detach() for codebook in self.codebooks]
        tables = [search_table(codebook) for codebook in codebooks]
        self._tables, self._search = [*tables], None
        dtype, device = codebooks[0].dtype, codebooks[0].device
        if device.type in {"cpu", "cuda"} and dtype in {torch.float32, torch.float64}:
            exact = [codebook.double() for codebook in codebooks]
            its_tables = tables if dtype == torch.float64 else [search_table(codebook) for codebook in exact]
            search = compiled_search if device.type == "cpu" else fused_search
            self._search = search(exact, its_tables, dtype)

    def quantize(self, latents: Tensor, *, exact: bool = False) -> Quantization:
        """See `Quantizer.quantize`; compiled where it is prepared and no gradient is asked for."""
        if exact or self._search is None or not self._search.fits(latents):
            return self._quantize(latents, exact=exact)
        found = self._search(latents)
        assert found.margins is not None
        assert found.residuals is not None
        quantization = Quantization(found.codes, found.margins, found.residuals)
        if len(found.doubtful):
            _put(quantization, found.doubtful, self._quantize(latents[found.doubtful], exact=True))
        return quantization

    def encode(self, latents: Tensor) -> Codes:
        """See `Quantizer.encode`."""
        if self._search is None or not self._search.fits(latents):
            return super().encode(latents)
        found = self._search(latents, brief=True)
        codes = Codes(found.codes, found.margin, found.error)
        if len(found.doubtful):
            _put(codes, found.doubtful, Codes.of(self._quantize(latents[found.doubtful], exact=True)))
        return codes

    def _quantize(self, latents: Tensor, *, exact: bool = False) -> Quantization:
        codes, margins, residuals = [], [], [latents]
        for codebook, table in zip(self.codebooks, self._tables, strict=True):
            codewords = codebook.detach()
            nearest = nearest_codeword(residuals[-1].detach(), codewords, exact=exact, table=table)
            codes.append(nearest.code)
            margins.append(nearest.margin)
            # Detached: with a straight-through codeword here the encoder's gradient would cancel beyond level 1.
            residuals.append(residuals[-1] - codewords[nearest.code])
        return Quantization(torch.stack(codes, 1), torch.stack(margins, 1), torch.stack(residuals, 1))

    def rank(self, quantization: Quantization, count: int, *, exact: bool = False) -> Ranking:
        """The last level's codewords by their distance to what it received, see `Quantizer.rank`."""
        received = quantization.residuals[:, -2].detach()
        return rank_codewords(received, self.codebooks[-1].detach(), count, quantization.codes[:, -1], exact=exact)

    def codewords(self, codes: Tensor) -> Tensor:
        """The chosen codeword of each level, (B, L, d), with gradient to the codebooks.

        Raises:
            ValueError: The shape is wrong or a code is out of range.
        """
        self.check_codes(codes)
        return torch.stack([codebook[codes[:, level]] for level, codebook in enumerate(self.codebooks)], 1)

    def decode(self, codes: Tensor) -> Tensor:
        """The sum of the chosen codewords, (B, d)."""
        return self.codewords(codes).sum(dim=1)


def _put(whole: Sequence[Tensor], rows: Tensor, part: Sequence[Tensor]) -> None:
    for tensor, some in zip(whole, part, strict=True):
        tensor[rows] = some

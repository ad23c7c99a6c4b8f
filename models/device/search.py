"""The search of a residual quantizer on a GPU: all levels of a batch in one launch, see `models.device.search_kernel`.

It is `models.native.search` for a device, by the arithmetic of `models.quantizer`: float64 throughout, the expanded
square around each codebook's mean, what that may round off taken from every margin. So its margins are lower bounds
whatever the order of a sum, rows that are left with none are told as doubtful, and no path of the ladder needs a bound
for the search. In float32 the same slack would be several times the bound of float32 latents, and so as many times the
rows that are computed again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from models.native.search import Found
from models.quantizer import SPANS_HELD, SearchTable, nearest_codeword

log = logging.getLogger(__name__)

# Latents of one program, codewords that it looks at together, and what works on them: of those tried, the most that the
# registers of compute capabilities 8.0 to 12.0 hold, as Triton's compiler reports them. Not tuned on any device.
ROWS, BLOCK, WARPS, STAGES = 32, 32, 8, 2

# Numbers of a latent beyond which a program's registers and shared memory would not do.
LARGEST_DIMENSION = 128

# Latents that a new search is tried on, and what rounding may make of them, in units of their dtype.
CHECKED = 101
ROUNDINGS = 1e4

# Norms up to which squared distances are finite.
LARGEST_REACH = 1e150


class FusedSearch:
    """The tables of a quantizer's levels, padded to one size. It never changes, so copies share it.

    Args:
        codebooks: (K_l, d) float64 each, on a device.
        tables: `models.quantizer.search_table` of each.
        dtype: Of the latents, float32 or float64.

    Raises:
        ImportError: There is no Triton.
        ValueError: The codebooks are too large, or too wide.
    """

    processor = "Triton"

    def __init__(self, codebooks: Sequence[Tensor], tables: Sequence[SearchTable], dtype: torch.dtype) -> None:
        spans = [table.inverse_spans for table in tables if table.inverse_spans is not None]
        if len(spans) < len(tables) or codebooks[0].shape[1] > LARGEST_DIMENSION:
            msg = f"it takes codebooks up to {SPANS_HELD} codewords of {LARGEST_DIMENSION} numbers"
            raise ValueError(msg)
        from models.device.search_kernel import search_all_levels

        self._kernel = search_all_levels
        self._dtype, self._device = dtype, codebooks[0].device
        self._codebooks = codebooks
        self._dimension = codebooks[0].shape[1]
        self._width = max(16, 1 << (self._dimension - 1).bit_length())
        self._size = -(-max(map(len, codebooks)) // BLOCK) * BLOCK
        rows, columns = self._size, self._width
        self._tables = (
            torch.stack([_padded(codebook, rows, columns) for codebook in codebooks]),
            torch.stack([_padded(table.codewords, rows, columns) for table in tables]),
            torch.stack([_padded(table.centre[None], 1, columns)[0] for table in tables]),
            torch.stack([_padded(table.norms[None], 1, rows, torch.inf)[0] for table in tables]),
            torch.stack([table.radius for table in tables]),
            torch.stack([_padded(span, rows, rows, torch.inf) for span in spans]),
        )

    def __deepcopy__(self, memo: dict[int, object]) -> FusedSearch:
        return self

    def fits(self, latents: Tensor) -> bool:
        """Whether these can be searched: (B, d) on its device, of its dtype, and no gradient is asked for."""
        return (
            latents.dtype == self._dtype
            and latents.device == self._device
            and latents.ndim == 2
            and latents.shape[1] == self._dimension
            and not (latents.requires_grad and torch.is_grad_enabled())
        )

    def __call__(self, latents: Tensor, *, brief: bool = False) -> Found:
        """Search latents (B, d).

        Args:
            latents: (B, d).
            brief: Without each level's margins and residuals, and without waiting for the device: doubtful rows are
                not listed, but told by a margin that is no number.

        Raises:
            ValueError: They do not fit, see `fits`.
        """
        if not self.fits(latents):
            msg = f"latents {tuple(latents.shape)} of {latents.dtype} on {latents.device} do not fit this search"
            raise ValueError(msg)
        count, levels = len(latents), len(self._codebooks)
        codes = latents.new_empty((count, levels), dtype=torch.int64)
        margins = latents.new_empty((count, levels), dtype=torch.float64)
        # Each alone: where two share memory, whether the second is aligned depends on their length, and so the kernel.
        margin, error = (latents.new_empty(count, dtype=torch.float64) for _ in range(2))
        if count:
            # Triton launches on the current device, whichever its arguments are on.
            with torch.cuda.device_of(latents):
                self._kernel[(-(-count // ROWS),)](
                    latents.contiguous(),
                    *self._tables,
                    codes,
                    margins,
                    margin,
                    error,
                    count,
                    LEVELS=levels,
                    SIZE=self._size,
                    DIMENSION=self._dimension,
                    WIDTH=self._width,
                    # As in `models.quantizer`: a score is a sum of d products and of what surrounds it.
                    SLACK=2 * (self._dimension + 8) * torch.finfo(torch.float64).eps,
                    LARGEST_REACH=LARGEST_REACH,
                    ROWS=ROWS,
                    BLOCK=BLOCK,
                    num_warps=WARPS,
                    num_stages=STAGES,
                )
        margin, error = margin.to(self._dtype), error.to(self._dtype)
        if brief:
            return Found(codes, margin, error, codes.new_empty(0))
        residuals = [latents]
        for level, codebook in enumerate(self._codebooks):
            residuals.append(residuals[-1] - codebook[codes[:, level]].to(self._dtype))
        doubtful = margin.isnan().nonzero().flatten()
        return Found(codes, margin, error, doubtful, margins.to(self._dtype), torch.stack(residuals, dim=1))


def fused_search(codebooks: Sequence[Tensor], tables: Sequence[SearchTable], dtype: torch.dtype) -> FusedSearch | None:
    """The search of codebooks (K_l, d) with their tables, all float64 on a device; None where it cannot be had.

    That is where there is no Triton, where codebooks are too large, and where known latents are not searched as
    distances by differences say; the log has which.

    Args:
        codebooks: (K_l, d) each.
        tables: Of each.
        dtype: Of the latents.
    """
    try:
        search = FusedSearch(codebooks, tables, dtype)
        _check(search, codebooks, dtype)
    except Exception as fault:  # noqa: BLE001 - whatever a compiler or a driver lacks here, torch has it
        log.warning("torch searches the codebooks on %s, not one kernel for all levels: %s", codebooks[0].device, fault)
        return None
    return search


def _check(search: Callable[[Tensor], Found], codebooks: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Raise ValueError where known latents come to other codes, or to margins too large, than by differences."""
    latents = _known_latents(codebooks)
    found = search(latents.to(dtype))
    assert found.margins is not None
    assert found.residuals is not None
    settled = torch.ones(len(latents), dtype=torch.bool, device=latents.device)
    settled[found.doubtful] = False
    if bool(settled[-1]) or int(settled.sum()) < len(latents) // 2:
        raise ValueError("it is in doubt of other rows than it should be")
    for level, codebook in enumerate(codebooks):
        received = found.residuals[settled, level].double()
        exact = nearest_codeword(received, codebook, exact=True)
        rounding = ROUNDINGS * torch.finfo(dtype).eps * (received.norm(dim=1) + codebook.norm(dim=1).amax())
        sure = exact.margin > rounding
        if not torch.equal(found.codes[settled, level][sure], exact.code[sure]):
            raise ValueError("it finds other codewords than distances by differences do")
        if not bool((found.margins[settled, level].double() <= exact.margin + rounding).all()):
            raise ValueError("it finds larger margins than distances by differences do")


def _known_latents(codebooks: Sequence[Tensor]) -> Tensor:
    """Latents (B, d) float64 among sums of codewords, always the same; the last one is no number."""
    source = torch.Generator().manual_seed(1)
    noise = torch.randn(CHECKED, codebooks[0].shape[1], generator=source, dtype=torch.float64).to(codebooks[0].device)
    latents = noise * codebooks[-1].std(correction=0)
    for codebook in codebooks:
        latents += codebook[torch.randint(len(codebook), (CHECKED,), generator=source).to(codebook.device)]
    latents[-1] = torch.nan
    return latents


def _padded(table: Tensor, rows: int, columns: int, by: float = 0.0) -> Tensor:
    return pad(table, (0, columns - table.shape[1], 0, rows - table.shape[0]), value=by)

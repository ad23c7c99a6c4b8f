"""The compiled search of a residual quantizer: all levels of a batch in one call, see `residual_argmin.c`.

Codes and margins are those of float64, whatever the precision of the latents, and what a row comes to depends neither
on the rows beside it nor on the processor. Rows that rounding leaves in doubt come back as such.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from models.native.libraries import Interface, opened
from models.native.niceness import steps_behind

if TYPE_CHECKING:
    from models.quantizer import SearchTable

_ADDRESS, _NUMBER, _COUNT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int

INTERFACE = Interface(
    file="_residual_argmin",
    prefix="residual_search",
    version=4,
    functions={
        "kind": (_COUNT, [_COUNT]),
        "kind_name": (ctypes.c_char_p, [_COUNT]),
        "new": (_ADDRESS, [_NUMBER, _NUMBER, _COUNT]),
        "fill": (ctypes.c_bool, [_ADDRESS, _NUMBER, _NUMBER, *[_ADDRESS] * 4, ctypes.c_double, _ADDRESS]),
        "free": (None, [_ADDRESS]),
        "quantize": (_NUMBER, [_ADDRESS, _ADDRESS, _COUNT, _NUMBER, *[_ADDRESS] * 5, _COUNT, _COUNT]),
    },
)

# Norms beyond which float32 could not hold the scores.
LARGEST_RADIUS = 1e18

# Multiplications that are worth waking a thread.
THREAD_WORK = 2**22

# The processors it is compiled for, the last the fastest; the library takes no more than the one at hand has.
ANY_PROCESSOR, FASTEST = 0, 3


class Found(NamedTuple):
    """What the search found for latents (B, d).

    Attributes:
        codes: (B, L) int64.
        margin: (B,) of the latents' dtype, the smallest over the levels, see `models.quantizer.NearestCodeword.margin`.
        error: (B,) of the latents' dtype, the squared norm of what no level took.
        doubtful: Rows (n,) int64 that are to be computed otherwise: a tie, or a number out of float32's range.
        margins: (B, L) of the latents' dtype; none in brief.
        residuals: (B, L + 1, d) of the latents' dtype; none in brief.
    """

    codes: Tensor
    margin: Tensor
    error: Tensor
    doubtful: Tensor
    margins: Tensor | None = None
    residuals: Tensor | None = None


class CompiledSearch:
    """The tables of a quantizer's levels, laid out for this processor. It never changes, so copies share it.

    Args:
        library: Of `models.native.libraries.open_library`.
        codebooks: (K_l, d) float64 each, on the CPU.
        tables: `models.quantizer.search_table` of each.
        dtype: Of the latents, float32 or float64.
        kind: Which processor's instructions, at most.

    Raises:
        ValueError: These are no codebooks, or the tables are not theirs.
        MemoryError: There is no room for the tables.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        codebooks: Sequence[Tensor],
        tables: Sequence[SearchTable],
        dtype: torch.dtype = torch.float64,
        kind: int = FASTEST,
    ) -> None:
        _check(codebooks, tables, dtype)
        self._dtype = dtype
        self._levels, self._dimension = len(codebooks), codebooks[0].shape[1]
        self._work = self._dimension * sum(len(codebook) for codebook in codebooks)
        kind = library.residual_search_kind(kind)
        self.processor: str = library.residual_search_kind_name(kind).decode()
        self._quantize = library.residual_search_quantize
        self._handle = library.residual_search_new(self._levels, self._dimension, kind)
        if not self._handle:
            raise MemoryError("no memory for the tables of a search")
        # Not at the end of the process: another thread may be within a call.
        weakref.finalize(self, library.residual_search_free, self._handle).atexit = False
        for level, (codebook, table) in enumerate(zip(codebooks, tables, strict=True)):
            assert table.inverse_spans is not None
            kept = [part.contiguous() for part in (codebook, table.codewords, table.centre, table.norms)]
            spans = table.inverse_spans.to(torch.float32).contiguous()
            addresses = [part.data_ptr() for part in kept]
            if not library.residual_search_fill(
                self._handle, level, len(codebook), *addresses, float(table.radius), spans.data_ptr()
            ):
                raise MemoryError("no memory for the tables of a search")

    def __deepcopy__(self, memo: dict[int, object]) -> CompiledSearch:
        return self

    def fits(self, latents: Tensor) -> bool:
        """Whether these can be searched: (B, d) on the CPU, of the codebooks' dtype, and no gradient is asked for."""
        return (
            latents.dtype == self._dtype
            and latents.is_cpu
            and latents.ndim == 2
            and latents.shape[1] == self._dimension
            and not (latents.requires_grad and torch.is_grad_enabled())
        )

    def __call__(self, latents: Tensor, *, brief: bool = False) -> Found:
        """Search latents (B, d), of any strides.

        Args:
            latents: (B, d).
            brief: Without each level's margins and residuals.

        Raises:
            ValueError: They do not fit, see `fits`.
            MemoryError: There is no room to work in.
        """
        if not self.fits(latents):
            msg = f"latents {tuple(latents.shape)} of {latents.dtype} on {latents.device} do not fit this search"
            raise ValueError(msg)
        rows = latents.shape[0]
        latents = latents if latents.is_contiguous() else latents.contiguous()
        # The quickest way to new tensors; a row alone waits for them as long as for the search.
        codes = _NO_ROWS.new_empty(rows, self._levels)
        margin, error = latents.new_empty(rows), latents.new_empty(rows)
        margins = residuals = None
        if not brief:
            margins = latents.new_empty(rows, self._levels)
            residuals = latents.new_empty(rows, self._levels + 1, self._dimension)
        threads = rows * self._work // THREAD_WORK
        doubtful = self._quantize(
            self._handle,
            latents.data_ptr(),
            latents.dtype == torch.float64,
            rows,
            codes.data_ptr(),
            margin.data_ptr(),
            error.data_ptr(),
            None if margins is None else margins.data_ptr(),
            None if residuals is None else residuals.data_ptr(),
            threads if threads < 2 else min(threads, torch.get_num_threads()),
            0 if threads < 2 else steps_behind(),
        )
        if doubtful < 0:
            raise MemoryError("no memory for a search")
        return Found(
            codes, margin, error, margin.isnan().nonzero().flatten() if doubtful else _NO_ROWS, margins, residuals
        )


def _check(codebooks: Sequence[Tensor], tables: Sequence[SearchTable], dtype: torch.dtype) -> None:
    """Raise ValueError unless the library would find all numbers where it looks for them."""
    if dtype not in {torch.float32, torch.float64}:
        msg = f"latents of {dtype} are not searched"
        raise ValueError(msg)
    width = codebooks[0].shape[-1] if codebooks else 0
    if not width:
        raise ValueError("a search needs levels, of codewords with numbers")
    for codebook, table in zip(codebooks, tables, strict=True):
        size = len(codebook)
        spans = table.inverse_spans
        parts = {(size, width): (codebook, table.codewords), (width,): (table.centre,), (size,): (table.norms,)}
        if not size or spans is None or not spans.is_cpu or spans.shape != (size, size):
            raise ValueError("a search needs the spans of each two codewords")
        for shape, tensors in parts.items():
            for tensor in tensors:
                if tensor.shape != shape or tensor.dtype != torch.float64 or not tensor.is_cpu:
                    msg = f"a codebook's table has {tuple(tensor.shape)} of {tensor.dtype}, not {shape} of float64"
                    raise ValueError(msg)


_NO_ROWS = torch.empty(0, dtype=torch.int64)


def compiled_search(
    codebooks: Sequence[Tensor], tables: Sequence[SearchTable], dtype: torch.dtype
) -> CompiledSearch | None:
    """The search of codebooks (K_l, d) with their tables, all float64 on the CPU; None where it cannot be had.

    That is where the library was not compiled, where a codebook is too large for a table of its spans, and where
    codewords lie too far apart for float32.

    Args:
        codebooks: (K_l, d) each.
        tables: Of each.
        dtype: Of the latents.
    """
    library = installed_library()
    fits = all(table.inverse_spans is not None and float(table.radius) < LARGEST_RADIUS for table in tables)
    return CompiledSearch(library, codebooks, tables, dtype) if library is not None and fits else None


@functools.cache
def installed_library() -> ctypes.CDLL | None:
    """The library that the installation compiled, if it did."""
    return opened(INTERFACE)

"""The ladder of paths: each more exact and slower than the one before it, and the last one canonical.

Every path yields codes and, for each row, how far its latent would have to move before any code changed. A row whose
margin exceeds what the path may be off by is final; the others go on to the next path, together. So codes are those of
the canonical path, whichever path they were final on (P4).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor


class Precision(IntEnum):
    """The paths, from fast to exact."""

    BFLOAT16 = 0
    """Texts, in a batch; products in bfloat16."""
    FLOAT16 = 1
    """Texts, in a batch; products and attention in float16."""
    INT16 = 2
    """Texts, in a batch; products of whole numbers in int16, all else in float32."""
    FLOAT32 = 3
    """Texts and embeddings, in a batch."""
    FLOAT64 = 4
    """Embeddings, and texts where their forward pass has it, in a batch."""
    CANONICAL = 5
    """Alone, in float64, on the CPU, distances by differences."""
    UNDECIDED = 6
    """None yet: left to the canonical path by who asked for it."""


@dataclass(frozen=True)
class ErrorBounds:
    """Latent errors of the fast paths against the canonical one, on the safe side; None: the path is not taken.

    Attributes:
        text: Of texts embedded in float32.
        embedding: Of embeddings encoded in a float64 batch, of usual size: rounding is relative, so the bound grows
            with a larger embedding.
        embedding_float32: The same in float32.
        text_bfloat16: Of texts embedded in bfloat16.
        text_float16: The same in float16.
        text_int16: The same with products in int16.
        text_float64: The same in a float64 batch.
    """

    text: float = 1e-4
    embedding: float = 1e-9
    embedding_float32: float | None = None
    text_bfloat16: float | None = None
    text_float16: float | None = None
    text_int16: float | None = None
    text_float64: float | None = None


class Encoding(NamedTuple):
    """What a tokenizer makes of B contents.

    Attributes:
        codes: (B, L) int64.
        margin: (B,) float64, the smallest margin over the levels, in units of the latent; its last digits, and those
            of the quantization error, are those of the path that the row was final on.
        quantization_error: (B,) float64, squared norm of the residual that no level took.
        precision: (B,) int64, the `Precision` of the path that each row was final on.
        alternatives: (B, n) int64, codes of the last level by their distance, the chosen one first; n is 0 where none
            were asked for.
    """

    codes: Tensor
    margin: Tensor
    quantization_error: Tensor
    precision: Tensor
    alternatives: Tensor

    @property
    def undecided(self) -> Tensor:
        """(n,) int64, rows that are left to the canonical path."""
        return (self.precision == Precision.UNDECIDED).nonzero().flatten()

    @property
    def recomputed(self) -> Tensor:
        """(B,) bool, rows that were near a tie and went to the canonical path."""
        return self.precision == Precision.CANONICAL


class Rung(NamedTuple):
    """One path of the ladder but the last.

    Attributes:
        precision: Which.
        encode: Rows (n,) int64 -> their encoding, and what (n,) each latent may be off by before a code changes.
        bound: What the path may be off by; a row is final beyond it.
    """

    precision: Precision
    encode: Callable[[Tensor], tuple[Encoding, Tensor]]
    bound: float


def climb(
    rungs: Sequence[Rung],
    rows: int,
    canonical: Callable[[int], Encoding] | None,
    key: Callable[[int], Hashable] = lambda row: row,
) -> Encoding:
    """The encoding of rows (B), each final on the first path that leaves no doubt.

    Args:
        rungs: From fast to exact; one at least.
        rows: B.
        canonical: The encoding of one row alone; None where rows that come so far are left undecided.
        key: Rows of equal keys are computed once on the canonical path.
    """
    undecided = torch.arange(rows)
    encoding: Encoding | None = None
    for rung in rungs:
        tried, certain = rung.encode(undecided)
        tried.precision.fill_(rung.precision)
        if encoding is None:
            encoding = tried
        else:
            _put(encoding, undecided, tried)
        final = certain > rung.bound
        if bool(final.all()):
            return encoding
        undecided = undecided[~final]
    assert encoding is not None
    if canonical is None:
        encoding.precision[undecided] = Precision.UNDECIDED
        return encoding
    known: dict[Hashable, Encoding] = {}
    for row in undecided.tolist():
        exact = known.get(key(row))
        if exact is None:
            exact = known[key(row)] = canonical(row)
        _put(encoding, torch.tensor([row]), exact)
        encoding.precision[row] = Precision.CANONICAL
    return encoding


def _put(encoding: Encoding, rows: Tensor, better: Encoding) -> None:
    for whole, part in zip(encoding, better, strict=True):
        whole[rows] = part

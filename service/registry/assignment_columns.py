"""Assignments and claims of many items as columns: an array for each of their parts, no object for an item."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from service.registry.assignment import CONTENT_CHANGED, DIGEST_BYTES, RETIRED

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from service.semantic_id import CodeLayout

_CODES_AT = 5 + DIGEST_BYTES
DIGEST = np.dtype(np.uint64)


class Held(NamedTuple):
    """What items hold, by their places; where `live` is false the other columns say nothing.

    Attributes:
        known: (B,) bool. Whether the item has an assignment, be it retired.
        live: (B,) bool. Whether it holds an ID now.
        content_changed: (B,) bool. Whether its latest content has other codes.
        digests: (B,) uint64. Of its latest content, in the bytes' own order.
        codes: (B, L) int32.
        suffixes: (B,) int64.
    """

    known: NDArray[np.bool_]
    live: NDArray[np.bool_]
    content_changed: NDArray[np.bool_]
    digests: NDArray[np.uint64]
    codes: NDArray[np.int32]
    suffixes: NDArray[np.int64]


def read_held(values: Sequence[bytes | None], layout: CodeLayout) -> Held:
    """What the script wrote for each item, see `assignment.read_assignment`; None for one that has nothing."""
    filled = [value or b"" for value in values]
    lengths = np.fromiter(map(len, filled), np.int64, len(filled))
    starts = np.cumsum(lengths) - lengths
    codes_end = _CODES_AT + layout.width
    data = np.frombuffer(b"".join(filled) + bytes(codes_end), np.uint8)
    known = lengths > 0
    live = known & (data[starts] & RETIRED == 0)
    fixed = data[starts[:, None] + np.arange(codes_end)]  # of what is not live it is read and not used
    digits_at = starts + codes_end
    digits = np.where(live, lengths - codes_end, 0)
    suffixes = np.zeros(len(filled), np.int64)
    for place in range(int(digits.max(initial=0))):
        more = place < digits
        suffixes[more] = 10 * suffixes[more] + data[digits_at[more] + place] - ord("0")
    return Held(
        known,
        live,
        live & (fixed[:, 0] & CONTENT_CHANGED != 0),
        np.ascontiguousarray(fixed[:, 5:_CODES_AT]).view(DIGEST)[:, 0],
        np.ascontiguousarray(fixed[:, _CODES_AT:]).view(_code_type(layout)).astype(np.int32),
        suffixes,
    )


def write_contents(digests: NDArray[np.uint64], codes: NDArray[np.int32], layout: CodeLayout) -> list[bytes]:
    """The digest and the packed codes of each item, as they stand in what the scripts are asked.

    Args:
        digests: (B,).
        codes: (B, L).
        layout: Of the tokenizer.

    Raises:
        ValueError: Codes that the tokenizer does not have.
    """
    return row_bytes(np.hstack([np.ascontiguousarray(digests)[:, None].view(np.uint8), pack(codes, layout)]))


def pack(codes: NDArray[np.int32], layout: CodeLayout) -> NDArray[np.uint8]:
    """Packed codes (B, width) of codes (B, L), see `CodeLayout.pack`.

    Raises:
        ValueError: Codes that the tokenizer does not have.
    """
    sizes = np.array(layout.codebook_sizes)
    if codes.shape[1] != len(sizes) or bool(((codes < 0) | (codes >= sizes)).any()):
        raise ValueError(f"not codes of codebooks {layout.codebook_sizes}")
    return np.ascontiguousarray(codes.astype(_code_type(layout))).view(np.uint8)


def row_bytes(rows: NDArray[np.uint8]) -> list[bytes]:
    """The bytes of each row of (B, width)."""
    data, width = rows.tobytes(), rows.shape[1]
    return [data[start : start + width] for start in range(0, len(data), width)]


def _code_type(layout: CodeLayout) -> np.dtype[np.unsignedinteger[np.typing.NBitBase]]:
    return np.dtype(">u1" if layout.bytes_per_code == 1 else ">u2")

"""Arithmetic on arrays of any size, chunk by chunk: rows that lie in a file are never in memory all at once.

What fits into one chunk is computed in one step. Beyond that, sums are taken chunk by chunk in float64.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

# Bytes of rows worked on at once. Not less: blocks of this size go back to the system when they are freed, while
# the C library may keep smaller ones.
CHUNK_BYTES = 2**25

_ODD = np.uint64(0x9E3779B97F4A7C15)
_HALF = np.uint64(32)


def slices(rows: Tensor, chunk_bytes: int = CHUNK_BYTES) -> Iterator[slice]:
    """Slices that cover an array (N, ...), each of some rows."""
    bytes_a_row = max(1, rows[:1].numel() * rows.element_size())
    step = max(1, chunk_bytes // bytes_a_row)
    for start in range(0, len(rows), step):
        yield slice(start, min(start + step, len(rows)))


def is_finite(rows: Tensor) -> bool:
    """Whether all numbers of an array (N, ...) are finite."""
    return all(bool(rows[part].isfinite().all()) for part in slices(rows))


def all_equal(rows: Tensor) -> bool:
    """Whether all rows of (N, D) are the same."""
    return all(torch.equal(rows[part], rows[:1].expand_as(rows[part])) for part in slices(rows))


def weighted_sum(rows: Tensor, weights: Tensor) -> Tensor:
    """The sum (D,) of rows (N, D), each times its weight (N,); of the type that the product has."""
    parts = list(slices(rows))
    if len(parts) == 1:
        return (rows * weights[:, None]).sum(dim=0)
    kind = torch.promote_types(rows.dtype, weights.dtype)
    total = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
    for part in parts:
        total += (rows[part] * weights[part, None]).sum(dim=0, dtype=torch.float64)
    return total.to(kind)


def squared_distances(rows: Tensor, centre: Tensor) -> Tensor:
    """The squared distance (N,) of each row of (N, D) to a point (D,)."""
    distances = rows.new_empty(len(rows))
    for part in slices(rows):
        distances[part] = (rows[part] - centre).square().sum(dim=1)
    return distances


def weighted_spread(rows: Tensor, centre: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum () of the squared distances of rows (N, D) to a point (D,)."""
    parts = list(slices(rows))
    if len(parts) == 1:
        return ((rows - centre).square() * weights[:, None]).sum()
    total = torch.zeros((), dtype=torch.float64, device=rows.device)
    for part in parts:
        total += ((rows[part] - centre).square() * weights[part, None]).sum()
    return total


def code_keys(codes: Tensor) -> Tensor:
    """A number (N,) int64 for each row of codes (N, L), equal for equal rows and ordered as these are."""
    keys = torch.zeros(len(codes), dtype=torch.int64, device=codes.device)
    reach = 1
    for level in codes.unbind(dim=1):
        radix = int(level.max()) + 1 if len(level) else 1
        if reach * radix >= 2**63:
            distinct, keys = keys.unique(return_inverse=True)
            reach = len(distinct)
        keys.mul_(radix).add_(level)
        reach *= radix
    return keys


def sorted_in_place(values: Tensor) -> Tensor:
    """The same tensor (N,), in order now; without room for the places, which `Tensor.sort` always takes."""
    if values.device.type == "cpu":
        values.numpy().sort()
        return values
    return values.copy_(values.sort().values)


def group_sizes(keys: Tensor) -> Tensor:
    """How many of N keys (N,) int64 are equal, for each distinct key in order, (G,) int64; the keys are sorted."""
    ordered = sorted_in_place(keys).cpu().numpy()
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    return torch.from_numpy(np.diff(np.append(starts, len(ordered))))


def digests(rows: Tensor) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """A number of 64 bits for each row of (N, D) floats, the same for rows that are equal and for no others.

    Two of N rows that differ have the same one with a probability of about N^2 / 2^65.
    """
    kept = np.empty(len(rows), np.uint64)
    for part in slices(rows):
        chunk = rows[part].cpu().numpy() + 0.0  # -0 is 0
        words = chunk.view(np.uint32 if chunk.itemsize * chunk.shape[1] % 8 else np.uint64)
        mixed = np.full(len(chunk), _ODD)
        for column in words.T:
            # Each step can be undone, so rows that differ in one word alone never meet.
            mixed = (mixed ^ column) * _ODD
            mixed ^= mixed >> _HALF
        kept[part] = mixed
    return kept


def count_distinct(rows: Tensor, enough: int | None = None) -> int:
    """How many rows of (N, D) differ from each other; some number from `enough` on where there are so many.

    Args:
        rows: (N, D) float.
        enough: Where to stop counting.
    """
    if enough is not None and len(rows) > 16 * enough:
        found = count_distinct(rows[: 16 * enough])
        if found >= enough:
            return found
    ordered = digests(rows)
    ordered.sort()
    return int((ordered[1:] != ordered[:-1]).sum()) + bool(len(ordered))

"""Items as many as one likes, made of pairs of embeddings, and their codes: all of them, or those of one first code.

A first code of a catalogue far too large to be made whole is made alone, by rejection: pairs whose first part has
given this code before are drawn evenly, and kept where they give it. So what is kept is drawn as in the whole, but for
the parts that never gave the code; how many pairs they make is estimated from those that gave it once (Good, 1953).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from models import Tokenizer

ROWS_AT_ONCE = 2048  # stay in the cache
HALF = np.float32(0.5)

Keys = NDArray[np.uint64]


class Pairs:
    """Embeddings made of pairs of others: the one and half of the other, brought back to length 1.

    Args:
        base: (N, D) float32.
        tokenizer: That gives the codes; codebooks of at most 256 codewords, at most 8 levels.
        seed: Of the pairs.

    Raises:
        ValueError: Codes of the tokenizer have no room in 64 bits.
    """

    def __init__(self, base: NDArray[np.float32], tokenizer: Tokenizer, seed: int = 0) -> None:
        if max(tokenizer.codebook_sizes) > 256 or len(tokenizer.codebook_sizes) > 8:
            raise ValueError(f"codes of codebooks {tokenizer.codebook_sizes} do not fit into 64 bits")
        self._base = base
        self._tokenizer = tokenizer
        self._draw = np.random.default_rng(seed)
        self.levels = len(tokenizer.codebook_sizes)
        self._seen: list[NDArray[np.uint64]] = []

    def whole(self, count: int) -> Keys:
        """The packed codes of so many items, (count,)."""
        parts = [np.empty(0, np.uint64)]
        for start in range(0, count, ROWS_AT_ONCE):
            ones = self._draw.integers(len(self._base), size=min(ROWS_AT_ONCE, count - start))
            parts.append(self._keys(ones))
            # Which first parts gave which first codes.
            self._seen.append(self.first_codes(parts[-1]) << np.uint64(32) | ones.astype(np.uint64))
        return np.concatenate(parts)

    def of_first_code(self, code: int, count: int) -> tuple[Keys, float]:
        """The packed codes of so many items of one first code, and what share of its items cannot be drawn.

        Raises:
            ValueError: `whole` has not met this code.
        """
        seen = np.concatenate(self._seen)
        ones, times = np.unique(seen[seen >> np.uint64(32) == code] & np.uint64(2**32 - 1), return_counts=True)
        if not len(ones):
            raise ValueError(f"no item has the first code {code}")
        parts, found = [np.empty(0, np.uint64)], 0
        while found < count:
            keys = self._keys(ones[self._draw.integers(len(ones), size=ROWS_AT_ONCE)].astype(np.int64))
            parts.append(keys[self.first_codes(keys) == code])
            found += len(parts[-1])
        return np.concatenate(parts)[:count], float((times == 1).sum() / times.sum())

    def first_codes(self, keys: Keys) -> NDArray[np.uint64]:
        """The first codes (N,) of packed codes (N,)."""
        return keys >> np.uint64(8 * (self.levels - 1))

    def _keys(self, ones: NDArray[np.int64]) -> Keys:
        rows, others = self._base[ones], self._base[self._draw.integers(len(self._base), size=len(ones))]
        others *= HALF
        rows += others
        rows /= np.sqrt(np.einsum("nd,nd->n", rows, rows))[:, None]
        # The ladder would change one code in thousands, and no count that is made here.
        codes = self._tokenizer.quantize(self._tokenizer.fast_latents(torch.from_numpy(rows))).codes.numpy()
        return pack(codes)


def pack(codes: NDArray[np.int64]) -> Keys:
    """Codes (N, L) as numbers (N,) whose leading bytes are the prefixes."""
    keys = np.zeros(len(codes), np.uint64)
    for column in codes.astype(np.uint64).T:
        keys = keys << np.uint64(8) | column
    return keys


def unpack(keys: Keys, levels: int) -> NDArray[np.int32]:
    """The codes (N, L) of such numbers."""
    shifts = np.arange(8 * (levels - 1), -1, -8, dtype=np.uint64)
    return (keys[:, None] >> shifts & np.uint64(255)).astype(np.int32)


def item_ids(count: int) -> Iterator[bytes]:
    """Ids of 12 bytes, running numbers."""
    return (b"B%011d" % number for number in range(count))

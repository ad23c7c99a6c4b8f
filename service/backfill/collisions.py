"""Counts over sorted codes: how many prefixes there are at each level, and how large the groups of equal codes are."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Collisions:
    """Counted run by run, in order."""

    def __init__(self, levels: int) -> None:
        self._prefixes = np.zeros(levels, np.int64)
        self._sizes: Counter[int] = Counter()
        self._last: NDArray[np.int64] | None = None
        self._open = 0  # rows of the last group so far
        self._largest: list[tuple[int, tuple[int, ...]]] = []

    def add(self, codes: NDArray[np.integer[Any]]) -> None:
        """The next codes (n, L), sorted."""
        if not len(codes):
            return
        before = np.full((1, codes.shape[1]), -1) if self._last is None else self._last[None]
        differs = np.vstack([before, codes])
        changed = np.logical_or.accumulate(differs[1:] != differs[:-1], axis=1)
        self._prefixes += changed.sum(axis=0)
        begins = np.flatnonzero(changed[:, -1])
        ends = np.append(begins[1:], len(codes))
        if self._last is not None:
            self._open += int(begins[0]) if len(begins) else len(codes)
            if len(begins):
                self._close(np.array([self._open]), self._last[None])
        if len(begins):
            self._close((ends - begins)[:-1], codes[begins[:-1]])
            self._open = int(ends[-1] - begins[-1])
        self._last = codes[-1].astype(np.int64)

    def _close(self, sizes: NDArray[np.int64], codes: NDArray[Any]) -> None:
        values, counts = np.unique(sizes, return_counts=True)
        self._sizes.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
        top = np.argsort(-sizes, kind="stable")[:10]
        self._largest += [(int(sizes[place]), tuple(codes[place].tolist())) for place in top.tolist()]
        self._largest = sorted(self._largest, key=lambda group: (-group[0], group[1]))[:10]

    def report(self) -> dict[str, Any]:
        """What was counted, as JSON."""
        if self._last is not None:
            self._close(np.array([self._open]), self._last[None])
            self._last = None
        items = sum(size * count for size, count in self._sizes.items())
        alone = self._sizes.get(1, 0)
        return {
            "items": items,
            "distinct_prefixes": self._prefixes.tolist(),
            "items_alone": alone,
            "items_in_collisions": items - alone,
            "highest_suffix": max(self._sizes, default=0) - 1,
            "groups_by_size": {str(size): self._sizes[size] for size in sorted(self._sizes)},
            "largest_groups": [{"codes": list(codes), "items": size} for size, codes in self._largest],
        }

"""What becomes of an item whose codes have no collision suffix left, by namespace."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

ANY_OTHER = "*"
CANDIDATES = 16
"""Codes of the last level that an item may be placed under, with its own, the first."""


class Overflow(StrEnum):
    """An item's lot when its codes are full."""

    ERROR = "error"
    """Its own error, `suffix_exhausted`."""
    NEXT_NEAREST = "next_nearest"
    """The next-nearest codeword of the last level that has a suffix left."""


class OverflowPolicy:
    """What each namespace is set to."""

    def __init__(self, by_namespace: Mapping[str, Overflow]) -> None:
        """Of these namespaces; `*` stands for all others."""
        self._by_namespace = dict(by_namespace)

    def candidates(self, namespace: str) -> int:
        """How many codes of the last level are to be ranked for an item of this namespace; 0 where none are wanted."""
        default = self._by_namespace.get(ANY_OTHER, Overflow.ERROR)
        return CANDIDATES if self._by_namespace.get(namespace, default) is Overflow.NEXT_NEAREST else 0

"""How many new items of a bulk go into one call: it keeps the server to itself for a few milliseconds."""

from __future__ import annotations

import math
import time

ITEMS_ALONE = 256
ITEMS_BESIDE_OTHERS = 64  # a quarter of the wait for others, and up to twice the time for all
BESIDE_OTHERS_S = 2.0  # since others were last seen


class RunLength:
    """Long runs, while nobody else changes the record; short ones where callers of a few items do.

    That others change it is seen by the revisions between two runs. So many changes at once are another bulk's.
    """

    def __init__(self) -> None:
        self._revision: int | None = None
        self._others_at = -math.inf

    @property
    def items(self) -> int:
        """Of the next run."""
        beside_others = time.monotonic() - self._others_at < BESIDE_OTHERS_S
        return ITEMS_BESIDE_OTHERS if beside_others else ITEMS_ALONE

    def ran(self, revision: int, issued: int) -> None:
        """Learn of a run: the revision after it, and how many IDs it issued, each of which is a change."""
        before = revision - issued
        if self._revision is not None and 0 < before - self._revision < ITEMS_BESIDE_OTHERS:
            self._others_at = time.monotonic()
        self._revision = max(revision, self._revision or 0)

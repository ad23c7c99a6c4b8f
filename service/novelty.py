"""Whether the next content is likely to be new to its record: to ask first would then be a round trip for nothing."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from service.registry import Record

# To encode what is known after all takes several times as long as to ask; so that is for feeds of nothing but new ones.
EXPECTED_SHARE = 0.9
WEIGHT = 1 / 4  # of the latest request in the share: after six to nine of new texts the next one is expected to be new
UNSEEN = 0.5  # the share where nothing came yet


class Novelty:
    """The share of contents that requests of a kind brought anew lately, of each record."""

    def __init__(self) -> None:
        self._shares: WeakKeyDictionary[Record, float] = WeakKeyDictionary()

    def expected(self, record: Record) -> bool:
        """Whether nearly all were."""
        return self._shares.get(record, UNSEEN) > EXPECTED_SHARE

    def unlikely(self, record: Record) -> bool:
        """Whether hardly any were."""
        return self._shares.get(record, UNSEEN) < 1 - EXPECTED_SHARE

    def saw(self, record: Record, share: float) -> None:
        """Learn of a request: the share of its contents that had to be encoded."""
        before = self._shares.get(record, UNSEEN)
        self._shares[record] = before + WEIGHT * (share - before)

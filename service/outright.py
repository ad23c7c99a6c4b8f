"""Whether a request claims its IDs outright, or asks first what its items hold.

An item that is known and unchanged is answered without the model, so a request first asks the registry. Of a few
embeddings that are all new the question costs more than the model, and their claims say as well what stands: while most
that came lately were new, they are claimed at once, one round trip instead of two.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping

from service.batching.lanes import SMALL_ROWS
from service.content import Item

# Beyond this share of known items among those that came lately, the question is the cheaper way.
MOST_KNOWN = 1 / 8
WEIGHT = 1 / 16  # of the latest request

# After a claim that failed the question comes first again: known items can be answered where nothing can be written.
ASKING_S = 5.0


class Outright:
    """What came lately. Nothing is known at first, so it begins with questions."""

    def __init__(self) -> None:
        self._known_share = 1.0
        self._asks_until = 0.0

    def suits(self, items: Mapping[int, Item]) -> bool:
        """Whether these, of one request, are best claimed at once."""
        return (
            self._known_share < MOST_KNOWN
            and _few_embeddings(items)
            and time.monotonic() > self._asks_until
            and len({item.item_id for item in items.values()}) == len(items)  # of two claims the second finds the first
        )

    def learn(self, items: Mapping[int, Item], known: Collection[int]) -> None:
        """Of the items of a request, those at these places were known and unchanged."""
        if _few_embeddings(items):
            self._known_share += WEIGHT * (len(known) / len(items) - self._known_share)

    def failed(self) -> None:
        """The registry took no claim."""
        self._asks_until = time.monotonic() + ASKING_S


def _few_embeddings(items: Mapping[int, Item]) -> bool:
    return 0 < len(items) <= SMALL_ROWS and not any(isinstance(item.content, str) for item in items.values())

"""The old record and the new one beside each other: what both hold, what only one does, and what was retired.

Until the new tokenizer is the default the old record says which items are live: what it retired is retired in the new
one too. Where a call made the old one the default, only from then on: what it retired before, it may have retired after
yet another record, in which the item has come back since.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from service.client import Assignment, ChangesGone, FailedItem, Retired, TokenizerClient
from service.client.batches import batches_of
from service.migration.holdings import Holdings

ITEMS_AT_ONCE = 4096


class Sides(NamedTuple):
    """Both records.

    Attributes:
        old: What the old record holds.
        new: What the new one does.
    """

    old: Holdings
    new: Holdings

    def pairs(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """The old and the new codes, (N, L) and (N, L'), of the items that are live in both."""
        places = self.new.places(self.old.item_ids)
        both = places >= 0
        return self.old.semantic_ids[both, :-1], self.new.semantic_ids[places[both], :-1]

    def missing(self) -> list[tuple[str, str]]:
        """The items that are live in the old record alone, and their old Semantic IDs."""
        return list(self.old.texts(np.flatnonzero(self.new.places(self.old.item_ids) < 0)))

    def only_new(self) -> list[str]:
        """The items that are live in the new record alone."""
        alone = self.old.places(self.new.item_ids) < 0
        return [str(item) for item in self.new.item_ids.filter(pa.array(alone)).to_pylist()]


class Clients:
    """Of the two records.

    Args:
        old: Of the old one.
        new: Of the new one.
        names: The full names of their tokenizers.

    Attributes:
        default: The full name of the default tokenizer, as far as is known; None: it is not.
        retired: Items that were retired in the new record, as the old one had retired them.

    Raises:
        TokenizerError: As any call of the client.
    """

    def __init__(self, old: TokenizerClient, new: TokenizerClient, names: tuple[str, str]) -> None:
        self.old = old
        self.new = new
        self.names = names
        loaded = new.tokenizers()
        self.default: str | None = loaded.default
        self.retired = 0
        self._decides_since = loaded.default_since if loaded.default == names[0] else None

    @property
    def old_decides(self) -> bool:
        """Whether what the old record retired is retired in the new one."""
        return self.default != self.names[1]

    def sides(self) -> Sides:
        """Both records, what the old one had retired taken out of the new one.

        Raises:
            ChangesGone: They change too fast to be read.
            TokenizerError: As any call of the client.
        """
        sides = Sides(Holdings.read(self.old), Holdings.read(self.new))
        self._retire(sides.only_new())
        return self._followed(sides)

    def later(self, sides: Sides) -> Sides:
        """Both records now, read anew where so much has changed that it is no longer kept.

        Raises:
            TokenizerError: As `sides`.
        """
        try:
            return self._followed(sides)
        except ChangesGone:
            return self.sides()

    def retired_in_old(self, item_ids: Iterable[str], since: datetime | None = None) -> list[str]:
        """Those of these items that the old record has retired, surely since then; it may never have had the others."""
        found = []
        for some in batches_of(item_ids, ITEMS_AT_ONCE):
            for item_id, answer in zip(some, self.old.assignments(some, counterparts=False), strict=True):
                retired_at = _retired_at(answer)
                if retired_at is not None and (since is None or retired_at > since):
                    found.append(item_id)
        return found

    def _followed(self, sides: Sides) -> Sides:
        old = sides.old.followed(self.old)
        self._retire(list(old.went))
        return Sides(old.holdings, sides.new.followed(self.new).holdings)

    def _retire(self, item_ids: Iterable[str]) -> None:
        """Retire those of these items in the new record that are retired in the old one."""
        if self.old_decides:
            answers = self.new.retire_all(self.retired_in_old(item_ids, self._decides_since))
            self.retired += sum(isinstance(answer, Assignment) for answer in answers)


def _retired_at(answer: Assignment | FailedItem) -> datetime | None:
    """The second in which an item was retired; None where it was not."""
    if isinstance(answer, Assignment) or answer.error.slug not in Retired.slugs:
        return None
    return datetime.fromisoformat(answer.error.members["retired_at"])

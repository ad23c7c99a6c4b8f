"""The old record and the new one beside each other: what both hold, what only one does, and what was retired.

Until the default is switched the old record says which items are live: what it retired is retired in the new one too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from service.client import Assignment, FailedItem, Retired, TokenizerClient
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


@dataclass
class Clients:
    """Of the two records, and what was retired in the new one so far.

    Attributes:
        old: Of the old one.
        new: Of the new one.
        old_decides: Whether what the old one retired is retired in the new one; not where the new one is the default,
            since what is live is said there by then.
        retired: Items that were retired in the new record, as the old one had retired them.
    """

    old: TokenizerClient
    new: TokenizerClient
    old_decides: bool = True
    retired: int = 0

    def sides(self) -> Sides:
        """Both records, what the old one had retired taken out of the new one.

        Raises:
            TokenizerError: As any call of the client.
        """
        old, new = Holdings.read(self.old), Holdings.read(self.new)
        self.retire(Sides(old, new).only_new())
        return self.followed(Sides(old, new))

    def followed(self, sides: Sides) -> Sides:
        """Both records now; what was retired in the old one meanwhile is retired in the new one.

        Raises:
            ChangesGone: One of them no longer keeps all changes since.
            TokenizerError: As any call of the client.
        """
        old = sides.old.followed(self.old)
        self.retire(list(old.went))
        return Sides(old.holdings, sides.new.followed(self.new).holdings)

    def retire(self, item_ids: Iterable[str]) -> None:
        """Retire those of these items in the new record that are retired in the old one; it may never have had them."""
        if not self.old_decides:
            return
        for some in batches_of(item_ids, ITEMS_AT_ONCE):
            held = self.old.assignments(some, counterparts=False)
            gone = [each.item_id for each in held if isinstance(each, FailedItem) and each.error.slug in Retired.slugs]
            answers = self.new.retire_all(map(str, gone))
            self.retired += sum(isinstance(answer, Assignment) for answer in answers)

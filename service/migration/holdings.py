"""What the items of a record hold, at one revision, read through the API while it changes.

GET /trie --> every live ID --> POST /lookup --> its item --> GET /changes --> what came and went meanwhile
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from service.client import Assignment, Change, ChangesGone, Retired, TokenizerClient

IDS_AT_ONCE = 8192
ATTEMPTS = 3
COMING = frozenset({"assigned", "returned"})


class Followed(NamedTuple):
    """Holdings at a later revision.

    Attributes:
        holdings: What is held then.
        came: Item id -> the Semantic ID that it holds since, of every item that changed and is live.
        went: Item id -> the Semantic ID that it held, of every item that changed and is not.
    """

    holdings: Holdings
    came: Mapping[str, str]
    went: Mapping[str, str]


@dataclass(frozen=True)
class Holdings:
    """The live items of a record; some 30 bytes an item, and its id.

    Attributes:
        epoch: Which history of the record the revision is of.
        revision: Up to which all changes are in it.
        item_ids: (N,) large strings.
        semantic_ids: (N, L + 1) int32, what they hold.
    """

    epoch: str
    revision: int
    item_ids: pa.LargeStringArray
    semantic_ids: NDArray[np.int32]

    @classmethod
    def read(cls, client: TokenizerClient) -> Holdings:
        """What is live in the record of this client's namespace and tokenizer.

        Raises:
            ChangesGone: So many changes came meanwhile that the record no longer keeps them, time and again.
            TokenizerError: As any call of the client.
        """
        for attempt in range(1, ATTEMPTS + 1):
            snapshot = client.trie()
            trie = snapshot.read()
            ids = trie.semantic_ids().numpy().astype(np.int32)
            parts = [_holders(client, ids[at : at + IDS_AT_ONCE]) for at in range(0, len(ids), IDS_AT_ONCE)]
            then = cls(snapshot.epoch, snapshot.revision, pa.concat_arrays([_strings(()), *parts]), ids)
            try:
                return then.followed(client).holdings
            except ChangesGone:
                if attempt == ATTEMPTS:
                    raise
        raise AssertionError

    def __len__(self) -> int:
        """N."""
        return len(self.item_ids)

    def followed(self, client: TokenizerClient) -> Followed:
        """What is held now, by the changes since.

        Raises:
            ChangesGone: The record no longer keeps them, or went on from an older one.
            TokenizerError: As any call of the client.
        """
        revision, latest = self.revision, {}
        for change in client.changes(self.revision, epoch=self.epoch or None, follow=False):
            revision = change.revision
            if change.change != "replaced":  # what came instead has its own change
                latest[change.item_id] = change
        came = {item: change.semantic_id for item, change in latest.items() if change.change in COMING}
        went = {item: change.semantic_id for item, change in latest.items() if change.change not in COMING}
        return Followed(self._changed(latest, came, revision), came, went)

    def places(self, item_ids: pa.Array) -> NDArray[np.int64]:
        """Where items (M,) stand among these, (M,); -1 where an item is none of them."""
        return np.asarray(pc.fill_null(pc.index_in(item_ids, value_set=self.item_ids), -1)).astype(np.int64)

    def texts(self, places: NDArray[np.int64]) -> Iterable[tuple[str, str]]:
        """The item ids and Semantic IDs at these places (M,)."""
        item_ids = self.item_ids.take(pa.array(places)).to_pylist()
        return zip(item_ids, _written(self.semantic_ids[places]), strict=True)

    def _changed(self, latest: Mapping[str, Change], came: Mapping[str, str], revision: int) -> Holdings:
        if not latest:
            return Holdings(self.epoch, revision, self.item_ids, self.semantic_ids)
        stays = np.asarray(pc.invert(pc.is_in(self.item_ids, value_set=_strings(latest))))
        numbers = [[*map(int, semantic_id.split("-"))] for semantic_id in came.values()]
        new = np.array(numbers, np.int32).reshape(len(came), self.semantic_ids.shape[1])
        item_ids = pa.concat_arrays([self.item_ids.filter(pa.array(stays)), _strings(came)])
        return Holdings(self.epoch, revision, item_ids, np.concatenate([self.semantic_ids[stays], new]))


def _strings(texts: Iterable[str]) -> pa.LargeStringArray:
    return pa.array(list(texts), pa.large_string())


def _holders(client: TokenizerClient, semantic_ids: NDArray[np.int32]) -> pa.LargeStringArray:
    """Whose these IDs (n, L + 1) are. One that was live a moment ago has an item, whatever became of it since."""
    texts = list(_written(semantic_ids))
    found = []
    for text, answer in zip(texts, client.lookup(texts, counterparts=False), strict=True):
        if isinstance(answer, Assignment):
            found.append(answer.item_id)
            continue
        if answer.error.slug not in Retired.slugs:
            raise ValueError(f"{text} was live, and is answered by {answer.error.title}: {answer.error.detail}")
        found.append(str(answer.error.members["item_id"]))
    return _strings(found)


def _written(semantic_ids: NDArray[np.int32]) -> Iterable[str]:
    """IDs (n, L + 1) as texts."""
    return ("-".join(map(str, numbers)) for numbers in semantic_ids.tolist())

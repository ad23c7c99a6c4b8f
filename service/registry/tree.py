"""The live tree of a record: which codes lead to a live item, and the items under a prefix.

What stands under a prefix lies in one bucket (see `lib.lua`), so that each step down is one small read, whatever
the size of the catalogue.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING, NamedTuple

from service.errors import RegistryUnavailable
from service.registry.assignment import read_holder, read_semantic_id
from service.semantic_id import SemanticId

if TYPE_CHECKING:
    from service.registry.history import History
    from service.registry.keys import RecordKeys

Codes = tuple[int, ...]
FIELDS_PER_SCAN = 10_000
BUCKETS_PER_READ = 64
ATTEMPTS = 10
_SPECIAL = frozenset(b"*?[\\")  # in a pattern


class Page(NamedTuple):
    """Live Semantic IDs in order, and whether more follow."""

    semantic_ids: list[SemanticId]
    more: bool


class LiveTree:
    """Reads the live tree of one record."""

    def __init__(self, history: History, keys: RecordKeys, flush: Callable[[], Awaitable[None]]) -> None:
        """Reads the tree; `flush` returns when its counts have every change that could be seen."""
        self._history = history
        self._flush = flush
        self._keys = keys
        self._layout = keys.layout
        self._levels = len(keys.layout.codebook_sizes)

    async def children(self, prefixes: Sequence[Codes]) -> list[dict[int, int]]:
        """The codes that follow each prefix to a live item, in order, and how many live items they lead to.

        What follows the codes of all levels are suffixes. A dead prefix has no children.

        Raises:
            ValueError: A prefix that the tokenizer does not have.
            RegistryUnavailable: The server cannot be reached.
        """
        found = await self._under(prefixes)
        return [
            self._counts(len(prefix), fields) if len(prefix) < self._levels - 1 else _count_ids(len(prefix), ids)
            for prefix, fields, ids in zip(prefixes, found, map(self._live_ids, found), strict=True)
        ]

    async def page(self, prefix: Codes, limit: int, after: SemanticId | None = None) -> Page:
        """The first live Semantic IDs under a prefix, beyond `after` where it is given; one step a level.

        Raises:
            ValueError: As in `children`.
            RegistryUnavailable: The server cannot be reached.
        """
        truncated = True
        semantic_ids: list[SemanticId] = []
        attempts = 0
        while truncated and not semantic_ids:  # again, where all that was counted has gone in the meantime
            if attempts:
                await self._flush()  # the count may be of changes that nobody has told yet
            if attempts == ATTEMPTS:
                raise RegistryUnavailable("The record changes faster than a page of it can be read.")
            attempts += 1
            front, truncated = [prefix], False
            while front and len(front[0]) < self._levels - 1:
                children = await self.children(front)
                front, cut = _first_enough(front, children, limit, after)
                truncated = truncated or cut
            found = sorted(chain.from_iterable(map(self._live_ids, await self._under(front))))
            semantic_ids = [semantic_id for semantic_id in found if after is None or semantic_id > after]
        return Page(semantic_ids[:limit], truncated or len(semantic_ids) > limit)

    async def scan(self) -> AsyncIterator[list[bytes]]:
        """All packed live IDs, the buckets a few at a time; one that is live throughout is found.

        Raises:
            RegistryUnavailable: The server cannot be reached.
        """
        pattern = b"?" * (self._layout.width + 1) + b"*"
        remaining = self._keys.reverse_buckets()
        while buckets := list(islice(remaining, BUCKETS_PER_READ)):
            found = await self._matching([(bucket, pattern) for bucket in buckets])
            yield list(chain.from_iterable(map(self._live, found)))

    async def holders(self, buckets: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
        """All packed IDs of these buckets, dead ones too, and what stands for them.

        Raises:
            RegistryUnavailable: The server cannot be reached.
        """
        pattern = b"?" * (self._layout.width + 1) + b"*"
        found = await self._matching([(bucket, pattern) for bucket in buckets])
        return [
            (field, holder) for fields in found for field, holder in fields.items() if len(field) > self._layout.width
        ]

    async def _under(self, prefixes: Sequence[Codes]) -> list[dict[bytes, bytes]]:
        """The fields that stand right under each prefix: child prefixes, or from the last level on Semantic IDs."""
        return await self._matching([self._place(self._layout.pack_prefix(prefix)) for prefix in prefixes])

    def _place(self, packed: bytes) -> tuple[bytes, bytes]:
        """The bucket of what stands under a packed prefix, and the pattern of its fields."""
        inner = len(packed) < self._layout.width - self._layout.bytes_per_code
        if inner:
            return self._keys.under(packed), _literally(packed) + b"?" * self._layout.bytes_per_code
        return self._keys.reverse(packed), _literally(packed) + b"?" * (self._layout.width - len(packed) + 1) + b"*"

    async def _matching(self, places: Sequence[tuple[bytes, bytes]]) -> list[dict[bytes, bytes]]:
        """The fields that match a pattern, of each bucket; one in listpack encoding is read at once."""
        found: list[dict[bytes, bytes]] = [{} for _ in places]
        cursors = dict.fromkeys(range(len(places)), 0)
        while cursors:
            commands = [
                ("HSCAN", places[i][0], cursor, "MATCH", places[i][1], "COUNT", FIELDS_PER_SCAN)
                for i, cursor in cursors.items()
            ]
            answers = await self._history.read(commands)
            for i, (_, fields) in zip(cursors, answers, strict=True):
                found[i].update(fields)
            cursors = {i: cursor for i, (cursor, _) in zip(cursors, answers, strict=True) if cursor}
        return found

    def _counts(self, depth: int, fields: dict[bytes, bytes]) -> dict[int, int]:
        """Child codes and their live counts, from the fields under an inner prefix."""
        start = depth * self._layout.bytes_per_code
        return dict(sorted((int.from_bytes(field[start:]), int(count)) for field, count in fields.items()))

    def _live_ids(self, fields: dict[bytes, bytes]) -> list[SemanticId]:
        """The live Semantic IDs among fields."""
        return [read_semantic_id(field, self._layout) for field in self._live(fields)]

    def _live(self, fields: dict[bytes, bytes]) -> list[bytes]:
        """The same, packed."""
        return [field for field, holder in fields.items() if len(field) > self._layout.width and read_holder(holder)[1]]


def _count_ids(depth: int, semantic_ids: Sequence[SemanticId]) -> dict[int, int]:
    """How many IDs have each number at this place."""
    counts: dict[int, int] = {}
    for number in sorted((*semantic_id.codes, semantic_id.suffix)[depth] for semantic_id in semantic_ids):
        counts[number] = counts.get(number, 0) + 1
    return counts


def _first_enough(
    prefixes: Sequence[Codes], children: Sequence[dict[int, int]], limit: int, after: SemanticId | None
) -> tuple[list[Codes], bool]:
    """The first child prefixes that lead to more than `limit` IDs beyond `after`, and whether some were left out."""
    chosen: list[Codes] = []
    enough = 0
    for prefix, codes in zip(prefixes, children, strict=True):
        for code, count in codes.items():
            child = (*prefix, code)
            passed = after.codes[: len(child)] if after else ()
            if passed and child < passed:
                continue
            if enough > limit:
                return chosen, True
            chosen.append(child)
            enough += 0 if child == passed else count  # of a prefix half passed, nobody knows how many remain
    return chosen, False


def _literally(packed: bytes) -> bytes:
    """The bytes as a pattern that matches just them."""
    return b"".join(b"\\%c" % byte if byte in _SPECIAL else b"%c" % byte for byte in packed)

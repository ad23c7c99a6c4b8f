"""The live tree of a record: which codes lead to a live item, and the items under a prefix.

The IDs under a prefix stand in few nodes (see `lib.lua`): those on its path, mostly one, and those below where the last
of these is full. What stands in a node lies in one bucket, so that each step is a small read, whatever the size of the
catalogue. Nodes are only ever added, and an ID stays in its own: what stood there before is found, whatever comes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
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


class _Under(NamedTuple):
    """What stands under a prefix.

    Attributes:
        packed: The live IDs that stand in nodes on its path.
        below: The codes that follow it to a node with live IDs, which are not among these.
    """

    packed: list[bytes]
    below: list[int]


class LiveTree:
    """Reads the live tree of one record."""

    def __init__(self, history: History, keys: RecordKeys, flush: Callable[[], Awaitable[None]]) -> None:
        """Reads the tree; `flush` returns when its counts have every change that could be seen."""
        self._history = history
        self._flush = flush
        self._keys = keys
        self._layout = keys.layout
        self._levels = len(keys.layout.codebook_sizes)
        self._codes_width = len(keys.field(0, bytes(keys.layout.width)))  # of a field that is packed codes

    async def following(self, prefixes: Sequence[Codes]) -> list[list[int]]:
        """The codes that follow each prefix to a live item, in order; a dead prefix has none.

        What follows the codes of all levels are suffixes.

        Raises:
            ValueError: A prefix that the tokenizer does not have.
            RegistryUnavailable: The server cannot be reached.
        """
        found = zip(prefixes, await self._under(prefixes), strict=True)
        return [sorted({*under.below, *self._numbers_at(len(prefix), under.packed)}) for prefix, under in found]

    async def children(self, prefixes: Sequence[Codes]) -> list[dict[int, int]]:
        """The same codes, and how many live items each leads to.

        Raises:
            ValueError, RegistryUnavailable: As in `following`.
        """
        found = await self._under(prefixes)
        counts = iter(await self._live_in(_nodes_below(prefixes, found)))
        children = []
        for prefix, under in zip(prefixes, found, strict=True):
            live = Counter(self._numbers_at(len(prefix), under.packed))
            for code in under.below:
                live[code] += next(counts)
            children.append({code: live[code] for code in sorted(live) if live[code]})
        return children

    async def page(self, prefix: Codes, limit: int, after: SemanticId | None = None) -> Page:
        """The first live Semantic IDs under a prefix, beyond `after` where it is given; one step a node on the way.

        Raises:
            ValueError: As in `following`.
            RegistryUnavailable: The server cannot be reached.
        """
        for attempt in range(ATTEMPTS):
            if attempt:
                await self._flush()  # the count may be of changes that nobody has told yet
            found, truncated = await self._first(prefix, limit, after)
            if found or not truncated:  # else again: all that was counted has gone in the meantime
                return Page(found[:limit], truncated or len(found) > limit)
        raise RegistryUnavailable("The record changes faster than a page of it can be read.")

    async def _first(self, prefix: Codes, limit: int, after: SemanticId | None) -> tuple[list[SemanticId], bool]:
        """The first IDs beyond `after`, more than `limit` where there are, and whether some were left out."""
        front, found = [prefix], await self._under([prefix])
        semantic_ids: list[SemanticId] = []
        truncated = False
        while True:
            packed = chain.from_iterable(under.packed for under in found)
            semantic_ids += [read_semantic_id(one, self._layout) for one in packed]
            semantic_ids = sorted(one for one in semantic_ids if after is None or one > after)
            nodes = _nodes_below(front, found)
            front, left_out = _first_enough(nodes, await self._live_in(nodes), semantic_ids, limit, after)
            if left_out:
                truncated = True
                semantic_ids = [one for one in semantic_ids if one.codes[: len(left_out)] < left_out]
            if not front:
                return semantic_ids, truncated
            found = await self._in_nodes([(node, node) for node in front])

    async def scan(self) -> AsyncIterator[list[bytes]]:
        """All packed live IDs, the buckets a few at a time; one that is live throughout is found.

        Raises:
            RegistryUnavailable: The server cannot be reached.
        """
        remaining = self._keys.reverse_buckets()
        while buckets := list(islice(remaining, BUCKETS_PER_READ)):
            yield [semantic_id for semantic_id, holder in await self.holders(buckets) if read_holder(holder)[1]]

    async def holders(self, buckets: Sequence[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        """All packed IDs of these buckets, dead ones too, and what stands for them.

        Args:
            buckets: The first code and the key of each, as `RecordKeys.reverse_buckets` tells them.

        Raises:
            RegistryUnavailable: The server cannot be reached.
        """
        pattern = b"?" * (self._codes_width + 1) + b"*"
        found = await self._matching([(key, pattern) for _, key in buckets])
        return [
            (first_code + field[1:], holder)
            for (first_code, _), fields in zip(buckets, found, strict=True)
            for field, holder in fields.items()
            if len(field) > self._codes_width
        ]

    async def _under(self, prefixes: Sequence[Codes]) -> list[_Under]:
        """What stands under each prefix: in the nodes on its path, of which those after the first are few."""
        top, *deeper = self._keys.node_depths
        paths = [(i, prefix[:depth]) for i, prefix in enumerate(prefixes) for depth in deeper if depth <= len(prefix)]
        fields = await self._history.read([("HGET", *self._node(node)) for _, node in paths]) if paths else []
        looked = [(i, prefix[:top]) for i, prefix in enumerate(prefixes)]
        looked += [place for place, field in zip(paths, fields, strict=True) if field is not None]
        in_nodes = await self._in_nodes([(node, prefixes[i]) for i, node in looked])
        found = [_Under([], []) for _ in prefixes]
        for (i, _), (packed, below) in zip(looked, in_nodes, strict=True):
            found[i].packed.extend(packed)
            found[i].below.extend(below)
        return found

    async def _in_nodes(self, looked: Sequence[tuple[Codes, Codes]]) -> list[_Under]:
        """What stands in nodes, or at the root and first codes beside them, of what begins with a prefix.

        Args:
            looked: The prefix of each node, and one that begins with it.
        """
        read = [(self._layout.pack_prefix(node), self._layout.pack_prefix(prefix)) for node, prefix in looked]
        places = [(self._keys.under(node), self._pattern(node, prefix)) for node, prefix in read]
        found = []
        for (node, prefix), fields in zip(read, await self._matching(places), strict=True):
            below = self._codes_below(node, fields) if node == prefix else []
            first_code = self._keys.first_code(prefix)
            live = [
                first_code + field[1:]
                for field, holder in fields.items()
                if len(field) > self._codes_width and read_holder(holder)[1]
            ]
            found.append(_Under(live, below))
        return found

    def _pattern(self, node: bytes, prefix: bytes) -> bytes:
        """Of the fields in a node that begin with a packed prefix."""
        if self._is_root(node):
            return b"*"
        return _literally(self._keys.field(len(node) // self._layout.bytes_per_code, prefix)) + b"*"

    def _is_root(self, prefix: bytes) -> bool:
        return not prefix and self._levels > 1

    def _codes_below(self, node: bytes, fields: Iterable[bytes]) -> list[int]:
        """The codes that follow a packed prefix to nodes with live IDs, by the fields that begin with it."""
        size = self._layout.bytes_per_code
        if len(node) + size == self._layout.width:
            return []  # there is no node below, and a field of that length is a counter
        length = size if self._is_root(node) else len(self._keys.field(0, node)) + size
        return sorted(int.from_bytes(field[-size:]) for field in fields if len(field) == length)

    def _numbers_at(self, depth: int, packed: Iterable[bytes]) -> Iterator[int]:
        """The number that each packed ID has at this place."""
        size, width = self._layout.bytes_per_code, self._layout.width
        if depth == self._levels:
            return (int(semantic_id[width:]) for semantic_id in packed)
        first = depth * size
        return (int.from_bytes(semantic_id[first : first + size]) for semantic_id in packed)

    def _node(self, prefix: Codes) -> tuple[bytes, bytes]:
        """Where it is told what is known of a node: under the first codes alone, at the root."""
        packed = self._layout.pack_prefix(prefix)
        if len(packed) == self._layout.bytes_per_code:
            return self._keys.root, packed
        return self._keys.under(packed), self._keys.field(len(prefix), packed)

    async def _live_in(self, nodes: Sequence[Codes]) -> list[int]:
        """How many live IDs stand in each node and below it, or begin with a first code."""
        fields: dict[bytes, list[bytes]] = defaultdict(list)
        for key, field in map(self._node, nodes):
            fields[key].append(field)
        answers = await self._history.read([("HMGET", key, *of_key) for key, of_key in fields.items()]) if nodes else []
        told = {key: iter(answer) for key, answer in zip(fields, answers, strict=True)}
        return [_live(next(told[key])) for key, _ in map(self._node, nodes)]

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


def _live(told: bytes | None) -> int:
    """The number of live IDs, by what is told of a node, see `lib.lua`."""
    return int((told or b"0").rstrip(b"+").partition(b",")[0])


def _nodes_below(prefixes: Sequence[Codes], found: Sequence[_Under]) -> list[Codes]:
    """The prefixes of the nodes below, in order."""
    return [(*prefix, code) for prefix, under in zip(prefixes, found, strict=True) for code in under.below]


def _first_enough(
    nodes: Sequence[Codes], counts: Sequence[int], known: Sequence[SemanticId], limit: int, after: SemanticId | None
) -> tuple[list[Codes], Codes | None]:
    """The first nodes that lead, with IDs known before them, to more than `limit`; and the next, if some are left out.

    Args:
        nodes: Their prefixes, of one length, ascending.
        counts: The live IDs in each.
        known: IDs beyond `after` that are in none of them, ascending.
        limit: Of the page.
        after: What the page goes on from.
    """
    chosen: list[Codes] = []
    counted = 0
    for node, count in zip(nodes, counts, strict=True):
        passed = after.codes[: len(node)] if after else ()
        if passed and node < passed:
            continue
        if counted + bisect_left(known, SemanticId(node, -1)) > limit:
            return chosen, node
        chosen.append(node)
        counted += 0 if node == passed else count  # of a node half passed, nobody knows how many remain
    return chosen, None


def _literally(packed: bytes) -> bytes:
    """The bytes as a pattern that matches just them."""
    return b"".join(b"\\%c" % byte if byte in _SPECIAL else b"%c" % byte for byte in packed)

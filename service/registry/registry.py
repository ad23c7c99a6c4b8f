"""The server of the durable records, and the records in it."""

from __future__ import annotations

import secrets
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from service.errors import RegistryRefused
from service.registry.cluster import Cluster, Server, open_server
from service.registry.durability import Durability
from service.registry.history import Comparison, History, accept, compare
from service.registry.keys import RecordKeys, meta_key
from service.registry.marks import Marks
from service.registry.record import Record
from service.registry.steps import lost_outboxes
from service.semantic_id import MAX_SUFFIX, CodeLayout

if TYPE_CHECKING:
    from collections.abc import Sequence

SCHEMA = 4
DEFAULT_BUCKETS = 16_384
DEFAULT_CHANGES_KEPT = 100_000
RECORDS_KEPT = 1024


class Registry:
    """A server of the Redis protocol, and the records in it."""

    def __init__(self, server: Server, buckets: int, changes_kept: int, marks: Marks, *, display_bytes: int) -> None:
        """Use `connect`."""
        self._display_bytes = display_bytes
        self._server = server
        self._buckets = buckets
        self._changes_kept = changes_kept
        self._marks = marks
        self._whole_at = -1  # the servers of a cluster as they were when nothing was missing
        self._histories: dict[str, History] = {}
        self._records: dict[tuple[str, str, tuple[int, ...], int], Record] = {}

    @classmethod
    async def connect(
        cls,
        url: str,
        *,
        durability: Durability | str = Durability.FSYNC,
        timeout_ms: int = 2000,
        retry_ms: int = 1000,
        buckets: int = DEFAULT_BUCKETS,
        changes_kept: int = DEFAULT_CHANGES_KEPT,
        replicas: int = 1,
        marks: Marks | None = None,
        display_bytes: int = 0,
    ) -> Registry:
        """Connects, and checks that the server can keep what `durability` promises.

        Args:
            url: `redis://`, `rediss://`, `unix://`, of sentinels (see `connections`) or of a cluster (see `cluster`).
            durability: What an acknowledgement waits for.
            timeout_ms: How long one call may take.
            retry_ms: How long a dropped or refused connection is tried again, as after a restart of the server.
            buckets: The number of buckets of a new record; one that exists keeps its own.
            changes_kept: How many changes of a record are kept for its followers, at least.
            replicas: How many replicas have to have received what is acknowledged; only under `replicated`.
            marks: How far each record had come; in memory alone where None.
            display_bytes: UTF-8 bytes of the titles of items that are kept; 0: none are.

        Raises:
            RegistryRefused: The server cannot keep the promise; the message names the setting to change.
            RegistryUnavailable: The server cannot be reached, or does not serve yet.
        """
        if not 1 <= buckets <= 2**32:
            raise RegistryRefused(f"A record has 1 to 2**32 buckets, not {buckets}.")
        server = open_server(url, durability, timeout_ms, retry_ms, replicas=replicas)
        try:
            await server.call(server.check)
        except BaseException:
            await server.close()
            raise
        return cls(server, buckets, changes_kept, marks or Marks(), display_bytes=display_bytes)

    async def ping(self) -> None:
        """Returns where the server takes writes as durable as promised, and is not older than what was acknowledged.

        Raises:
            RegistryUnavailable: It does not.
            RegistryOlder: It is, in a record that has a mark or was asked for since the start.
        """
        await self._server.call(self._server.ping, retried=False)
        histories = {**self._histories}
        for name in self._marks.names() - histories.keys():  # of services before this one
            histories[name] = History(self._server, name, meta_key(name), self._marks, b"")
        questions = [history.question() for history in histories.values()]
        answers = await self._server.read([question for question, _ in questions])
        for history, (_, known), fields in zip(histories.values(), questions, answers, strict=True):
            history.answer(known, fields)
        if isinstance(self._server, Cluster) and self._whole_at != self._server.generation:
            generation = self._server.generation
            for name, history in histories.items():
                if parts := await self._lost_parts(self._server, name):
                    history.lost_a_part(parts)
            self._whole_at = generation

    async def compare(self) -> list[Comparison]:
        """All records, there or known from their marks, beside the marks.

        Raises:
            RegistryUnavailable: The server cannot be reached.
        """
        found = await compare(self._server, self._marks)
        if not isinstance(self._server, Cluster):
            return found
        return [one._replace(parts=await self._lost_parts(self._server, one.name)) for one in found]

    async def accept(self, comparison: Comparison) -> bool:
        """Begins a new epoch of a record that is older than its marks; False where it has changed since.

        On a cluster, what its servers still have is made whole first.

        Raises:
            RegistryUnavailable: The server cannot be reached.
        """
        if isinstance(self._server, Cluster):
            await self._mend(comparison)
        return await accept(self._server, comparison)

    async def _mend(self, comparison: Comparison) -> None:
        sizes, buckets = await self._layout_of(comparison.name)
        if sizes:
            await self._require_schema(comparison.name)
            keys = RecordKeys(comparison.name, CodeLayout(sizes), buckets)
            history = History(self._server, keys.name, keys.meta, Marks(), comparison.found.epoch)
            record = Record(self._server, keys, history, max_suffix=MAX_SUFFIX, changes_kept=self._changes_kept)
            await record.mend()

    async def _require_schema(self, name: str) -> None:
        """What another schema wrote is not touched."""
        ((schema,),) = await self._server.read([("HMGET", meta_key(name), "schema")])
        if schema != b"%d" % SCHEMA:
            raise RegistryRefused(
                f"The record {name} has schema {(schema or b'').decode()}, this service schema {SCHEMA}."
            )

    async def _lost_parts(self, cluster: Cluster, name: str) -> int:
        """Under how many of its first codes a server has lost IDs of a record."""
        sizes, buckets = await self._layout_of(name)
        return len(await lost_outboxes(cluster, RecordKeys(name, CodeLayout(sizes), buckets))) if sizes else 0

    async def _layout_of(self, name: str) -> tuple[list[int], int]:
        """The codebook sizes and the buckets of the record with this name; none where there is no record."""
        ((sizes, buckets),) = await self._server.read([("HMGET", meta_key(name), "codebook_sizes", "buckets")])
        return ([int(size) for size in sizes.split(b",")], int(buckets)) if sizes and buckets else ([], 0)

    async def close(self) -> None:
        """Sends what still waits, then closes the connections."""
        for record in self._records.values():
            await record.drain()
        await self._server.close()

    async def record(
        self,
        namespace: str,
        fingerprint: str,
        codebook_sizes: Sequence[int],
        *,
        max_suffix: int | None = None,
        create: bool = True,
    ) -> Record:
        """The record of one namespace under one tokenizer.

        Args:
            namespace: An independent catalogue.
            fingerprint: The tokenizer's.
            codebook_sizes: The number of codewords of each of its levels.
            max_suffix: The highest suffix that it may issue; without bound where None.
            create: Whether a record that does not exist yet is made; reading alone should leave nothing behind.

        Raises:
            ValueError: The namespace, the fingerprint or the sizes cannot name a record.
            RegistryRefused: The record in the server was made with other codebook sizes or by another schema.
            RegistryOlder: It was older than what was acknowledged at an earlier call, and still is.
            RegistryUnavailable: The server cannot be reached.
        """
        highest = MAX_SUFFIX if max_suffix is None else max_suffix
        name = (namespace, fingerprint, tuple(codebook_sizes), highest)
        if await self._stands(name):
            return self._records[name]
        layout = CodeLayout(codebook_sizes)
        keys = RecordKeys(_name(namespace, fingerprint), layout, self._buckets)
        facts = await self._server.call(partial(self._facts_of, keys, create=create))
        if facts is not None:
            keys = RecordKeys(keys.name, layout, facts.buckets)
        history = History(self._server, keys.name, keys.meta, self._marks, facts.epoch if facts else b"")
        record = Record(
            self._server,
            keys,
            history,
            max_suffix=highest,
            changes_kept=self._changes_kept,
            display_bytes=self._display_bytes,
        )
        if facts is not None or history.marked:
            self._histories[keys.name] = history
        if facts is None:
            return record  # where nothing will be found
        self._forget_idle_records()
        if name in self._records and self._records[name].history.ended:
            del self._records[name]
        # Another caller may have been faster, and both must share one queue to be merged.
        return self._records.setdefault(name, record)

    async def _stands(self, name: tuple[str, str, tuple[int, ...], int]) -> bool:
        """Whether a record is known, and of its latest epoch."""
        if name not in self._records:
            return False
        history = self._records[name].history
        if history.doubted:
            await history.look()
        return not history.ended and name in self._records

    def _forget_idle_records(self) -> None:
        """Keeps memory bounded however many namespaces are named; a record is cheap to make again."""
        if len(self._records) >= RECORDS_KEPT:
            self._records = {name: record for name, record in self._records.items() if not record.idle}
            self._histories = {record.history.name: record.history for record in self._records.values()}

    async def _facts_of(self, keys: RecordKeys, *, create: bool) -> _Facts | None:
        """What the record is known by, after comparing it with ours; None where there is no record."""
        ours = {
            "schema": str(SCHEMA),
            "codebook_sizes": ",".join(map(str, keys.layout.codebook_sizes)),
            "buckets": str(keys.buckets),
            "epoch": secrets.token_hex(8),
        }
        key = keys.meta
        read = ("HMGET", key, *ours)
        theirs = await self._server.command(*read)
        if None in theirs:
            lost = theirs[-1] is None and bool(self._marks.of(keys.name))
            if lost or not create:
                return None
            # Each fact is set once; who comes second reads what the first wrote.
            set_once = [("HSETNX", key, name, value) for name, value in ours.items()]
            theirs = (await self._server.pipelined([*set_once, read]))[-1]
        schema, codebook_sizes, buckets, epoch = (value.decode() for value in theirs)
        if (schema, codebook_sizes) != (ours["schema"], ours["codebook_sizes"]):
            raise RegistryRefused(
                f"The record {keys.name} has schema {schema} and codebooks {codebook_sizes}, this service schema "
                f"{ours['schema']} and codebooks {ours['codebook_sizes']}: another tokenizer or version made it."
            )
        return _Facts(int(buckets), epoch.encode())


class _Facts(NamedTuple):
    buckets: int
    epoch: bytes


def _name(namespace: str, fingerprint: str) -> str:
    if not namespace or not fingerprint or ":" in fingerprint or set("{}") & set(namespace + fingerprint):
        # Braces would be a hash tag; with a colon in the fingerprint two records could share keys.
        raise ValueError(f"these cannot name a record: namespace {namespace!r}, fingerprint {fingerprint!r}")
    return f"{namespace}:{fingerprint}"

"""Every assignment, retirement, return and replacement has the next revision, and is told in order."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from service.errors import ChangesGone, Overloaded
from service.registry import Registry, changes
from service.registry.assignment import Claim
from service.registry.record import Record
from service.semantic_id import SemanticId
from tests.valkey import Valkey

Connect = Callable[..., Awaitable[Registry]]
MakeEmbedding = Callable[[int], list[float]]
TYPE = "urn:semid:problem:"
FINGERPRINT = "0123456789abcdef"
SIZES = (256, 256, 256)
CODES = (44, 2, 3)
OTHER_CODES = (44, 44, 44)  # commas, once packed
FIRST, SECOND, OTHER = SemanticId(CODES, 0), SemanticId(CODES, 1), SemanticId(OTHER_CODES, 0)


def claim(item_id: str, codes: tuple[int, ...] = CODES, content: str = "content", *, reassign: bool = False) -> Claim:
    return Claim(item_id, codes, f"{content:>8}".encode()[:8], reassign)


async def follow(record: Record, after: int = 0, limit: int = 1000) -> list[tuple[Any, ...]]:
    return [tuple(change) for change in (await record.changes.after(after, limit)).changes]


@pytest.fixture
async def record(shared_valkey: Valkey, connect: Connect, namespace: str) -> Record:
    return await (await connect(shared_valkey.url)).record(namespace, FINGERPRINT, SIZES)


async def test_a_life_is_told_in_order(record: Record) -> None:
    await record.claim([claim("a"), claim("b")])
    await record.retire(["a"])
    await record.claim([claim("b", OTHER_CODES, "new", reassign=True), claim("a")])
    await record.claim([claim("b", CODES, "old", reassign=True)])

    assert await follow(record) == [
        (1, "assigned", "a", FIRST, None),
        (2, "assigned", "b", SECOND, None),
        (3, "retired", "a", FIRST, None),
        (4, "assigned", "b", OTHER, None),
        (5, "replaced", "b", SECOND, OTHER),
        (6, "returned", "a", FIRST, None),
        (7, "returned", "b", SECOND, None),
        (8, "replaced", "b", OTHER, SECOND),
    ]
    assert await record.changes.revision() == 8


async def test_what_changes_nothing_has_no_revision(record: Record) -> None:
    await record.claim([claim("a")])

    await record.claim([claim("a"), claim("a", OTHER_CODES, "new")])
    await record.retire(["a", "a", "nobody"])
    await record.retire(["a"])

    assert [change[1] for change in await follow(record)] == ["assigned", "retired"]


async def test_a_follower_goes_on_where_it_was(record: Record) -> None:
    for start in range(0, 3000, 700):  # entries of the log with many changes each
        await record.claim([claim(f"{item}", (item % 256, 0, 0)) for item in range(start, start + 700)])

    revisions: list[int] = []
    while found := await follow(record, revisions[-1] if revisions else 0, 333):
        assert len(found) <= 333
        revisions += [change[0] for change in found]

    assert revisions == list(range(1, 3501))


async def test_every_change_of_concurrent_writers_is_told_once(
    shared_valkey: Valkey, connect: Connect, namespace: str
) -> None:
    records = [await (await connect(shared_valkey.url)).record(namespace, FINGERPRINT, SIZES) for _ in range(3)]

    async def write(record: Record, writer: int) -> None:
        for turn in range(20):
            await record.claim([claim(f"{writer}-{turn}", (turn, 0, 0)), claim(f"{turn}")])
            await record.retire([f"{writer}-{turn - 1}"])

    await asyncio.gather(*[write(record, writer) for writer, record in enumerate(records)])
    told = await follow(records[0])

    assert [change[0] for change in told] == list(range(1, len(told) + 1))
    live: set[SemanticId] = set()
    for _, kind, _, semantic_id, _ in told:
        (live.remove if kind == "retired" else live.add)(semantic_id)
    assert len(live) == await records[0].count() == 20 + 3


async def test_a_follower_too_far_behind_is_told_to_take_a_new_trie(
    shared_valkey: Valkey, connect: Connect, namespace: str
) -> None:
    record = await (await connect(shared_valkey.url, changes_kept=300)).record(namespace, FINGERPRINT, SIZES)
    for item in range(1000):
        await record.claim([claim(f"{item}", (item % 256, 0, 0))])

    with pytest.raises(ChangesGone, match="after revision 0") as gone:
        await follow(record)

    assert gone.value.as_problem()["revision"] == 1000
    assert [change[0] for change in await follow(record, 700)] == list(range(701, 1001))
    assert shared_valkey.client().xlen(f"sid:{{{namespace}:{FINGERPRINT}}}:c") < 500


async def test_a_follower_of_another_record_is_told_to_take_a_new_trie(record: Record) -> None:
    await record.claim([claim("a")])

    assert await follow(record, 1) == []
    with pytest.raises(ChangesGone):
        await follow(record, 2)


async def test_a_waiting_follower_wakes_with_the_change(
    shared_valkey: Valkey, connect: Connect, namespace: str
) -> None:
    mine, elsewhere = [await (await connect(shared_valkey.url)).record(namespace, FINGERPRINT, SIZES) for _ in range(2)]
    for revision, writer in enumerate([mine, elsewhere]):
        waiting = asyncio.create_task(mine.changes.after(revision, 10, wait_s=20))
        await asyncio.sleep(0.05)
        started = time.monotonic()

        await writer.claim([claim(f"{revision}")])

        (change,) = (await waiting).changes
        assert change.revision == revision + 1
        assert time.monotonic() - started < 5


async def test_waiting_ends_in_time_with_nothing(record: Record) -> None:
    started = time.monotonic()

    assert (await record.changes.after(0, 10, wait_s=0.2)).changes == []

    assert 0.2 <= time.monotonic() - started < 5


async def test_many_followers_cost_one_look_at_a_time_and_then_none(
    start_valkey: Callable[..., Valkey], connect: Connect
) -> None:
    server = start_valkey()
    record = await (await connect(server.url)).record("default", FINGERPRINT, SIZES)

    def reads() -> int:
        return int(server.client().info("commandstats")["cmdstat_hget"]["calls"])

    followers = [asyncio.create_task(record.changes.after(0, 10, wait_s=1.0)) for _ in range(100)]
    await asyncio.sleep(0.5)
    before, started = reads(), time.monotonic()
    await asyncio.sleep(0.3)
    assert reads() - before <= 2 + (time.monotonic() - started) / changes.LOOK_INTERVAL_S

    await asyncio.gather(*followers)
    await asyncio.sleep(2 * changes.LOOK_INTERVAL_S)
    before = reads()
    await asyncio.sleep(3 * changes.LOOK_INTERVAL_S)
    assert reads() == before


async def test_too_many_followers_are_refused(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "MAX_FOLLOWERS", 1)
    waiting = asyncio.create_task(record.changes.after(0, 10, wait_s=1.0))
    await asyncio.sleep(0.2)

    with pytest.raises(Overloaded):
        await record.changes.after(0, 10, wait_s=1.0)

    await waiting


@pytest.mark.usefixtures("believed")
async def test_a_change_is_told_only_once_it_is_synced(start_valkey: Callable[..., Valkey], connect: Connect) -> None:
    server = start_valkey(appendfsync="everysec")
    writer, reader = [await (await connect(server.url)).record("default", FINGERPRINT, SIZES) for _ in range(2)]
    await writer.claim([claim("a")])
    before = server.client().info("commandstats")["cmdstat_waitaof"]["calls"]

    assert len(await follow(reader)) == 1

    assert server.client().info("commandstats")["cmdstat_waitaof"]["calls"] == before + 1


# Over HTTP -----------------------------------------------------------------------------------------------------------


def test_changes_are_answered_in_order_and_where_to_go_on(
    service: Any, namespace: str, make_embedding: MakeEmbedding
) -> None:
    where = {"namespace": namespace}
    (entry,) = service.tokenize({"item_id": "a", "embedding": make_embedding(1)}, namespace=namespace)
    service.http.delete("/assignment/a", params=where)

    answer = service.http.get("/changes", params={"after": 0, "limit": 1, **where}).json()
    rest = service.http.get("/changes", params={"after": answer["next_after"], **where}).json()

    assert answer["changes"] == [
        {"revision": 1, "change": "assigned", "item_id": "a", "semantic_id": entry["semantic_id"], "replaced_by": None}
    ]
    assert (answer["revision"], answer["next_after"]) == (2, 1)
    assert [change["change"] for change in rest["changes"]] == ["retired"]
    assert service.http.get("/changes", params={"after": 2, **where}).json()["changes"] == []


def test_changes_that_cannot_be_told_are_gone(service: Any, namespace: str) -> None:
    answer = service.http.get("/changes", params={"after": 7, "namespace": namespace})

    assert answer.status_code == 410
    assert answer.json()["type"] == TYPE + "changes_gone"
    assert answer.json()["revision"] == 0


def test_a_follower_waits_for_what_comes(service: Any, namespace: str, make_embedding: MakeEmbedding) -> None:
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(service.http.get, "/changes", params={"after": 0, "wait_s": 30, "namespace": namespace})
        time.sleep(0.2)
        service.tokenize({"item_id": "a", "embedding": make_embedding(1)}, namespace=namespace)

        assert [change["item_id"] for change in waiting.result().json()["changes"]] == ["a"]


@pytest.mark.parametrize(
    "query",
    ["", "after=-1", "after=x", "after=0&limit=0", "after=0&limit=10001", "after=0&wait_s=-1", "after=0&wait_s=nan"],
)
def test_a_malformed_question_is_refused(service: Any, query: str) -> None:
    assert service.http.get(f"/changes?{query}").status_code == 422

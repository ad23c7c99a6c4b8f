"""Workers of a cluster that get in each other's way between any two calls: schedules that once went wrong."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from redis.crc import key_slot

from service.errors import RegistryOlder, RegistryUnavailable
from service.registry import Claim, Record, Registry
from service.registry.assignment import ClaimResult
from service.semantic_id import SemanticId
from tests.agreement import agreed
from tests.valkey_cluster import ValkeyCluster

Connect = Callable[..., Awaitable[Registry]]
Calls = list[Any]
Write = Callable[[Calls], Awaitable[Calls]]

FINGERPRINT = "0123456789abcdef"
SIZES = (4, 8, 16)
CODES, OTHER_CODES, THIRD_CODES = (1, 2, 3), (3, 2, 1), (2, 5, 7)


@pytest.fixture
async def records(shared_cluster: ValkeyCluster, connect: Connect, namespace: str) -> list[Record]:
    """One record, by three workers."""
    registries = [await connect(shared_cluster.url, retry_ms=5000, buckets=16) for _ in range(3)]
    return [await registry.record(namespace, FINGERPRINT, SIZES) for registry in registries]


def claim(item_id: str, codes: tuple[int, ...] = CODES, *, reassign: bool = False) -> Claim:
    return Claim(item_id, codes, bytes([*codes, *bytes(5)]), reassign)


async def assigned(record: Record, *claims: Claim) -> list[SemanticId]:
    results = await record.claim(claims)
    assert all(isinstance(result, ClaimResult) for result in results)
    return [result.assignment.semantic_id for result in results]  # type: ignore[union-attr]


def at_write(record: Record, act: Callable[[int, Write, Calls], Awaitable[Calls]]) -> None:
    """Lets `act` take the worker's n-th write, from 0."""
    steps: Any = record._items._steps  # type: ignore[union-attr]
    write, numbers = steps._write, iter(range(10_000))

    async def write_so(calls: Calls) -> Calls:
        return await act(next(numbers), write, calls) if calls else []

    steps._write = write_so


def stall_before(record: Record, step: int) -> tuple[asyncio.Event, asyncio.Event]:
    """Stops a worker before its n-th write; set the second event to let it go on."""
    stalled, going_on = asyncio.Event(), asyncio.Event()

    async def act(number: int, write: Write, calls: Calls) -> Calls:
        if number == step:
            stalled.set()
            await going_on.wait()
        return await write(calls)

    at_write(record, act)
    return stalled, going_on


def die_before(record: Record, step: int) -> None:
    async def act(number: int, write: Write, calls: Calls) -> Calls:
        if number == step:
            raise asyncio.CancelledError
        return await write(calls)

    at_write(record, act)


async def test_two_requests_for_an_item_in_one_batch_meet_two_operations(records: list[Record]) -> None:
    one, other, _ = records
    await one.claim([claim("q", OTHER_CODES), claim("item")])
    stalled, going_on = stall_before(other, 4)  # all but the last step of a reassignment
    late = asyncio.create_task(other.claim([claim("item", THIRD_CODES, reassign=True)]))
    await stalled.wait()

    async def one_by_one(number: int, write: Write, calls: Calls) -> Calls:
        if number:
            return await write(calls)
        first = await write(calls[:1])
        going_on.set()
        await late
        return first + await write(calls[1:])

    at_write(one, one_by_one)
    ids = await assigned(one, *[claim("item", OTHER_CODES, reassign=True)] * 2)

    assert ids == [SemanticId(OTHER_CODES, 1)] * 2
    assert (await agreed(one))["item"] == ids[0]


async def test_what_another_issued_between_two_calls_of_a_batch_is_in_the_log(records: list[Record]) -> None:
    one, other, reader = records
    turn, done = asyncio.Event(), asyncio.Event()

    async def issue_and_die(number: int, write: Write, calls: Calls) -> Calls:
        if number == 1:
            begun.set()
            await turn.wait()
            await write(calls)
            done.set()
            raise asyncio.CancelledError
        return await write(calls)

    begun = asyncio.Event()
    at_write(other, issue_and_die)
    dying = asyncio.create_task(other.claim([claim("item")]))
    await begun.wait()

    async def split(number: int, write: Write, calls: Calls) -> Calls:
        if number != 1:
            return await write(calls)
        first = await write(calls[:1])
        turn.set()
        await done.wait()
        return first + await write(calls[1:])

    at_write(one, split)
    await one.claim([claim("y"), claim("item")])
    await asyncio.wait([dying])

    assert {change.item_id for change in (await reader.changes.after(0, 100)).changes} == {"y", "item"}
    assert await reader.tree.children([()]) == [{1: 2}]


async def test_a_page_of_what_nobody_has_told_yet(records: list[Record]) -> None:
    one, _, reader = records
    await one.claim([claim(f"{number}") for number in range(20)])
    (left,) = await assigned(one, claim("z", OTHER_CODES))
    die_before(one, 2)
    await asyncio.wait([asyncio.create_task(one.retire([f"{number}" for number in range(20)]))])

    async with asyncio.timeout(10):
        page = await reader.tree.page((), 5)

    assert page.semantic_ids == [left]


async def test_a_retirement_is_answered_as_one_though_the_item_came_back_meanwhile(records: list[Record]) -> None:
    one, other, _ = records
    await one.claim([claim("item")])
    stalled, going_on = stall_before(one, 3)
    retiring = asyncio.create_task(one.retire(["item"]))
    await stalled.wait()
    await other.claim([claim("item")])
    going_on.set()

    (answer,) = await retiring

    assert answer is not None
    assert answer.retired_at is not None
    assert (await agreed(other)).keys() == {"item"}


async def test_many_changes_that_nobody_has_told_yet(records: list[Record]) -> None:
    one, other, reader = records
    for start in range(3):
        steps: Any = one._items._steps  # type: ignore[union-attr]
        steps.__dict__.pop("_write", None)
        die_before(one, 2)
        claims = [claim(f"{start}-{number}", (1, number % 8, number // 8 % 16)) for number in range(1000)]
        await asyncio.wait([asyncio.create_task(one.claim(claims))])

    await other.claim([claim("last")])

    assert len((await reader.changes.after(0, 100_000)).changes) == 3001
    for after in (0, 2047, 2048, 2049, 3000):
        for limit in (1, 2048, 10_000):
            told = (await reader.changes.after(after, limit)).changes
            assert [one_.revision for one_ in told] == list(range(after + 1, min(after + limit, 3001) + 1))
    assert len(await agreed(reader)) == 3001


async def test_a_hot_group_costs_each_claim_alike(records: list[Record]) -> None:
    names = [f"{number}" for number in range(3000)]
    random.Random(20240303).shuffle(names)

    answers = await asyncio.gather(
        *[record.claim([claim(name) for name in names[turn::3]]) for turn, record in enumerate(records)]
    )

    suffixes = [result.assignment.semantic_id.suffix for results in answers for result in results]  # type: ignore[union-attr]
    assert sorted(suffixes) == list(range(3000))


async def test_ids_lost_on_a_connection_that_held_are_noticed_before_another_takes_them(
    shared_cluster: ValkeyCluster, records: list[Record]
) -> None:
    one, other, _ = records
    keys = one._keys
    await one.claim([claim("a")])
    await other.by_item_ids(["a"])
    code = bytes(CODES[:1])
    part = [
        keys.outbox(code),
        *[bucket for first_code, bucket in keys.reverse_buckets() if first_code == code],
    ]
    client = shared_cluster.primary_of(key_slot(part[0])).client()
    copy = {key: client.dump(key) for key in part}
    await one.claim([claim("x")])
    client.delete(*part)
    for key, data in copy.items():
        if data is not None:
            client.restore(key, 0, data)

    with pytest.raises(RegistryOlder):
        await other.claim([claim("y")])

    assert await other.by_item_ids(["y"]) == [None]


async def test_what_no_replica_has_is_not_acknowledged_by_who_finds_it_done(
    shared_cluster: ValkeyCluster, connect: Connect, namespace: str
) -> None:
    options = {"retry_ms": 200, "buckets": 64, "durability": "replicated", "timeout_ms": 500}
    workers = [
        await (await connect(shared_cluster.url, **options)).record(namespace, FINGERPRINT, SIZES) for _ in range(2)
    ]
    keys = workers[0]._keys
    log = shared_cluster.primary_of(key_slot(keys.meta))
    code = next(c for c in range(4) if shared_cluster.primary_of(key_slot(keys.outbox(bytes([c])))) is not log)
    holder = shared_cluster.primary_of(key_slot(keys.outbox(bytes([code]))))
    names = [f"{number}" for number in range(100)]
    item = next(
        name for name in names if shared_cluster.primary_of(key_slot(keys.forward(name.encode()))) is not holder
    )
    for worker in workers:
        await worker.claim([claim("warm", (code, 0, 0))])
    replica = next(
        node for node in shared_cluster.replicas() if node.client().info("replication")["master_port"] == holder.port
    )
    replica.process.send_signal(signal.SIGSTOP)
    try:
        for worker in workers:
            with pytest.raises(RegistryUnavailable):
                await worker.claim([claim(item, (code, 2, 3))])
    finally:
        replica.process.send_signal(signal.SIGCONT)

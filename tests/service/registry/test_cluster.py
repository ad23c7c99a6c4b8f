"""The steps of a cluster: whoever dies between them, stalls in them or meets another in them, the promises hold."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.crc import key_slot

from service.errors import RegistryOlder, RegistryRefused, SuffixExhausted
from service.registry import Claim, Record, Registry
from service.registry.assignment import ClaimResult
from service.registry.steps import Steps
from service.semantic_id import SemanticId
from tests.agreement import agreed
from tests.ports import free_ports
from tests.valkey_cluster import ValkeyCluster

Connect = Callable[..., Awaitable[Registry]]

FINGERPRINT = "0123456789abcdef"
SIZES = (4, 8, 16)
CODES = (1, 2, 3)
OTHER_CODES = (3, 2, 1)  # of another first code, so on another server perhaps


@pytest.fixture
def cluster(shared_cluster: ValkeyCluster) -> ValkeyCluster:
    return shared_cluster


@pytest.fixture
def url(cluster: ValkeyCluster) -> str:
    return cluster.url


@pytest.fixture
async def records(url: str, connect: Connect, namespace: str) -> list[Record]:
    """One record, by three workers."""
    registries = [await connect(url, retry_ms=5000, buckets=16) for _ in range(3)]
    return [await registry.record(namespace, FINGERPRINT, SIZES) for registry in registries]


def claim(item_id: str, codes: tuple[int, ...] = CODES, *, reassign: bool = False, **options: Any) -> Claim:
    return Claim(item_id, codes, bytes([*codes, *bytes(5)]), reassign, **options)


async def assign(record: Record) -> None:
    await record.claim([claim("item")])


async def retire(record: Record) -> None:
    await record.retire(["item"])


async def reassign(record: Record) -> None:
    await record.claim([claim("item", OTHER_CODES, reassign=True)])


async def back(record: Record) -> None:
    await record.claim([claim("item", CODES, reassign=True)])


OPERATIONS = {
    "assign": ([], assign),
    "retire": ([assign], retire),
    "return": ([assign, retire], assign),
    "reassign": ([assign], reassign),
    "reassign what was retired": ([assign, retire], reassign),
    "reassign to an earlier ID": ([assign, reassign], back),
}
STEPS = 5  # at most so many writes of one operation


def die_before(record: Record, step: int) -> None:
    """Lets this worker of the record die before its n-th write."""
    items = record._items._steps
    assert isinstance(items, Steps)
    write, steps = items._write, iter(range(100))

    async def write_or_die(calls: Any) -> Any:
        if calls and next(steps) == step:
            raise asyncio.CancelledError
        return await write(calls)

    items._write = write_or_die  # type: ignore[method-assign]


@pytest.mark.parametrize("step", range(STEPS + 1))
@pytest.mark.parametrize("name", OPERATIONS)
async def test_what_a_worker_left_between_two_steps_another_finishes(
    records: list[Record], name: str, step: int
) -> None:
    one, other, reader = records
    before, operation = OPERATIONS[name]
    await one.claim([claim("neighbour")])
    for earlier in before:
        await earlier(one)
    die_before(one, step)
    await asyncio.wait([asyncio.create_task(operation(one))])

    await operation(other)

    live = await agreed(reader)
    assert live.keys() == {"neighbour"} | ({"item"} if operation is not retire else set())
    codes = OTHER_CODES if operation is reassign else CODES
    assert live.get("item", SemanticId(codes, 0)).codes == codes
    held = await other.by_item_ids(["item"])
    await operation(other)
    assert await other.by_item_ids(["item"]) == held


@pytest.mark.parametrize("step", range(STEPS + 1))
@pytest.mark.parametrize("name", OPERATIONS)
async def test_what_nobody_asks_for_again_is_finished_by_whoever_looks(
    records: list[Record], name: str, step: int
) -> None:
    one, _, reader = records
    before, operation = OPERATIONS[name]
    for earlier in before:
        await earlier(one)
    die_before(one, step)
    await asyncio.wait([asyncio.create_task(operation(one))])

    listed = (await reader.tree.page((), 10)).semantic_ids
    named = await reader.by_semantic_ids(listed)

    assert all(found is not None for found in named)
    await reader.by_item_ids(["item"])
    await agreed(reader)


@pytest.mark.parametrize("step", range(STEPS + 1))
@pytest.mark.parametrize("name", OPERATIONS)
async def test_steps_that_come_late_undo_nothing(records: list[Record], name: str, step: int) -> None:
    one, other, reader = records
    before, operation = OPERATIONS[name]
    for earlier in before:
        await earlier(one)
    stalled, going_on = asyncio.Event(), asyncio.Event()
    items = one._items._steps
    assert isinstance(items, Steps)
    write, steps = items._write, iter(range(100))

    async def write_late(calls: Any) -> Any:
        if calls and next(steps) == step:
            stalled.set()
            await going_on.wait()
        return await write(calls)

    items._write = write_late  # type: ignore[method-assign]
    late = asyncio.create_task(operation(one))
    waiting = asyncio.create_task(stalled.wait())
    await asyncio.wait([late, waiting], return_when=asyncio.FIRST_COMPLETED)
    await operation(other)
    for later in (retire, assign, reassign, retire, back):
        await later(other)
        await agreed(reader)
    going_on.set()
    await late
    waiting.cancel()

    live = await agreed(reader)
    assert live.keys() <= {"item"}
    (held,) = await reader.by_item_ids(["item"])
    assert held is not None
    former = await reader.by_semantic_ids([SemanticId(CODES, 0), SemanticId(OTHER_CODES, 0)])
    assert [one_ and one_.item_id for one_ in former] == ["item", "item"]
    assert await reader.group_sizes([CODES, OTHER_CODES]) == [1, 1]


async def test_many_workers_on_the_same_few_items(records: list[Record]) -> None:
    rng = random.Random(20240301)
    acknowledged: dict[str, set[SemanticId]] = {}

    async def worker(record: Record) -> None:
        for _ in range(40):
            items = rng.sample("abcdefgh", rng.randint(1, 4))
            if rng.random() < 0.3:
                await record.retire(items)
                continue
            claims = [
                claim(item, (rng.randrange(2), 1, rng.randrange(2)), reassign=rng.random() < 0.5) for item in items
            ]
            for result in await record.claim(claims):
                assert isinstance(result, ClaimResult)
                acknowledged.setdefault(result.assignment.item_id, set()).add(result.assignment.semantic_id)

    await asyncio.gather(*[worker(record) for record in records for _ in range(2)])

    await agreed(records[0])
    for item, ids in acknowledged.items():
        found = await records[1].by_semantic_ids(sorted(ids))
        assert {one and one.item_id for one in found} == {item}
        assert len({one.codes for one in ids}) == len(ids)  # one ID for each codes
    groups = [(a, 1, b) for a in range(2) for b in range(2)]
    for codes, size in zip(groups, await records[0].group_sizes(groups), strict=True):
        holders = await records[2].by_semantic_ids([SemanticId(codes, suffix) for suffix in range(size)])
        assert None not in holders
        assert len({one.item_id for one in holders if one}) == size


async def test_a_group_too_large_to_search_whole(records: list[Record]) -> None:
    names = [f"{number}" for number in range(150)]
    for start in range(0, 150, 50):
        await records[0].claim([claim(name) for name in names[start : start + 50]])
    die_before(records[0], 2)  # issued, and not committed
    await asyncio.wait([asyncio.create_task(records[0].claim([claim("late")]))])

    await records[1].claim([claim(f"after {number}") for number in range(30)])
    (result,) = await records[1].claim([claim("late")])

    assert isinstance(result, ClaimResult)
    assert result.assignment.semantic_id == SemanticId(CODES, 150)
    assert await records[1].group_sizes([CODES]) == [181]
    assert len(await agreed(records[2])) == 181


async def test_alternatives_are_taken_in_order_and_never_twice(url: str, connect: Connect, namespace: str) -> None:
    records = [
        await (await connect(url, buckets=16)).record(namespace, FINGERPRINT, SIZES, max_suffix=1) for _ in range(2)
    ]
    claims = [claim(f"{number}", alternatives=(5, 9)) for number in range(8)]

    answers = await asyncio.gather(*[record.claim(claims) for record in records for _ in range(2)])

    ids = {
        result.assignment.item_id: result.assignment.semantic_id
        for results in answers
        for result in results
        if isinstance(result, ClaimResult)
    }
    assert sorted(ids.values()) == [SemanticId((1, 2, last), suffix) for last in (3, 5, 9) for suffix in range(2)]
    for results in answers:
        assert sum(isinstance(result, SuffixExhausted) for result in results) == 2
    assert await agreed(records[0]) == ids


DYING_WORKER = """
import asyncio, os, signal, sys
from service.registry import Claim, Registry

async def work(url, namespace, step):
    registry = await Registry.connect(url, retry_ms=5000, buckets=16)
    record = await registry.record(namespace, "0123456789abcdef", (4, 8, 16))
    write, steps = record._items._steps._write, iter(range(100))

    async def write_or_die(calls):
        if calls and next(steps) == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return await write(calls)

    record._items._steps._write = write_or_die
    await record.claim([Claim(f"{number}", (3, 2, 1), bytes(8), number % 2 == 0) for number in range(20)])

asyncio.run(work(sys.argv[1], sys.argv[2], int(sys.argv[3])))
"""


@pytest.mark.parametrize("step", range(STEPS))
async def test_a_killed_process_between_each_two_steps(
    url: str, records: list[Record], namespace: str, step: int
) -> None:
    one, other, reader = records
    await one.claim([claim(f"{number}") for number in range(0, 20, 3)])
    known = await agreed(reader)
    command = [sys.executable, "-c", DYING_WORKER, url, namespace, str(step)]
    killed = await asyncio.to_thread(subprocess.run, command, check=False, timeout=60)
    assert killed.returncode == -signal.SIGKILL

    await other.claim([claim("after", OTHER_CODES)])
    live = await agreed(reader)
    results = await other.claim([Claim(f"{number}", OTHER_CODES, bytes(8), number % 2 == 0) for number in range(20)])

    assert all(isinstance(result, ClaimResult) for result in results)
    assert len(live) == (20 if step else len(known)) + 1
    held = await agreed(reader)
    assert len(held) == 21
    assert {item: held[item] for item in live} == (held if step else live | {item: held[item] for item in live})


async def test_a_connection_that_closes_while_the_slots_are_asked_for_is_an_outage_and_no_fault(
    records: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    record, asked = records[0], []

    async def closed(*command: object, **_: object) -> None:
        asked.append(command)
        raise RuntimeError("unable to perform operation on <TCPTransport closed=True>; the handler is closed")

    with monkeypatch.context() as patched:
        patched.setattr(Redis, "execute_command", closed)  # as uvloop says it
        await record._server.recover(ConnectionError())
    assert asked
    assert await record.claim([claim("item")])


async def test_a_slot_on_its_way_to_another_server(cluster: ValkeyCluster, records: list[Record]) -> None:
    record = records[0]
    await record.claim([claim(f"{number}", (number % 4, number % 8, 1)) for number in range(40)])
    keys = record._keys
    slots = {key_slot(keys.forward(b"7")), key_slot(keys.outbox(bytes((3,))))}
    source, target = {}, {}
    for slot in slots:
        primaries = {_id(node): node for node in cluster.primaries()}
        source[slot] = cluster.primary_of(slot)
        target[slot] = next(node for node in primaries.values() if node is not source[slot])
        target[slot].client().execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", _id(source[slot]))
        source[slot].client().execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", _id(target[slot]))

    await record.claim([claim("7", (3, 7, 1)), claim("in between", (3, 7, 1))])
    for slot in slots:
        client = source[slot].client()
        names = client.execute_command("CLUSTER", "GETKEYSINSLOT", slot, 1000)
        client.execute_command("MIGRATE", "127.0.0.1", target[slot].port, "", 0, 5000, "KEYS", *names)
    await record.claim([claim("7", (3, 7, 1)), claim("after", (3, 7, 1))])
    await record.retire(["in between"])
    assert "after" in await agreed(record)
    for slot in slots:
        for node in (target[slot], source[slot], *cluster.primaries()):
            node.client().execute_command("CLUSTER", "SETSLOT", slot, "NODE", _id(target[slot]))

    await record.claim([claim("at last", (3, 7, 1))])

    for each in records:
        assert (await agreed(each)).keys() >= {"7", "after", "at last"}


def _id(node: Any) -> str:
    return str(node.client().execute_command("CLUSTER", "MYID").decode())


@pytest.mark.parametrize("lost", ["outbox", "IDs", "meta"])
async def test_a_server_that_lost_its_part_issues_nothing(
    cluster: ValkeyCluster, records: list[Record], lost: str
) -> None:
    record = records[0]
    await record.claim([claim("a"), claim("b")])
    keys = record._keys
    key = {"outbox": keys.outbox(bytes(CODES[:1])), "IDs": keys.under(bytes(CODES[:2])), "meta": keys.meta}[lost]
    node = cluster.primary_of(key_slot(key))
    node.client().delete(key)

    with pytest.raises(RegistryOlder):
        await (record.retire(["a"]) if lost == "IDs" else record.claim([claim("c")]))


async def test_the_ids_of_a_record_lie_on_all_servers(cluster: ValkeyCluster, records: list[Record]) -> None:
    rng = random.Random(20240302)
    codes = [(rng.randrange(4), rng.randrange(8), rng.randrange(16)) for _ in range(200)]
    await records[0].claim([claim(f"{number}", each) for number, each in enumerate(codes)])

    name = records[0]._keys.name
    keys = [node.client().keys(f"sid:*{name}*") for node in cluster.primaries()]

    assert all(len(found) > 4 for found in keys)


async def test_a_server_that_is_no_cluster_is_refused(start_valkey: Callable[..., Any], connect: Connect) -> None:
    (port,) = free_ports(1)
    start_valkey(port=str(port))

    with pytest.raises(RegistryRefused, match=r"is no cluster: its URL begins with redis://"):
        await connect(f"redis+cluster://127.0.0.1:{port}")


async def test_a_cluster_is_refused_as_a_single_server(cluster: ValkeyCluster, connect: Connect) -> None:
    with pytest.raises(RegistryRefused, match=r"is a cluster: its URL begins with redis\+cluster://"):
        await connect(f"redis://127.0.0.1:{cluster.primaries()[0].port}")


@pytest.mark.parametrize("url", ["redis+cluster://", "redis+cluster://host:port", "redis+cluster://a,,b"])
async def test_a_url_that_cannot_be_read_is_refused(connect: Connect, url: str) -> None:
    with pytest.raises(RegistryRefused, match=r"redis\+cluster://"):
        await connect(url)

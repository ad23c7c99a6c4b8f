"""What an acknowledgement waits for under `replicated`; under the others, see `test_sync_policies`."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from service.errors import RegistryRefused, RegistryUnavailable
from service.registry import Claim, Record, Registry, durability
from service.registry.primary import Primary, Script, ScriptCall
from tests.ports import free_ports
from tests.topologies import wait_until
from tests.valkey import Valkey

Connect = Callable[..., Awaitable[Registry]]
Pair = tuple[Valkey, Valkey]

SIZES = (4, 8, 16)


@pytest.fixture
def start_pair(start_valkey: Callable[..., Valkey]) -> Callable[..., Pair]:
    """Starts a primary and its replica, which has caught up."""

    def start(**options: str) -> Pair:
        (port,) = free_ports(1)
        primary = start_valkey(port=str(port), repl_diskless_sync_delay="0", **options)
        replica = start_valkey(replicaof=f"127.0.0.1 {port}", **options)
        # Having caught up, and counted by its primary, which hears of it a moment later.
        wait_until(lambda: primary.client().wait(1, 1) == 1 and replicas_online(primary) == 1, "no replica connects")
        wait_until(lambda: replica.client().info("replication")["master_link_status"] == "up", "no replica connects")
        return primary, replica

    return start


@pytest.fixture
def frozen() -> Iterator[Callable[[Valkey], None]]:
    """Stops a server where it stands, connections open; it goes on when the test ends."""
    servers: list[Valkey] = []

    def freeze(server: Valkey) -> None:
        servers.append(server)
        os.kill(server.process.pid, signal.SIGSTOP)

    yield freeze
    for server in servers:
        os.kill(server.process.pid, signal.SIGCONT)


def replicas_online(primary: Valkey) -> int:
    told = primary.client().info("replication")
    return sum(value["state"] == "online" for value in told.values() if isinstance(value, dict))


def calls(server: Valkey, command: str) -> int:
    return int(server.client().info("commandstats").get(f"cmdstat_{command}", {"calls": 0})["calls"])


def claim(item_id: str) -> Claim:
    return Claim(item_id, (1, 2, 3), b"contents")


async def record_of(connect: Connect, server: Valkey, **options: object) -> Record:
    registry = await connect(server.url, durability="replicated", **options)
    return await registry.record("default", "0123456789abcdef", SIZES)


@pytest.mark.usefixtures("believed")
@pytest.mark.parametrize(("policy", "syncs"), [("always", 0), ("everysec", 1)])
async def test_a_call_waits_once_for_the_replicas_and_where_it_must_for_the_sync(
    start_pair: Callable[..., Pair], connect: Connect, policy: str, syncs: int
) -> None:
    primary, replica = start_pair(appendfsync=policy)
    record = await record_of(connect, primary)
    await record.claim([claim("warm")])
    before = calls(primary, "wait"), calls(primary, "waitaof")

    await record.claim([claim(f"item {number}") for number in range(500)])

    # Each item stands on the replica now, not a little later.
    held = sum(replica.client().hlen(key) for key in replica.client().scan_iter("sid:*:f:*", count=20_000))
    assert held == 501
    assert (calls(primary, "wait"), calls(primary, "waitaof")) == (before[0] + 1, before[1] + syncs)


async def test_too_few_replicas_acknowledge_nothing_until_they_are_back(
    start_pair: Callable[..., Pair], connect: Connect, frozen: Callable[[Valkey], None]
) -> None:
    primary, replica = start_pair()
    record = await record_of(connect, primary, timeout_ms=300)
    frozen(replica)

    with pytest.raises(RegistryUnavailable, match="on 0 of the 1 replicas that SID_REPLICAS asks for within 300 ms"):
        await record.claim([claim("item")])
    with pytest.raises(RegistryUnavailable, match="on 0 of the 1 replicas"):
        await record.by_item_ids(["item"])  # an answer would acknowledge it

    os.kill(replica.process.pid, signal.SIGCONT)
    (again,) = await record.claim([claim("item")])
    assert again.assignment.semantic_id.suffix == 0  # type: ignore[union-attr]
    assert await record.by_item_ids(["item"]) == [again.assignment]  # type: ignore[union-attr]


async def test_what_another_has_claimed_is_told_once_it_is_replicated(
    start_pair: Callable[..., Pair], connect: Connect, frozen: Callable[[Valkey], None]
) -> None:
    primary, replica = start_pair()
    weaker = await (await connect(primary.url)).record("default", "0123456789abcdef", SIZES)
    reader = await record_of(connect, primary, timeout_ms=300)
    frozen(replica)
    await weaker.claim([claim("item")])

    for told in (lambda: reader.by_item_ids(["item"]), reader.settle, lambda: reader.changes.after(0, 1)):
        with pytest.raises(RegistryUnavailable, match="on 0 of the 1 replicas"):
            await told()


async def test_old_assignments_are_read_without_a_wait(start_pair: Callable[..., Pair], connect: Connect) -> None:
    primary, _ = start_pair()
    record = await record_of(connect, primary)
    await record.claim([claim("item")])
    await asyncio.sleep(1.1)
    await record.claim([claim("later")])  # all before this second is replicated now
    before = calls(primary, "wait")

    for _ in range(5):
        assert await record.by_item_ids(["item"]) != [None]

    assert calls(primary, "wait") == before


async def test_fewer_replicas_than_asked_for_are_refused_at_start(
    start_pair: Callable[..., Pair], connect: Connect
) -> None:
    primary, _ = start_pair()

    with pytest.raises(RegistryRefused, match=r"1 connected replicas.* 2: .*smaller SID_REPLICAS or SID_DURABILITY=fs"):
        await record_of(connect, primary, replicas=2)
    await connect(primary.url, durability="fsync", replicas=2)  # where the number says nothing


async def test_replicas_do_not_make_up_for_a_disk(start_pair: Callable[..., Pair], connect: Connect) -> None:
    primary, _ = start_pair(appendonly="no")

    with pytest.raises(RegistryRefused, match="append-only file"):
        await record_of(connect, primary)


async def test_a_replica_that_went_away_for_good_is_told_within_the_timeout(
    start_pair: Callable[..., Pair], connect: Connect
) -> None:
    primary, replica = start_pair()
    record = await record_of(connect, primary, timeout_ms=400)
    replica.kill()
    started = time.monotonic()

    with pytest.raises(RegistryUnavailable, match="SID_REPLICAS"):
        await record.claim([claim("item")])

    assert time.monotonic() - started < 2


async def test_a_service_answers_503_while_it_has_too_few_replicas(
    start_pair: Callable[..., Pair],
    start_service: Callable[..., Any],
    make_embedding: Callable[[int], list[float]],
    data_dir: Path,
    frozen: Callable[[Valkey], None],
) -> None:
    primary, replica = start_pair()
    settings = {"redis_url": primary.url, "data_dir": data_dir, "durability": "replicated"}
    service = await asyncio.to_thread(lambda: start_service(**settings, replicas=1, registry_timeout_ms=300))
    item = {"item_id": "item", "embedding": make_embedding(1)}
    try:
        (first,) = await asyncio.to_thread(service.tokenize, item)
        frozen(replica)

        refused = await asyncio.to_thread(service.post, item)
        assert (refused.status_code, "retry-after" in refused.headers) == (503, True)
        assert "SID_REPLICAS" in refused.json()["detail"]

        os.kill(replica.process.pid, signal.SIGCONT)
        (again,) = await asyncio.to_thread(service.tokenize, item)
        assert again["semantic_id"] == first["semantic_id"]
    finally:
        await asyncio.to_thread(service.stop)


# Several commands under one wait

COUNT = Script(b"redis.call('HINCRBY', KEYS[1], ARGV[2], 1) return {tonumber(redis.call('TIME')[1]), ARGV[1]}")


@pytest.fixture
async def waiting_primary(believed: None, start_valkey: Callable[..., Valkey]) -> tuple[Valkey, Primary]:
    server = start_valkey(appendfsync="everysec")
    primary = Primary(server.url, "fsync", 2000, 1000)
    await primary.call(primary.check)
    return server, primary


async def test_several_writes_share_one_wait_and_an_unknown_script_is_sent_again(
    waiting_primary: tuple[Valkey, Primary],
) -> None:
    server, primary = waiting_primary
    writes = [ScriptCall(COUNT, [b"counts"], [b"%d" % number]) for number in range(3)]

    for waits_more, executed in ((2, {b"1"}), (1, {b"2"})):  # unknown first, known then
        before = calls(server, "waitaof")
        replies = await primary.call(lambda: primary.written([*writes, ("HSET", b"plain", b"f", b"v")]))
        assert [reply[1] for reply in replies[:3]] == [b"1"] * 3
        assert set(server.client().hvals("counts")) == executed
        assert calls(server, "waitaof") == before + waits_more

    server.client().script_flush()
    (reply,) = await primary.call(lambda: primary.written(writes[:1]))
    assert reply[1] == b"1"
    assert primary.durable_before >= reply[0]
    await primary.close()


async def test_a_failed_write_among_several_fails_them_all_without_quoting_them(
    waiting_primary: tuple[Valkey, Primary],
) -> None:
    _, primary = waiting_primary
    writes = [("SET", b"word", b"secret text"), ("HSET", b"word", b"f", b"secret text")]

    with pytest.raises(RegistryUnavailable, match="WRONGTYPE") as failure:
        await primary.call(lambda: primary.written(writes))

    assert "secret text" not in str(failure.value)
    await primary.close()


async def test_a_server_that_confirms_before_it_syncs_is_refused(start_valkey: Callable[..., Valkey]) -> None:
    server = start_valkey(appendfsync="everysec")  # syncs once a second, and confirms ten times in it
    primary = Primary(server.url, "fsync", 2000, 1000)

    with pytest.raises(RegistryRefused, match=r"confirms writes before that: set its appendfsync to always"):
        await primary.call(primary.check)

    await primary.close()


@pytest.mark.parametrize(("delay_s", "too_early"), [(0.1, True), (1.0, False)])
async def test_confirmations_are_told_from_syncs_by_their_pace(delay_s: float, *, too_early: bool) -> None:
    async def confirm(commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        await asyncio.sleep(delay_s * len(commands) / 2)
        return [[1, 0] for _ in commands]

    assert await durability._confirms_too_early(confirm, 2000) == too_early

"""A server that is killed, hangs, is full or lost what it had: what was acknowledged stays; nothing false is issued."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING

import pytest

from service.errors import RegistryOlder, RegistryUnavailable
from service.registry import Record, Registry
from service.semantic_id import SemanticId
from tests.claims import CODES, FINGERPRINT, SIZES, claim, claim_one

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.valkey import Valkey

    Connect = Callable[..., Awaitable[Registry]]


async def test_the_script_is_loaded_again_after_a_flush(record: Record, shared_valkey: Valkey) -> None:
    await claim_one(record, "before")

    shared_valkey.client().script_flush()

    assert (await claim_one(record, "after")).semantic_id.suffix == 1


async def test_everything_acknowledged_survives_a_kill_of_the_server(
    start_valkey: Callable[..., Valkey], connect: Connect
) -> None:
    server = start_valkey()
    record = await (await connect(server.url)).record("default", FINGERPRINT, SIZES)
    acknowledged: dict[str, SemanticId] = {}

    async def client(number: int) -> None:
        for turn in range(60):
            names = [f"{number}-{turn}-{item}" for item in range(4)]
            with contextlib.suppress(RegistryUnavailable):
                for result in await record.claim([claim(name) for name in names]):
                    acknowledged[result.assignment.item_id] = result.assignment.semantic_id

    clients = asyncio.gather(*map(client, range(8)))
    for _ in range(2):
        await asyncio.sleep(0.1)
        await asyncio.to_thread(server.kill)
        await asyncio.to_thread(server.restart)
    await clients

    found = await record.by_item_ids(list(acknowledged))
    assert len(acknowledged) > 100
    assert [assignment and assignment.semantic_id for assignment in found] == list(acknowledged.values())
    size = (await record.group_sizes([CODES]))[0]
    everyone = await record.by_semantic_ids([SemanticId(CODES, suffix) for suffix in range(size)])
    assert None not in everyone
    assert len({holder.item_id for holder in everyone if holder}) == size == await record.count()


async def test_a_short_restart_is_bridged_by_retrying(start_valkey: Callable[..., Valkey], connect: Connect) -> None:
    server = start_valkey()
    record = await (await connect(server.url, retry_ms=5000)).record("default", FINGERPRINT, SIZES)
    before = await claim_one(record, "item")
    server.kill()

    waiting = asyncio.create_task(claim_one(record, "item"))
    await asyncio.sleep(0.05)
    await asyncio.to_thread(server.restart)

    assert await waiting == before


@pytest.mark.parametrize("url", ["unix:///nonexistent/socket", "redis://127.0.0.1:1/0", "redis://192.0.2.1:6379/0"])
async def test_an_unreachable_server_is_said_so_soon(connect: Connect, url: str) -> None:
    started = time.monotonic()

    with pytest.raises(RegistryUnavailable, match="The registry at"):
        await connect(url, timeout_ms=500, retry_ms=300)

    assert time.monotonic() - started < 3


async def test_a_server_that_went_away_is_unavailable_and_found_again(
    start_valkey: Callable[..., Valkey], connect: Connect
) -> None:
    server = start_valkey()
    registry = await connect(server.url, retry_ms=100)
    record = await registry.record("default", FINGERPRINT, SIZES)
    assignment = await claim_one(record, "item")
    server.kill()

    for call in (registry.ping, lambda: claim_one(record, "x"), lambda: record.by_item_ids(["item"]), record.count):
        with pytest.raises(RegistryUnavailable, match="cannot be reached"):
            await call()

    server.restart()
    await registry.ping()
    assert await record.by_item_ids(["item"]) == [assignment]


async def test_a_server_that_hangs_is_given_up_in_time(start_valkey: Callable[..., Valkey], connect: Connect) -> None:
    server = start_valkey()
    record = await (await connect(server.url, timeout_ms=400)).record("default", FINGERPRINT, SIZES)
    server.client().client_pause(1500, all=True)

    with pytest.raises(RegistryUnavailable, match="did not answer within 400 ms"):
        await claim_one(record, "item")

    await asyncio.sleep(1.5)
    assert (await claim_one(record, "item")).semantic_id.suffix == 0


async def test_a_full_server_acknowledges_nothing_and_keeps_what_it_has(
    start_valkey: Callable[..., Valkey], connect: Connect
) -> None:
    server = start_valkey()
    record = await (await connect(server.url)).record("default", FINGERPRINT, SIZES)
    known = await claim_one(record, "known")
    server.client().config_set("maxmemory", "1")

    with pytest.raises(RegistryUnavailable, match="no memory left"):
        await record.claim([claim("known"), claim("new")])

    server.client().config_set("maxmemory", "0")
    assert await record.by_item_ids(["known", "new"]) == [known, None]
    assert await record.group_sizes([CODES]) == [1]


async def test_a_read_only_replica_is_unavailable(start_valkey: Callable[..., Valkey], connect: Connect) -> None:
    server = start_valkey()
    record = await (await connect(server.url)).record("default", FINGERPRINT, SIZES)
    server.client().replicaof("127.0.0.1", 1)

    with pytest.raises(RegistryUnavailable, match="read-only replica"):
        await claim_one(record, "item")


async def test_an_emptied_registry_issues_nothing(start_valkey: Callable[..., Valkey], connect: Connect) -> None:
    server = start_valkey()
    record = await (await connect(server.url)).record("default", FINGERPRINT, SIZES)
    await record.claim([claim("a")])
    server.client().flushall()

    with pytest.raises(RegistryOlder, match=r"was at revision 1 of epoch \w+; the registry has nothing"):
        await record.claim([claim("b")])

    assert server.client().dbsize() == 0


async def test_a_registry_that_lost_its_tail_issues_nothing(
    start_valkey: Callable[..., Valkey], connect: Connect
) -> None:
    server = start_valkey()
    record = await (await connect(server.url)).record("default", FINGERPRINT, SIZES)
    await record.claim([claim("a"), claim("b")])
    (meta,) = server.client().keys("*meta")
    server.client().hset(meta, "revision", 1)

    with pytest.raises(
        RegistryOlder, match=r"was at revision 2 of epoch \w+; the registry has revision 1 of epoch \w+"
    ):
        await record.claim([claim("c")])

    with pytest.raises(RegistryOlder):
        await record.by_item_ids(["a"])  # what it still has may not be all
    assert server.client().hget(meta, "revision") == b"1"

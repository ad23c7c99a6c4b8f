"""Titles of items beside the record: kept with live items, and no more than was asked for."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

import pytest
import redis

from service.registry import Record, Registry
from service.registry.keys import RecordKeys
from tests.claims import FINGERPRINT, SIZES, claim
from tests.valkey import Valkey

Connect = Callable[..., Awaitable[Registry]]
BYTES = 16


@pytest.fixture(params=["shared_valkey", "shared_cluster"])
async def titled(request: pytest.FixtureRequest, connect: Connect, namespace: str) -> Record:
    """An empty record with titles, on one server and on a cluster."""
    registry = await connect(request.getfixturevalue(request.param).url, display_bytes=BYTES)
    return await registry.record(namespace, FINGERPRINT, SIZES)


async def title_of(record: Record, item_id: str) -> str | None:
    return (await record.displays.of([item_id.encode()]))[0]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("Kettle, 1.7 l", "Kettle, 1.7 l"),
        ("  Kettle\n", "Kettle"),
        ("x" * BYTES, "x" * BYTES),
        ("x" * (BYTES + 1), "x" * (BYTES - 3) + "…"),
        ("日本語の薬缶です", "日本語の…"),
        ("half \ud83d pair", "half  pair"),
        ("a NUL \0", "a NUL \0"),
        ("", None),
        (" \t", None),
    ],
)
async def test_a_title_is_kept_within_its_bytes(titled: Record, given: str, kept: str | None) -> None:
    await titled.claim([claim("a"), claim("b")])
    await titled.displays.put({b"a": "before", b"b": "other"})

    await titled.displays.put({b"a": given})

    assert await titled.displays.of([b"a", b"b", b"c"]) == [kept, "other", None]


async def test_a_retired_item_has_no_title_however_late_one_comes(titled: Record) -> None:
    await titled.claim([claim("a")])
    await titled.displays.put({b"a": "kettle"})
    await titled.retire(["a"])
    await titled.displays.put({b"a": "kettle", b"nobody": "nothing"})
    assert await titled.displays.of([b"a", b"nobody"]) == [None, None]

    await titled.claim([claim("a")])
    await titled.displays.put({b"a": "again"})
    await titled.displays.retire([b"a"])  # of the retirement before
    assert await title_of(titled, "a") == "again"


async def test_a_title_that_was_announced_stays_only_with_an_item_that_was_claimed(titled: Record) -> None:
    await titled.claim([claim("known")])
    await titled.displays.announce({b"new": "kettle", b"known": "lamp"})
    assert await titled.displays.of([b"new", b"known"]) == ["kettle", "lamp"]

    await titled.displays.retire([b"new", b"known"])  # as neither found a place: `known` has held its ID before
    assert await titled.displays.of([b"new", b"known"]) == [None, "lamp"]


async def test_whatever_crosses_a_live_item_has_its_title_and_a_retired_one_none(titled: Record) -> None:
    chance = random.Random(5)
    items = [f"item {number}" for number in range(6)]

    async def caller() -> None:
        for _ in range(12):
            item_id = chance.choice(items)
            if chance.random() < 0.5:
                await titled.displays.announce({item_id.encode(): item_id})
                await titled.claim([claim(item_id)])
                await titled.displays.put({item_id.encode(): item_id})
            else:
                await titled.retire([item_id])
                await titled.displays.retire([item_id.encode()])

    await asyncio.gather(*[caller() for _ in range(8)])

    held = await titled.by_item_ids(items)
    live = [one.item_id if one is not None and one.live else None for one in held]
    assert None in live
    assert any(live)
    assert await titled.displays.of([item_id.encode() for item_id in items]) == live


async def test_where_none_are_kept_nothing_is_asked_of_the_server(
    shared_valkey: Valkey, connect: Connect, namespace: str
) -> None:
    record = await (await connect(shared_valkey.url)).record(namespace, FINGERPRINT, SIZES)
    await record.claim([claim("a")])

    def commands(client: redis.Redis) -> int:
        return int(client.info("stats")["total_commands_processed"])

    with redis.Redis.from_url(shared_valkey.url) as client:
        before = commands(client)
        await record.displays.put({b"a": "kettle"})
        await record.displays.retire([b"a"])
        assert await record.displays.of([b"a", b"b"]) == [None, None]
        assert commands(client) == before + 1


@pytest.mark.usefixtures("believed")
async def test_a_title_is_synced_like_a_claim_the_known_one_too(
    start_valkey: Callable[..., Valkey], connect: Connect
) -> None:
    server = start_valkey(appendfsync="everysec")
    record = await (await connect(server.url, display_bytes=BYTES)).record("default", FINGERPRINT, SIZES)
    await record.claim([claim("a")])

    def waits() -> int:
        return int(server.client().info("commandstats")["cmdstat_waitaof"]["calls"])

    for _ in range(2):  # another may have given it just before, not synced yet
        before, written = waits(), server.client().info("persistence")["aof_current_size"]
        await record.displays.put({b"a": "kettle"})
        assert waits() > before
        assert server.client().info("persistence")["aof_current_size"] > written  # else the wait is behind nothing
    (key,) = server.client().scan_iter("sid:{sid:*")
    assert server.client().hgetall(key) == {b"a": b"kettle"}

    server.restart()
    assert await title_of(record, "a") == "kettle"


async def test_titles_lie_in_the_slots_of_their_items_in_a_few_bytes_each(
    shared_valkey: Valkey, connect: Connect, namespace: str
) -> None:
    registry = await connect(shared_valkey.url, display_bytes=BYTES, buckets=4)
    record = await registry.record(namespace, FINGERPRINT, SIZES)
    items = [f"item {number}" for number in range(200)]
    await record.claim([claim(item_id) for item_id in items])
    await record.displays.put({item_id.encode(): f"title {item_id}" for item_id in items})

    with redis.Redis.from_url(shared_valkey.url) as client:
        keys = list(client.scan_iter(f"sid:{{sid:{namespace}:*:f:*}}:d"))
        assert len(keys) == 4
        assert {client.object("encoding", key) for key in keys} == {b"listpack"}
        assert sum(client.memory_usage(key, samples=0) for key in keys) < 200 * 40

    name = RecordKeys("shop:1", record.layout, 16_384)
    assert name.display(b"a") == b"sid:{%b}:d" % name.forward(b"a")

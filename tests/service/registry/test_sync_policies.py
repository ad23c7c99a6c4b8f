"""Which servers are believed under `fsync` and `memory`, and what an acknowledgement waits for there."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from service.errors import RegistryRefused, RegistryUnavailable
from service.registry import Registry, primary
from tests.claims import FINGERPRINT, SIZES, claim, claim_one, suffixes_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.valkey import Valkey

    Connect = Callable[..., Awaitable[Registry]]


async def test_a_server_without_append_only_file_is_refused_unless_memory_is_enough(
    start_valkey: Callable[..., Valkey], connect: Connect
) -> None:
    server = start_valkey(appendonly="no")

    with pytest.raises(RegistryRefused, match="SID_DURABILITY=memory"):
        await connect(server.url)

    record = await (await connect(server.url, durability="memory")).record("default", FINGERPRINT, SIZES)
    assert (await claim_one(record, "item")).semantic_id.suffix == 0


async def test_a_server_that_never_syncs_is_refused(start_valkey: Callable[..., Valkey], connect: Connect) -> None:
    with pytest.raises(RegistryRefused, match="appendfsync no"):
        await connect(start_valkey(appendfsync="no").url)


async def test_a_server_that_evicts_is_refused(start_valkey: Callable[..., Valkey], connect: Connect) -> None:
    server = start_valkey(maxmemory="100mb", maxmemory_policy="allkeys-lru")

    for durability in ("fsync", "memory"):
        with pytest.raises(RegistryRefused, match="noeviction"):
            await connect(server.url, durability=durability)


async def test_wrong_credentials_and_wrong_urls_are_refused_without_telling_the_password(
    start_valkey: Callable[..., Valkey], connect: Connect
) -> None:
    server = start_valkey()
    server.client().config_set("requirepass", "right")

    with pytest.raises(RegistryRefused, match="credentials") as refusal:
        await connect(f"unix://:wr0ng@{server.socket}")
    with pytest.raises(RegistryRefused, match="SID_REDIS_URL"):
        await connect("http://127.0.0.1")

    assert "wr0ng" not in str(refusal.value)
    await connect(f"unix://:right@{server.socket}")


@pytest.mark.usefixtures("believed")
async def test_a_weaker_sync_policy_is_waited_for(start_valkey: Callable[..., Valkey], connect: Connect) -> None:
    server = start_valkey(appendfsync="everysec")
    record = await (await connect(server.url)).record("default", FINGERPRINT, SIZES)

    results = await record.claim([claim(f"item {number}") for number in range(20)])
    known = await claim_one(record, "item 3")

    waits = server.client().info("commandstats").get("cmdstat_waitaof", {})
    assert waits["calls"] >= 3  # one at the start, one for each call
    assert known == results[3].assignment
    server.restart()
    assert len(await suffixes_of(record, [f"item {number}" for number in range(20)])) == 20


@pytest.mark.usefixtures("believed")
async def test_reading_what_another_has_just_claimed_waits_for_its_sync(
    start_valkey: Callable[..., Valkey], connect: Connect
) -> None:
    server = start_valkey(appendfsync="everysec")
    writer, reader = [await (await connect(server.url)).record("default", FINGERPRINT, SIZES) for _ in range(2)]
    await claim_one(writer, "item")
    before = server.client().info("commandstats")["cmdstat_waitaof"]["calls"]

    assert await suffixes_of(reader, ["item"]) == [0]
    assert server.client().info("commandstats")["cmdstat_waitaof"]["calls"] == before + 1
    await asyncio.sleep(1)
    await claim_one(reader, "later")  # all before this second is synced now
    before = server.client().info("commandstats")["cmdstat_waitaof"]["calls"]

    assert await suffixes_of(reader, ["item"]) == [0]
    assert server.client().info("commandstats")["cmdstat_waitaof"]["calls"] == before


@pytest.mark.usefixtures("believed")
async def test_an_unconfirmed_sync_is_not_acknowledged(start_valkey: Callable[..., Valkey], connect: Connect) -> None:
    server = start_valkey(appendfsync="everysec")
    record = await (await connect(server.url, timeout_ms=300)).record("default", FINGERPRINT, SIZES)
    server.client().config_set("appendfsync", "no")

    with pytest.raises(RegistryUnavailable, match="did not confirm"):
        await claim_one(record, "item")


async def test_a_server_that_hides_its_settings_is_asked_to_confirm(
    start_valkey: Callable[..., Valkey], connect: Connect
) -> None:
    server = start_valkey(appendfsync="always")
    server.client().acl_setuser("semid", enabled=True, passwords=["+secret"], commands=["+@all", "-config"], keys=["*"])
    url = f"unix://semid:secret@{server.socket}"

    record = await (await connect(url)).record("default", FINGERPRINT, SIZES)

    assert (await claim_one(record, "item")).semantic_id.suffix == 0
    assert server.client().info("commandstats")["cmdstat_waitaof"]["calls"] >= 2


@pytest.mark.usefixtures("believed")
async def test_a_server_that_came_back_with_a_weaker_policy_is_waited_for(
    start_valkey: Callable[..., Valkey], connect: Connect
) -> None:
    server = start_valkey()
    record = await (await connect(server.url)).record("default", FINGERPRINT, SIZES)
    server.client().config_set("appendfsync", "everysec")
    server.client().client_kill_filter(_type="normal", skipme=True)

    result = (await record.claim([claim("item")]))[0]

    assert result.created
    assert server.client().info("commandstats")["cmdstat_waitaof"]["calls"] >= 2


async def test_a_server_that_came_back_weaker_is_not_trusted(
    start_valkey: Callable[..., Valkey], connect: Connect
) -> None:
    server = start_valkey()
    record = await (await connect(server.url)).record("default", FINGERPRINT, SIZES)
    await claim_one(record, "item")

    server.client().config_set("appendonly", "no")
    server.client().client_kill_filter(_type="normal", skipme=True)

    with pytest.raises(RegistryUnavailable, match="append-only file"):
        await claim_one(record, "other")


async def test_claims_under_way_together_all_wait_once_the_server_came_back_weaker(
    start_valkey: Callable[..., Valkey], connect: Connect
) -> None:
    server = start_valkey()
    registry = await connect(server.url)
    records = [await registry.record(f"space-{number}", FINGERPRINT, SIZES) for number in range(8)]
    for record in records:
        await claim_one(record, "before")
    server.client().config_set("appendonly", "no")
    server.client().client_kill_filter(_type="normal", skipme=True)

    outcomes = await asyncio.gather(*(claim_one(record, "after") for record in records), return_exceptions=True)

    assert [type(outcome) for outcome in outcomes] == [RegistryUnavailable] * 8


async def test_a_server_that_does_not_sync_during_a_rewrite_is_waited_for(
    start_valkey: Callable[..., Valkey], connect: Connect
) -> None:
    server = start_valkey(no_appendfsync_on_rewrite="yes")
    record = await (await connect(server.url)).record("default", FINGERPRINT, SIZES)

    await claim_one(record, "item")

    assert server.client().info("commandstats")["cmdstat_waitaof"]["calls"] >= 2


@pytest.fixture
def old_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server before 7.2 knows no WAITAOF; here the command is sent by a name that ours does not know either."""
    command = primary.Primary.command

    async def without_waitaof(self: primary.Primary, *parts: object) -> object:
        return await command(self, *("NOWAITAOF" if part == "WAITAOF" else part for part in parts))

    monkeypatch.setattr(primary.Primary, "command", without_waitaof)


@pytest.mark.usefixtures("old_server")
async def test_a_server_too_old_to_confirm_is_refused(start_valkey: Callable[..., Valkey], connect: Connect) -> None:
    with pytest.raises(RegistryRefused, match=r"7\.2 or later"):
        await connect(start_valkey(appendfsync="everysec").url)

"""From a URL to the primary, and to the next one; nothing secret is told."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from urllib.parse import quote

import pytest

from service.errors import RegistryRefused, RegistryUnavailable
from service.registry import Claim, Registry
from service.registry.connections import open_connections
from tests.ports import free_ports
from tests.topologies import SECRET, SENTINEL_SECRET, Sentinels, Tls, until
from tests.valkey import Valkey

Connect = Callable[..., Awaitable[Registry]]


@pytest.fixture
async def sentinels(short_path: Path) -> AsyncIterator[Sentinels]:
    servers = Sentinels(short_path)
    try:
        await servers.start()
        yield servers
    finally:
        await servers.stop()


@pytest.fixture
async def tls(short_path: Path) -> AsyncIterator[Tls]:
    servers = Tls(short_path)
    try:
        await servers.start()
        yield servers
    finally:
        await servers.stop()


def told(failure: pytest.ExceptionInfo[BaseException], caplog: pytest.LogCaptureFixture) -> str:
    """All that a log with tracebacks would show of a failure."""
    logging.getLogger("test").error("failed", exc_info=failure.value)
    return str(failure.value) + caplog.text


# URLs


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis://user:s3cret@example.net:7000/2?health_check_interval=5", "example.net:7000"),
        ("rediss://:s3cret@example.net", "example.net:6379"),
        ("redis://:s3cret@example.net:7000?db=1", "example.net:7000"),
        ("redis://[::1]:7000", "::1:7000"),
        ("unix://user:s3cret@/a%20b/socket?db=1", "/a b/socket"),
        (
            "redis+sentinel://user:s3cret@a,b:7000,[::1]:7001/shop/3?sentinel_password=s3cret",
            "a,b:7000,[::1]:7001/shop",
        ),
        ("rediss+sentinel://a/shop?ssl_ca_certs=/ca.pem&ssl_check_hostname=false", "a/shop"),
    ],
)
def test_a_url_is_known_by_an_address_without_its_secrets(url: str, address: str) -> None:
    assert open_connections(url, 1000).address == address


def test_a_url_of_sentinels_gives_each_side_its_own_options() -> None:
    url = "rediss+sentinel://us%65r:p%40ss@a,b:7000/shop/3?sentinel_username=w&sentinel_password=x%26y&ssl_ca_certs=/ca"
    pool = open_connections(url, 3000).pool

    of_server = pool.connection_kwargs
    of_sentinel = pool.sentinel_manager.sentinels[1].connection_pool.connection_kwargs  # type: ignore[attr-defined]
    assert {name: of_server[name] for name in ("username", "password", "db", "ssl_ca_certs")} == {
        "username": "user",
        "password": "p@ss",
        "db": 3,
        "ssl_ca_certs": "/ca",
    }
    assert {name: of_sentinel[name] for name in ("username", "password", "host", "port", "ssl_ca_certs")} == {
        "username": "w",
        "password": "x&y",
        "host": "b",
        "port": 7000,
        "ssl_ca_certs": "/ca",
    }
    assert of_sentinel["socket_timeout"] == 0.75
    assert "SSL" in pool.connection_class.__name__


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1",
        "s3cret",
        "redis://:s3/cret@localhost:6379/0",
        "redis://:1234/s3cret@localhost:6379/0",
        "redis://:1234?s3cret@localhost:6379/0",
        "redis://:1234#s3cret@localhost:6379/0",
        "redis://:s3cret@localhost:port/0",
        "redis://:s3cret@localhost/0?no_such_option=s3cret",
        "redis://:s3cret@localhost/0?socket_timeout=s3cret",
        "redis+sentinel://:s3cret@a,b",
        "redis+sentinel://:s3cret@a,b/shop/zero",
        "redis+sentinel://:s3cret@a:port/shop",
        "redis+sentinel://:s3cret@a,/shop",
        "redis+sentinel://:s3/cret@a/shop",
        "redis+sentinel://:s3cret@a/shop?no_such_option=s3cret",
        "redis+cluster://:s3/cret@localhost:6379",
        "redis+cluster://:1234#s3cret@localhost:6379",
        "redis+cluster://:1234?s3cret@localhost:6379",
        "redis+cluster://:s3cret@localhost:port",
        "redis+cluster://:s3cret@localhost?no_such_option=s3cret",
    ],
)
async def test_a_url_that_cannot_be_read_is_refused_without_quoting_it(
    url: str, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(RegistryRefused, match="SID_REDIS_URL") as refusal:
        await connect(url)

    shown = told(refusal, caplog)
    assert "s3cret" not in shown
    assert "cret@" not in shown


# Primaries


async def claim_one(registry: Registry, item_id: str) -> int:
    record = await registry.record("default", "0123456789abcdef", (4, 8, 16))
    (result,) = await record.claim([Claim(item_id, (1, 2, 3), b"contents")])
    return result.assignment.semantic_id.suffix  # type: ignore[union-attr]


async def claim_again(registry: Registry, item_id: str) -> int:
    """The suffix, asked for until it is acknowledged: a new primary may have no replica yet."""
    for _ in range(20):
        with contextlib.suppress(RegistryUnavailable):
            return await claim_one(registry, item_id)
    raise AssertionError("nothing is acknowledged any more")


async def test_a_server_that_was_demoted_is_left_and_not_even_read(
    start_valkey: Callable[..., Valkey], connect: Connect
) -> None:
    server = start_valkey()
    registry = await connect(server.url, retry_ms=300)
    record = await registry.record("default", "0123456789abcdef", (4, 8, 16))
    assert await claim_one(registry, "item") == 0
    server.client().replicaof("127.0.0.1", free_ports(1)[0])

    with pytest.raises(RegistryUnavailable, match="read-only replica"):
        await claim_one(registry, "other")
    with pytest.raises(RegistryUnavailable, match="read-only replica"):
        await record.by_item_ids(["item"])
    with pytest.raises(RegistryUnavailable, match="read-only replica"):
        await connect(server.url, retry_ms=300)

    waiting = asyncio.create_task(claim_one(await _patient(connect, server), "other"))
    assert await waiting == 1
    assert await record.by_item_ids(["item"]) != [None]


async def _patient(connect: Connect, server: Valkey) -> Registry:
    """A registry that waits longer than the server takes to become a primary again."""
    connecting = asyncio.create_task(connect(server.url, retry_ms=5000))
    await asyncio.sleep(0.2)
    server.client().replicaof("NO", "ONE")
    return await connecting


async def test_a_change_of_primaries_is_followed_within_the_retries(sentinels: Sentinels, connect: Connect) -> None:
    # On all replicas: after the promotion of one, the old primary could still acknowledge with the other alone.
    registry = await connect(sentinels.url, durability="replicated", replicas=2, retry_ms=20_000)
    assert [await claim_one(registry, f"before {number}") for number in range(3)] == [0, 1, 2]
    old = sentinels.primary

    sentinels.ask_sentinels("FAILOVER")
    for number in range(40):
        assert await claim_again(registry, f"during {number}") == 3 + number
        await asyncio.sleep(0.05)

    await until(lambda: sentinels.primary is not old and old.client().role()[0] == b"slave", "no failover")
    assert await claim_again(registry, "after") == 43
    assert await claim_again(registry, "before 1") == 1
    held = sentinels.primary.client()
    assert sum(held.hlen(key) for key in held.scan_iter("sid:*:f:*", count=20_000)) == 44


async def test_a_sentinel_that_has_not_heard_of_a_failover_is_not_believed(
    sentinels: Sentinels, start_valkey: Callable[..., Valkey], connect: Connect
) -> None:
    (port,) = free_ports(1)
    forgotten = start_valkey(port=str(port), password=SECRET)
    stale_port = sentinels.add_sentinel(port)
    await asyncio.to_thread(sentinels.primary.kill)
    await until(lambda: sum(map(sentinels.online, sentinels.primaries())) == 1, "no failover")
    others = ",".join(f"127.0.0.1:{found}" for found in sentinels.sentinel_ports)

    registry = await connect(sentinels.url.replace(others, f"127.0.0.1:{stale_port},{others}"), retry_ms=20_000)

    assert await claim_one(registry, "item") == 0
    assert sentinels.primaries()[0].dbsize() > 0
    assert forgotten.client().dbsize() == 0


async def test_without_any_sentinel_or_primary_callers_are_told(sentinels: Sentinels, connect: Connect) -> None:
    registry = await connect(sentinels.url, retry_ms=200, timeout_ms=500)
    with pytest.raises(RegistryUnavailable, match="no primary that its sentinels agree on"):
        await connect(sentinels.url.replace("/semid/", "/other/"), retry_ms=200)

    for sentinel in sentinels.sentinels:
        sentinel.kill()
        sentinel.wait()
    assert await claim_one(registry, "item") == 0  # who is connected needs no sentinel
    with pytest.raises(RegistryUnavailable, match="no primary that its sentinels agree on") as failure:
        await connect(sentinels.url, retry_ms=200)
    assert quote(SECRET, safe="") not in str(failure.value)


# Credentials


async def test_credentials_of_servers_and_of_sentinels_are_refused_without_telling_them(
    sentinels: Sentinels, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    right, of_sentinel = quote(SECRET, safe=""), quote(SENTINEL_SECRET, safe="")
    for url in (sentinels.url.replace(right, "wr0ng"), sentinels.url.replace(of_sentinel, "wr0ng")):
        with pytest.raises(RegistryRefused, match="does not accept the credentials") as refusal:
            await connect(url, retry_ms=200)
        shown = told(refusal, caplog)
        assert not any(secret in shown for secret in ("wr0ng", SECRET, SENTINEL_SECRET, right, of_sentinel))


async def test_a_sentinel_taken_for_a_server_is_recognised(sentinels: Sentinels, connect: Connect) -> None:
    of_sentinel = quote(SENTINEL_SECRET, safe="")
    with pytest.raises(RegistryUnavailable, match=r"redis\+sentinel"):
        await connect(f"redis://:{of_sentinel}@127.0.0.1:{sentinels.sentinel_ports[0]}")


async def test_tls_trusts_only_the_authority_that_it_was_given(
    tls: Tls, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    base, _, files = tls.url.partition("?")
    without_authority = "&".join(option for option in files.split("&") if not option.startswith("ssl_ca_certs"))

    for url in (f"{base}?{without_authority}", f"{base}?ssl_ca_certs=/nonexistent", "redis" + tls.url[len("rediss") :]):
        with pytest.raises((RegistryUnavailable, RegistryRefused)) as failure:
            await connect(url, retry_ms=200, timeout_ms=500)
        shown = told(failure, caplog)
        assert SECRET not in shown
        assert quote(SECRET, safe="") not in shown

    assert await claim_one(await connect(tls.url), "item") == 0

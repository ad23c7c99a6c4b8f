"""From a URL to connections: to one address, or to the primary that the sentinels name.

A URL of sentinels is `redis+sentinel://[user:password@]host[:port][,host[:port]...]/service_name[/db][?options]`, with
the servers' own credentials, and `sentinel_username` and `sentinel_password` among the options for those of the
sentinels. `rediss+sentinel://` speaks TLS to both. The other options are those of redis-py's URLs.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

import hiredis
from redis import exceptions as redis_errors
from redis.asyncio import BlockingConnectionPool
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import MasterNotFoundError, Sentinel, SentinelConnectionPool
from redis.backoff import NoBackoff

from service.errors import RegistryRefused

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

CONNECTIONS = 16
SENTINEL_PORT = 26379
_SENTINEL_SCHEMES = {"redis+sentinel": "redis", "rediss+sentinel": "rediss"}
_SCHEMES = "redis://, rediss://, unix://, redis+sentinel:// or redis+cluster://"


class Connections(NamedTuple):
    """Connections to the primary, and the address to call it by in messages: the URL without what may be secret."""

    pool: BlockingConnectionPool
    address: str


class NotPrimary(redis_errors.ConnectionError):
    """The server at the end of a new connection is a replica: another connection may find the primary."""


class Sentinels(Sentinel):
    """Sentinels of which the best informed is believed: just after a failover, some still name the old primary."""

    async def discover_master(self, service_name: str) -> tuple[str, int]:
        """The primary's address.

        Raises:
            MasterNotFoundError: No sentinel answers, or it is not known to be up.
            AuthenticationError: A sentinel does not accept the credentials, and no other answers.
        """
        asked = (sentinel.sentinel_masters() for sentinel in self.sentinels)
        answers = await asyncio.gather(*asked, return_exceptions=True)
        states = [answer[service_name] for answer in answers if isinstance(answer, dict) and service_name in answer]
        if not states and any(isinstance(answer, redis_errors.AuthenticationError) for answer in answers):
            raise redis_errors.AuthenticationError("a sentinel's: see sentinel_password")
        latest = max(states, key=lambda state: state["config-epoch"], default=None)
        if latest is None or not self.check_master_state(latest, service_name):
            raise MasterNotFoundError(f"no primary of {service_name} is known to be up")
        return latest["ip"], latest["port"]


class SentinelPool(SentinelConnectionPool, BlockingConnectionPool):
    """Connections to the primary that the sentinels name when the connection is made."""

    async def get_master_address(self) -> Any:
        """The primary's address; the connections to the one before are dropped, those that are taken too."""
        address = await self.sentinel_manager.discover_master(self.service_name)
        before, self.master_address = self.master_address, address  # whoever asks meanwhile finds it changed
        if before not in {None, address}:
            with contextlib.suppress(redis_errors.RedisError, OSError):
                await self.disconnect()
        return address

    async def aclose(self) -> None:
        """Closes the connections, to the sentinels too."""
        await super().aclose()
        await self.sentinel_manager.aclose()


def open_connections(
    url: str, timeout_ms: int, on_connect: Callable[[Any], Awaitable[None]] | None = None
) -> Connections:
    """The connections to the server of a URL; none is made yet.

    Args:
        url: Of one address, or of sentinels.
        timeout_ms: How long connecting may take; answers get a little more, as a wait on the server may take as long.
        on_connect: Run on each new connection once it was authenticated and found to be a primary's.

    Raises:
        RegistryRefused: The URL cannot be read.
    """

    async def greet(connection: Any) -> None:
        await connection.on_connect()
        await _refuse_all_but_primaries(connection)
        if on_connect is not None:
            await on_connect(connection)

    timeout_s = timeout_ms / 1000
    options = {
        **_timeouts(timeout_s),
        "socket_timeout": timeout_s + 0.5,  # WAIT and WAITAOF answer within timeout_ms
        "redis_connect_func": greet,
        "max_connections": CONNECTIONS,
        "timeout": timeout_s,
    }
    scheme, _, rest = url.partition("://")
    try:
        if scheme in _SENTINEL_SCHEMES:
            found = _of_sentinels(_SENTINEL_SCHEMES[scheme], rest, options, timeout_s)
        else:
            found = _of_one_address(url, options)
        found.pool.connection_kwargs["decode_responses"] = False  # keys and values are bytes, whatever the URL says
        found.pool.connection_class = _brisk(found.pool.connection_class)
        found.pool.connection_class(**found.pool.connection_kwargs)  # now, as an unknown option would fail each call
    except (ValueError, TypeError):
        # Without the cause: it may quote a piece of a password that holds a character of the URL's own.
        raise RegistryRefused(
            f"SID_REDIS_URL is no {_SCHEMES} URL that can be read: look at its options, and write what is not a "
            "letter or a digit in a password as %XX."
        ) from None
    return found


def _brisk(connection_class: type[Any]) -> type[Any]:
    """The same connections, quicker: hiredis packs the commands, and what is written is not waited for.

    redis-py packs a batch in many times as long, and makes a task and a timer for each write. What the system does not
    take at once lies in the transport's buffer, and whoever wrote it waits for the reply, within a time.
    """

    class Brisk(connection_class):  # type: ignore[misc]
        def pack_command(self, *parts: Any) -> list[bytes]:
            if isinstance(parts[0], str) and " " in parts[0]:  # which redis-py sends as two
                packed: list[bytes] = super().pack_command(*parts)
                return packed
            return [hiredis.pack_command(parts)]

        async def send_packed_command(self, command: Any, check_health: bool = True) -> None:  # noqa: FBT001, FBT002
            if self._writer is None or self.health_check_interval:
                await super().send_packed_command(command, check_health)
            else:
                self._writer.writelines(command)

    Brisk.__name__ = f"Brisk{connection_class.__name__}"
    return Brisk


def _timeouts(timeout_s: float) -> dict[str, Any]:
    return {
        "socket_connect_timeout": timeout_s,
        "socket_timeout": timeout_s,
        "retry": Retry(NoBackoff(), 0),  # `Primary.call` retries, within one bound
        "protocol": 2,
    }


def _of_one_address(url: str, options: dict[str, Any]) -> Connections:
    parts = urlsplit(url)
    if parts.scheme != "unix":
        _refuse_stray_credentials(url.partition("://")[2])
    parsed = parse_url(url)
    pool = BlockingConnectionPool.from_url(url, **options)
    if parts.scheme == "unix":
        return Connections(pool, unquote(parts.path))
    return Connections(pool, f"{parsed.get('host', 'localhost')}:{parsed.get('port', 6379)}")


def _of_sentinels(scheme: str, rest: str, options: dict[str, Any], timeout_s: float) -> Connections:
    _refuse_stray_credentials(rest)
    authority, _, tail = rest.partition("/")
    path, _, query = tail.partition("?")
    credentials, _, hosts = authority.rpartition("@")
    service, _, database = path.partition("/")
    sentinels = [_host_and_port(host) for host in hosts.split(",")]
    if not service or not (database or "0").isdigit():
        raise ValueError("no service name, or no number for a database")
    of_server: list[tuple[str, str]] = []
    of_sentinel: dict[str, Any] = {}
    for name, value in parse_qsl(query):
        if name in {"sentinel_username", "sentinel_password"}:
            of_sentinel[name.removeprefix("sentinel_")] = value
        else:
            of_server.append((name, value))
    # What redis-py knows to read of a URL, it reads here too.
    parsed: dict[str, Any] = {**parse_url(f"{scheme}://{credentials}@-/{database}?{urlencode(of_server)}")}
    for name in ("host", "connection_class"):
        parsed.pop(name, None)
    tls = {name: value for name, value in parsed.items() if name.startswith("ssl_")}
    if scheme == "rediss":
        of_sentinel["ssl"] = parsed["ssl"] = True
    # One that does not answer holds up each new connection: not for long.
    asked = {**_timeouts(timeout_s / 4), **of_sentinel, **tls}
    manager = Sentinels(sentinels, sentinel_kwargs=asked)  # type: ignore[no-untyped-call]
    service = unquote(service)
    pool = SentinelPool(service, manager, **{**options, **parsed})  # type: ignore[no-untyped-call]
    return Connections(pool, f"{hosts}/{service}")


def _host_and_port(address: str) -> tuple[str, int]:
    """Of `host`, `host:port` or either with an IPv6 host in brackets."""
    parts = urlsplit(f"//{address}")
    if not parts.hostname or parts.path:
        raise ValueError("a sentinel without a host")
    return parts.hostname, parts.port or SENTINEL_PORT


def _refuse_stray_credentials(rest: str) -> None:
    """A password with a `/`, `?` or `#` would end the address, and its rest be read as something else."""
    authority = re.split("[/?]", rest, maxsplit=1)[0]
    if "@" in rest[len(authority) :] or "#" in rest:
        raise ValueError("a character of the URL's own in a password")


async def _refuse_all_but_primaries(connection: Any) -> None:
    """A primary that was demoted answers reads still, from what it has; nobody should be connected to it again."""
    try:
        await connection.send_command("ROLE")
        role = (await connection.read_response())[0].decode()
    except redis_errors.ResponseError:
        return  # ROLE is not open to us: a write will tell
    if role == "sentinel":
        raise redis_errors.RedisError("it is a sentinel, whose URL begins with redis+sentinel://")
    if role != "master":
        raise NotPrimary("its role is " + role)

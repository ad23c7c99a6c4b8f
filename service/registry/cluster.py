"""A cluster: each key is asked of the primary that serves its slot; who that is, is learnt anew when it changes."""

from __future__ import annotations

import asyncio
import contextlib
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from redis import exceptions as redis_errors
from redis.asyncio import Redis
from redis.crc import key_slot

from service.errors import RegistryRefused
from service.registry.calls import Calls, connected, moving
from service.registry.connections import open_connections
from service.registry.primary import COMMANDS_PER_ROUND_TRIP, Primary, Script, ScriptCall

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from service.registry.durability import Durability

    Command = ScriptCall | tuple[Any, ...]
    Ask = Callable[[Primary, Sequence[Command]], Awaitable[list[Any]]]

SCHEMES = {"redis+cluster": "redis", "rediss+cluster": "rediss"}
SLOTS = 16_384
DEFAULT_PORT = 6379
_BARRIER = Script(Path(__file__).with_name("barrier.lua").read_bytes())


class Cluster(Calls):
    """The primaries of a cluster. Its methods are those of one primary; what is sent is grouped by server.

    A call that meets a slot on its way to another server is sent again as a whole: all that is sent is idempotent.
    """

    def __init__(
        self, url: str, durability: Durability | str, timeout_ms: int, retry_ms: int, *, replicas: int = 1
    ) -> None:
        """Describes the cluster; nothing is sent yet.

        Args:
            url: `redis+cluster://[user:password@]host[:port][,host[:port]...][?options]`, of some of its servers.
            durability: What an acknowledgement waits for, on each server that has a part of it.
            timeout_ms: How long one round trip may take.
            retry_ms: How long is tried again while the cluster changes.
            replicas: How many replicas of each primary have to have received what is acknowledged.

        Raises:
            RegistryRefused: The URL cannot be read.
        """
        super().__init__(timeout_ms, retry_ms)
        scheme, _, rest = url.partition("://")
        authority, self._slash, self._options = rest.partition("?")
        self._scheme = SCHEMES[scheme]
        self._credentials, self._at, hosts = authority.rstrip("/").rpartition("@")
        self.address = hosts
        self._seeds = [_host_and_port(host) for host in hosts.split(",")]
        self._open = partial(
            Primary,
            durability=durability,
            timeout_ms=timeout_ms,
            retry_ms=retry_ms,
            replicas=replicas,
            cluster_node=True,
        )
        open_connections(self._url(self._seeds[0]), timeout_ms)  # refused now, not when one is needed
        self._nodes: dict[str, Primary] = {}  # by host:port
        self._slots: list[Primary] = []
        self._refreshing = asyncio.Lock()
        self._refreshed = 0

    # What slots are where

    async def check(self) -> None:
        """Learns who serves which slots, and what each of them promises.

        Raises:
            RegistryRefused: One cannot keep the promise; the message names the setting.
        """
        await self._refresh(self._refreshed)
        await self._each(Primary.check)

    async def recover(self, _error: Exception) -> None:
        """Learns anew who serves which slots."""
        with contextlib.suppress(redis_errors.RedisError, OSError):
            await self._refresh(self._refreshed)

    async def _refresh(self, seen: int) -> None:
        """Asks any server that answers, once however many want to know."""
        async with self._refreshing:
            if self._refreshed != seen:
                return
            table = await self._slot_table()
            slots: list[Primary | None] = [None] * SLOTS
            for first, end, address in table:
                if address not in self._nodes:
                    self._nodes[address] = self._open(self._url(address))
                slots[first : end + 1] = [self._nodes[address]] * (end - first + 1)
            if None in slots:
                raise redis_errors.ClusterDownError(f"nobody serves the slot {slots.index(None)}")
            self._slots = [node for node in slots if node is not None]
            self._refreshed += 1
            for address in self._nodes.keys() - {address for _, _, address in table}:
                await self._nodes.pop(address).close()

    async def _slot_table(self) -> list[tuple[int, int, str]]:
        """First and last slot, and the address of the primary that serves them."""
        failure: Exception = redis_errors.ConnectionError("no server of the cluster answers")
        for address in dict.fromkeys([*self._nodes, *self._seeds]):
            timeout_s = self._timeout_ms / 1000
            client: Redis = Redis.from_url(
                self._url(address), protocol=2, socket_timeout=timeout_s, socket_connect_timeout=timeout_s
            )
            try:
                table = await connected(partial(client.execute_command, "CLUSTER SLOTS"))
                host = address.rpartition(":")[0]
                return [(first, end, _address(primary, host)) for first, end, primary, *_ in table]
            except redis_errors.AuthenticationError:
                raise
            except redis_errors.ResponseError as error:
                if "cluster support disabled" in str(error):
                    raise RegistryRefused(
                        f"The registry at {address} is no cluster: its URL begins with {self._scheme}://."
                    ) from error
                failure = error
            except (redis_errors.RedisError, OSError) as error:
                failure = error
            finally:
                with contextlib.suppress(redis_errors.RedisError, OSError):
                    await client.aclose()
        raise failure

    def _url(self, address: str) -> str:
        return f"{self._scheme}://{self._credentials}{self._at}{address}{self._slash}{self._options}"

    @property
    def _primaries(self) -> list[Primary]:
        return list(dict.fromkeys(self._slots))

    async def _each(self, work: Callable[[Primary], Awaitable[Any]]) -> list[Any]:
        return await _all_of([work(node) for node in self._primaries])

    @property
    def generation(self) -> int:
        """Another number whenever another server may answer than before."""
        return self._refreshed + sum(node.connections_made for node in self._nodes.values())

    # As of one primary

    @property
    def waits(self) -> bool:
        """Whether an acknowledgement needs a wait behind the write on any server."""
        return any(node.waits for node in self._primaries)

    @property
    def unchecked(self) -> bool:
        """Whether a server was not checked since its last connection was made."""
        return any(node.unchecked for node in self._primaries)

    async def recheck(self) -> None:
        """As `Primary.recheck`, of each server; inside `call` only."""
        await self._each(Primary.recheck)

    async def close(self) -> None:
        """Waits for the calls under way, each bounded in time, and closes the connections."""
        await self.finish_calls()
        for node in self._nodes.values():
            await node.close()

    async def matching(self, pattern: bytes) -> list[bytes]:
        """As `Primary.matching`, of each server; inside `call` only."""
        return [key for keys in await self._each(lambda node: node.matching(pattern)) for key in keys]

    async def ping(self) -> None:
        """Returns where every primary takes a write, as durable as promised; inside `call` only."""
        await self._each(self._write_on)

    async def command(self, *parts: Any) -> Any:
        """One command's answer; its key comes second. Inside `call` only."""
        return (await self.pipelined([parts]))[0]

    async def pipelined(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """These commands' answers; inside `call` only."""
        return await self._spread(commands, Primary.pipelined)

    async def read(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """The answers of commands that write nothing, however many, in order.

        Raises:
            RegistryUnavailable: One failed.
        """
        answers: list[Any] = []
        step = COMMANDS_PER_ROUND_TRIP * max(1, len(self._primaries))
        for start in range(0, len(commands), step):
            answers += await self.call(partial(self.pipelined, commands[start : start + step]))
        return answers

    async def written(self, commands: Sequence[Command]) -> list[Any]:
        """As `Primary.written`; one wait for each server. Inside `call` only."""
        return await self._spread(commands, Primary.written)

    async def barrier(self, keys: Sequence[bytes]) -> None:
        """Returns when what was read of these keys' servers is as durable as promised; inside `call` only."""
        await _all_of([self._barrier(node) for node in {self._slots[key_slot(key)] for key in keys}])

    async def _barrier(self, node: Primary) -> None:
        if node.unchecked:
            await node.recheck()
        if node.waits:
            await self._write_on(node)

    async def _write_on(self, node: Primary) -> None:
        """A write to a key of this server's own."""
        names = (b"sid:{%d}:synced" % number for number in count())
        name = next(name for name in names if self._slots[key_slot(name)] is node)
        await node.written([ScriptCall(_BARRIER, [name], [])])

    # Spreading

    async def _spread(self, commands: Sequence[Command], ask: Ask) -> list[Any]:
        """Asks each server for its part, all at once."""
        if not self._slots:
            await self._refresh(self._refreshed)
        places: dict[Primary, list[int]] = {}
        for place, command in enumerate(commands):
            places.setdefault(self._slots[_slot(command)], []).append(place)
        parts = await _all_of(
            [self._ask(node, [commands[place] for place in part], ask) for node, part in places.items()]
        )
        answers: list[Any] = [None] * len(commands)
        for part, found in zip(places.values(), parts, strict=True):
            for place, answer in zip(part, found, strict=True):
                answers[place] = answer
        return answers

    async def _ask(self, node: Primary, commands: Sequence[Command], ask: Ask) -> list[Any]:
        try:
            return await ask(node, commands)
        except redis_errors.AskError as error:
            slot, target = error.slot_id, f"{error.host}:{error.port}"
        if len(commands) == 1:
            return [await self._ask_importing(target, commands[0], ask)]
        # A slot is on its way: what is still here is answered here, the rest where the slot goes.
        of_slot = [place for place, command in enumerate(commands) if _slot(command) == slot]
        others = [place for place, command in enumerate(commands) if _slot(command) != slot]
        answers: list[Any] = [None] * len(commands)
        for place in of_slot:
            (answers[place],) = await self._ask(node, [commands[place]], ask)
        if others:
            found = await self._ask(node, [commands[place] for place in others], ask)
            for place, answer in zip(others, found, strict=True):
                answers[place] = answer
        return answers

    async def _ask_importing(self, address: str, command: Command, ask: Ask) -> Any:
        if address not in self._nodes:
            self._nodes[address] = self._open(self._url(address))
        node = self._nodes[address]
        if isinstance(command, ScriptCall):
            await node.command("SCRIPT LOAD", command.script.source)  # as a second sending would be without ASKING
        return (await ask(node, [("ASKING",), command]))[1]


async def _all_of(work: Sequence[Awaitable[Any]]) -> list[Any]:
    """All results; the worst error, once all have ended: one that does not pass, else one that may."""
    results = await asyncio.gather(*work, return_exceptions=True)
    errors = [result for result in results if isinstance(result, BaseException)]
    if errors:
        raise min(errors, key=lambda error: moving(error) if isinstance(error, Exception) else False)
    return results


def _slot(command: Command) -> int:
    return int(key_slot(command.keys[0] if isinstance(command, ScriptCall) else command[1]))


def _address(server: Sequence[Any], asked: str) -> str:
    """Of a server in the table; one that does not know its own is where it was asked."""
    host = (server[0] or b"").decode()
    return f"{host or asked}:{server[1]}"


def _host_and_port(text: str) -> str:
    try:
        parts = urlsplit(f"//{text}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or parts.path:
        raise RegistryRefused(
            "SID_REDIS_URL is no redis+cluster:// URL that can be read: redis+cluster://[user:password@]host:port,..."
        )
    return f"{f'[{host}]' if ':' in host else host}:{port or DEFAULT_PORT}"


Server = Primary | Cluster


def open_server(url: str, durability: Durability | str, timeout_ms: int, retry_ms: int, *, replicas: int = 1) -> Server:
    """The client for a URL of any kind; nothing is sent yet. See `Primary` and `Cluster`."""
    kind = Cluster if url.partition("://")[0] in SCHEMES else Primary
    return kind(url, durability, timeout_ms, retry_ms, replicas=replicas)

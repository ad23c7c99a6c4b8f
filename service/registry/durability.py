"""What an acknowledgement promises, and whether a server can keep it."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from redis import exceptions as redis_errors

from service.errors import RegistryRefused

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    Command = Callable[..., Awaitable[Any]]
    Pipelined = Callable[[Sequence[tuple[Any, ...]]], Awaitable[list[Any]]]

logger = logging.getLogger(__name__)

SYNCS_PROBED = 3  # the first may come at once, each of the others a second after the one before
PROBE = b"sid:probe"  # a key to try writes on


class Durability(StrEnum):
    """What has to have happened before an assignment is acknowledged."""

    MEMORY = "memory"
    """The server has it in memory; a crash of the server may lose it."""
    FSYNC = "fsync"
    """It is synced to the server's disk."""
    REPLICATED = "replicated"
    """It is synced to the server's disk, and replicas have received it."""


@dataclass(frozen=True, slots=True)
class Wait:
    """What is waited for behind a write, on the same connection and in the same round trip.

    Attributes:
        sync: Whether for the server's own sync to disk, as its policy syncs later than it answers.
        replicas: For how many replicas to receive it.
    """

    sync: bool = False
    replicas: int = 0

    @property
    def needed(self) -> bool:
        """Whether there is anything to wait for."""
        return self.sync or self.replicas > 0

    def commands(self, timeout_ms: int) -> list[tuple[Any, ...]]:
        """What to send behind the write; each answers within `timeout_ms`."""
        waiting: list[tuple[Any, ...]] = []
        if self.replicas:
            waiting.append(("WAIT", self.replicas, timeout_ms))
        if self.sync:
            waiting.append(("WAITAOF", 1, 0, timeout_ms))
        return waiting

    def shortfall(self, answers: Sequence[Any]) -> str | None:
        """What the answers to these commands leave unconfirmed; None where nothing."""
        counts = iter(answers)
        if self.replicas and (received := next(counts)) < self.replicas:
            return f"has it on {received} of the {self.replicas} replicas that SID_REPLICAS asks for"
        if self.sync and next(counts)[0] < 1:
            return "did not confirm the sync to disk"
        return None


@dataclass(frozen=True)
class Promise:
    """What an acknowledgement promises.

    Attributes:
        durability: What an acknowledgement waits for.
        replicas: How many replicas have to have received it, under `replicated`.
        timeout_ms: How long a wait may take.
        cluster_node: Whether the server may be a cluster's, as its caller keeps to the slots that it serves.
    """

    durability: Durability
    replicas: int
    timeout_ms: int
    cluster_node: bool = False

    async def examine(self, address: str, command: Command, pipelined: Pipelined, honest: set[str]) -> Wait:
        """What to wait for behind each write to this server.

        Args:
            address: The server's, for the message.
            command: Sends a command to the server.
            pipelined: Sends several on one connection.
            honest: Runs of servers whose confirmations were found to be true; the server's is added.

        Raises:
            RegistryRefused: The server would break the promise; the message names the setting.
        """
        config = await _config(command)
        server = await _information(command, "server")
        if config.get("maxmemory", "0") != "0" and config.get("maxmemory-policy", "").startswith("allkeys"):
            raise RegistryRefused(
                f"The registry at {address} evicts keys when its memory is full, and with them acknowledged "
                f"Semantic IDs: set its maxmemory-policy ({config['maxmemory-policy']}) to noeviction."
            )
        if "cluster" in {server.get("server_mode"), server.get("redis_mode")} and not self.cluster_node:
            raise RegistryRefused(f"The registry at {address} is a cluster: its URL begins with redis+cluster://.")
        if self.durability is Durability.MEMORY:
            return Wait()
        sync = await self._needs_sync(address, command, config, server)
        if config.get("appendfsync") == "everysec" and server.get("run_id", "") not in honest:
            if self.cluster_node or await _confirms_too_early(pipelined, self.timeout_ms):
                raise RegistryRefused(
                    f"The registry at {address} syncs to disk once a second (appendfsync everysec) and confirms writes "
                    "before that: set its appendfsync to always, or weaken the promise with SID_DURABILITY=memory."
                )
            honest.add(server.get("run_id", ""))
        if self.durability is Durability.FSYNC:
            return Wait(sync)
        await self._count_replicas(address, command)
        return Wait(sync, self.replicas)

    async def _needs_sync(self, address: str, command: Command, config: dict[str, str], server: dict[str, Any]) -> bool:
        """Whether the server answers before it has synced; refused where it cannot confirm that it has."""
        if config.get("appendonly") == "no":
            raise RegistryRefused(
                f"The registry at {address} has no append-only file: turn it on (appendonly yes), or weaken "
                "the promise with SID_DURABILITY=memory."
            )
        if config.get("appendfsync") == "no":
            raise RegistryRefused(
                f"The registry at {address} never syncs (appendfsync no): set it to always, or weaken "
                "the promise with SID_DURABILITY=memory."
            )
        # Under no-appendfsync-on-rewrite even "always" answers before the sync while a rewrite runs.
        if config.get("appendfsync") == "always" and config.get("no-appendfsync-on-rewrite") != "yes":
            return False
        try:
            await command("WAITAOF", 1, 0, self.timeout_ms)
        except redis_errors.ResponseError as error:
            raise RegistryRefused(
                f"The registry at {address} (version {server.get('redis_version', 'unknown')}) cannot confirm "
                f"that a write is on disk ({error}): set its appendonly yes and appendfsync always, use Valkey or "
                "Redis 7.2 or later, or weaken the promise with SID_DURABILITY=memory."
            ) from error
        return True

    async def _count_replicas(self, address: str, command: Command) -> None:
        replication = await _information(command, "replication")
        if "connected_slaves" not in replication:
            return  # INFO is not open to us: each write counts
        replicas = [
            value for name, value in replication.items() if name.startswith("slave") and isinstance(value, dict)
        ]
        online = sum(replica.get("state") == "online" for replica in replicas)
        if online < self.replicas:
            raise RegistryRefused(
                f"The registry at {address} has {online} connected replicas, and an acknowledgement needs "
                f"{self.replicas}: connect more, or weaken the promise with a smaller SID_REPLICAS or "
                "SID_DURABILITY=fsync."
            )


async def _confirms_too_early(pipelined: Pipelined, timeout_ms: int) -> bool:
    """Whether a server that syncs once a second confirms several writes, one after the other, in less.

    Valkey 9.1 does: its WAITAOF counts what was written to the file, though the file is synced later.
    """
    write = [("SET", PROBE, b"1"), ("WAITAOF", 1, 0, timeout_ms)]
    began = time.monotonic()
    answers = await pipelined(write * SYNCS_PROBED)
    confirmed = all(answer[0] for answer in answers[1::2])
    return confirmed and time.monotonic() - began < SYNCS_PROBED - 2


async def _config(command: Command) -> dict[str, str]:
    """The settings that matter; empty where CONFIG is forbidden, as with hosted servers."""
    names = ("appendonly", "appendfsync", "no-appendfsync-on-rewrite", "maxmemory", "maxmemory-policy")
    try:
        answer = await command("CONFIG GET", *names)
    except redis_errors.ResponseError as error:
        logger.info("CONFIG is not open to us (%s): each write is confirmed by WAITAOF", error)
        return {}
    return {_text(name): _text(value) for name, value in answer.items()}


async def _information(command: Command, section: str) -> dict[str, Any]:
    try:
        answer: dict[str, Any] = await command("INFO", section)
    except redis_errors.ResponseError:
        return {}
    return answer


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value

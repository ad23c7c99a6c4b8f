"""The registries that a run can be made on."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import redis

from tests.chaos.proxy import Network, Proxy
from tests.chaos.schedule import FLUSH_SCRIPTS, KILL_PRIMARY, KILL_REPLICA
from tests.chaos.servers import Server, Valkey

Action = Callable[[], None]


class Topology(Protocol):
    """A registry, and what can befall it.

    Attributes:
        servers: Its processes.
        proxies: Between it and the services.
        atomic: Whether it makes all changes of a request at once.
    """

    servers: Sequence[Server]
    proxies: Sequence[Proxy]
    atomic: bool

    def url(self, service: int, /) -> str:
        """Where a service finds it."""

    def start(self) -> None:
        """Starts it and waits for it."""

    def wait_until_whole(self) -> None:
        """Returns once all its servers, which were started again, do their part."""

    def befall(self, kind: str, pick: float, /) -> Action | None:
        """Begins a fault of this kind; what ends it, or None where it is over at once."""


class Single:
    """One primary, and a replica of it; a proxy for each service.

    Args:
        directory: For their files.
        network: Of the proxies.
        seed: Of the proxies.
        services: How many.
        options: Of the servers.
    """

    atomic = True

    def __init__(self, directory: Path, network: Network, seed: int, services: int, options: Mapping[str, str]) -> None:
        self.primary = Valkey(directory / "primary", **options)
        self.replica = Valkey(directory / "replica", replicaof=f"127.0.0.1 {self.primary.port}", **options)
        self.servers = [self.primary, self.replica]
        self.proxies = [Proxy(network, self.primary.port, f"{seed}-registry-{i}") for i in range(services)]

    def url(self, service: int, /) -> str:
        return f"redis://127.0.0.1:{self.proxies[service].port}"

    def start(self) -> None:
        for server in self.servers:
            server.start()
            server.wait_until_ready()

    def wait_until_whole(self) -> None:
        for server in self.servers:
            server.wait_until_ready()

    def befall(self, kind: str, _pick: float, /) -> Action | None:
        """Begins a fault; there is one of each, so nothing to pick."""
        if kind == FLUSH_SCRIPTS:
            if self.primary.alive:
                flush_scripts(self.primary)
            return None
        server = {KILL_PRIMARY: self.primary, KILL_REPLICA: self.replica}[kind]
        server.kill(signal.SIGKILL)
        return server.start


def flush_scripts(server: Valkey) -> None:
    """Makes the server forget all scripts."""
    with server.client() as client, contextlib.suppress(redis.RedisError):  # it may be on its way up
        client.script_flush()

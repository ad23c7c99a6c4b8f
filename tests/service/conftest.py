"""Real servers for the tests: nothing here is a mock."""

from __future__ import annotations

import shutil
import tempfile
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from service.batching.capacity import Capacity
from service.bulk.row_thread import RowThread
from service.registry import Record, Registry, durability
from tests.claims import FINGERPRINT, SIZES
from tests.service.letters import LetterEncoder, batcher_of
from tests.valkey import Valkey
from tests.valkey_cluster import ValkeyCluster

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from service.batching.batcher import Batcher
    from tests.conftest import ServiceThread
    from tests.service.letters import MakeBatcher


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory whose path leaves room for a socket's name, as pytest's own may not."""
    path = Path(tempfile.mkdtemp(prefix="semid-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def row_thread() -> Iterator[RowThread]:
    """The thread that rows of bulk are read and written on."""
    with RowThread() as thread:
        yield thread


@pytest.fixture
def start_valkey(short_path: Path) -> Iterator[Callable[..., Valkey]]:
    """Starts servers, `start_valkey(appendfsync="everysec")`, and ends them with the test."""
    servers: list[Valkey] = []

    def start(**options: Any) -> Valkey:
        directory = short_path / f"server-{len(servers)}"
        directory.mkdir()
        servers.append(Valkey(directory, **options))
        return servers[-1]

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.kill()


@pytest.fixture
def believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a server confirm what it has not synced yet, as the one at hand does: the waiting is tested all the same."""

    async def believe(*_: object) -> bool:
        return False

    monkeypatch.setattr(durability, "_confirms_too_early", believe)


@pytest.fixture(scope="session")
def shared_valkey() -> Iterator[Valkey]:
    """One server for all tests that do it no harm; each keeps to its own namespace."""
    directory = Path(tempfile.mkdtemp(prefix="semid-"))
    server = Valkey(directory)
    yield server
    server.kill()
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def shared_cluster() -> Iterator[ValkeyCluster]:
    """A cluster for all tests that do it no harm."""
    directory = Path(tempfile.mkdtemp(prefix="semid-"))
    # A server that a busy machine stops for a moment is to keep its place, and what it had not replicated.
    running = ValkeyCluster(directory, **{"cluster-node-timeout": "15000"})
    yield running
    running.stop()
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def titled_service(start_service: Callable[..., ServiceThread]) -> Iterator[ServiceThread]:
    """A running service that keeps titles of items, of up to 40 bytes; shared by the tests of these."""
    directory = Path(tempfile.mkdtemp(prefix="semid-"))
    running = start_service(data_dir=directory, display_bytes=40, max_items=64)
    yield running
    running.stop()
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


@pytest.fixture
async def record(shared_valkey: Valkey, connect: Callable[..., Awaitable[Registry]], namespace: str) -> Record:
    """An empty record on the shared server."""
    registry = await connect(shared_valkey.url, timeout_ms=20_000)  # the machine may be busy with other things
    return await registry.record(namespace, FINGERPRINT, SIZES)


@pytest.fixture
def callers() -> Iterator[ThreadPoolExecutor]:
    """Callers at once."""
    with ThreadPoolExecutor(24) as pool:
        yield pool


@pytest.fixture
async def make_batcher() -> AsyncIterator[MakeBatcher]:
    """Makes a batcher at work around a letter encoder; each is stopped with the test.

    Where `batch_takes_s` is given, lanes have their shares by a clock on which each batch takes so long.
    """
    made: list[tuple[Batcher, LetterEncoder]] = []

    def make(
        batch_tokens: int = 100, queue_tokens: int = 1000, batch_takes_s: float | None = None, **options: Any
    ) -> tuple[Batcher, LetterEncoder]:
        encoder = LetterEncoder()
        clock = time.perf_counter if batch_takes_s is None else lambda: batch_takes_s * len(encoder.batches)
        batcher = batcher_of(encoder, batch_tokens, Capacity(queue_tokens, clock), **options)
        batcher.start()
        made.append((batcher, encoder))
        return batcher, encoder

    yield make
    for batcher, encoder in made:
        encoder.free.set()
        await batcher.stop()

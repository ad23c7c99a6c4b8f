"""A registry that is older than what was acknowledged issues nothing until an operator accepts it."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from service.errors import ChangesGone, RegistryOlder
from service.registry import Claim, Registry
from service.registry.atomic import _CLAIM
from service.registry.marks import Mark, Marks
from service.registry.request_queue import Request
from tests.ports import free_ports
from tests.valkey import Valkey

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from service.registry import Record

    Connect = Callable[..., Awaitable[Registry]]

FINGERPRINT = "0123456789abcdef"
NAME = f"default:{FINGERPRINT}"
META = f"sid:{{{NAME}}}:meta"
SIZES = (256, 256, 256)


async def record_of(registry: Registry, *, create: bool = True) -> Record:
    return await registry.record("default", FINGERPRINT, SIZES, create=create)


async def assign(registry: Registry, *item_ids: str) -> list[str]:
    results = await (await record_of(registry)).claim([Claim(item, (1, 2, 3), b"8" * 8) for item in item_ids])
    return [str(result.assignment.semantic_id) for result in results]  # type: ignore[union-attr]


async def assert_refused(registry: Registry) -> None:
    """Nothing is issued, acknowledged or told, and the registry is left as it is."""
    with pytest.raises(RegistryOlder):
        await assign(registry, "new")
    with pytest.raises(RegistryOlder):
        await (await record_of(registry)).retire(["a"])
    with pytest.raises(RegistryOlder):
        await (await record_of(registry, create=False)).by_item_ids(["a"])
    with pytest.raises(RegistryOlder):
        await (await record_of(registry, create=False)).tree.children([()])
    with pytest.raises(RegistryOlder):
        await (await record_of(registry, create=False)).changes.after(0, 10)
    with pytest.raises(RegistryOlder):
        await registry.ping()


def wait_for_revision(server: Valkey, revision: bytes) -> None:
    deadline = time.monotonic() + 20
    while server.client().hget(META, "revision") != revision:
        assert time.monotonic() < deadline, "the replica does not follow"
        time.sleep(0.02)


class Backup:
    """The append-only file of a server as it was."""

    def __init__(self, server: Valkey, directory: Path) -> None:
        self._server = server
        self._files = server.socket.parent / "appendonlydir"
        self._copy = directory / "backup"
        shutil.copytree(self._files, self._copy)

    def restore(self) -> None:
        self._server.kill()
        shutil.rmtree(self._files)
        shutil.copytree(self._copy, self._files)
        self._server.restart()


@pytest.fixture
def server(start_valkey: Callable[..., Valkey]) -> Valkey:
    return start_valkey()


async def test_a_registry_restored_from_a_backup_is_refused_by_running_and_by_restarted_services(
    server: Valkey, connect: Connect, short_path: Path
) -> None:
    marks = Marks.open(short_path)
    registry = await connect(server.url, marks=marks, retry_ms=5000)
    await assign(registry, "a")
    backup = Backup(server, short_path)
    await assign(registry, "b", "c")
    backup.restore()

    await assert_refused(registry)

    await marks.close()
    restarted = await connect(server.url, marks=Marks.open(short_path))
    await assert_refused(restarted)
    assert server.client().hget(META, "revision") == b"1"


async def test_what_one_service_acknowledged_another_on_its_data_directory_has_to_find(
    server: Valkey, connect: Connect, short_path: Path
) -> None:
    idle = await connect(server.url, marks=Marks.open(short_path), retry_ms=5000)
    await assign(idle, "a")
    backup = Backup(server, short_path)
    busy = await connect(server.url, marks=Marks.open(short_path))
    await assign(busy, "b", "c")
    backup.restore()

    await assert_refused(idle)

    assert server.client().hget(META, "revision") == b"1"


async def test_a_restart_without_a_loss_goes_on(server: Valkey, connect: Connect, short_path: Path) -> None:
    marks = Marks.open(short_path)
    first = await assign(await connect(server.url, marks=marks), "a", "b")
    await marks.close()

    again = await connect(server.url, marks=Marks.open(short_path))

    assert await assign(again, "a", "b", "c") == [*first, "1-2-3-2"]


async def test_an_emptied_registry_is_refused_after_a_restart_too_and_left_empty(
    server: Valkey, connect: Connect, short_path: Path
) -> None:
    marks = Marks.open(short_path)
    await assign(await connect(server.url, marks=marks), "a")
    await marks.close()
    server.client().flushall()

    registry = await connect(server.url, marks=Marks.open(short_path))

    await assert_refused(registry)
    assert server.client().keys("sid:{*") == []


async def test_a_replica_that_was_late_at_a_failover_is_refused(
    start_valkey: Callable[..., Valkey], connect: Connect, short_path: Path
) -> None:
    ports = free_ports(2)
    primary = start_valkey(port=str(ports[0]))
    replica = start_valkey(port=str(ports[1]))
    replica.client().replicaof("127.0.0.1", str(ports[0]))
    registry = await connect(primary.url, marks=Marks.open(short_path))
    await assign(registry, "a")
    await asyncio.to_thread(wait_for_revision, replica, b"1")
    replica.client().replicaof("NO", "ONE")
    await assign(registry, "b")
    primary.kill()
    primary.socket.unlink(missing_ok=True)
    primary.socket.symlink_to(replica.socket)  # the same address leads to the other server

    await assert_refused(registry)
    assert replica.client().hget(META, "revision") == b"1"


async def test_after_accept_every_service_goes_on_by_itself_and_a_former_revision_is_no_revision(
    server: Valkey, connect: Connect, short_path: Path
) -> None:
    running = await connect(server.url, marks=Marks.open(short_path), retry_ms=5000)
    other = await connect(server.url, marks=Marks.open(short_path / "other"), retry_ms=5000)
    await assign(running, "a")
    backup = Backup(server, short_path)
    await assign(running, "b", "c")
    await assign(other, "d")
    former = (await record_of(running)).history.epoch
    backup.restore()
    await assert_refused(running)
    await assert_refused(other)

    operator = await connect(server.url, marks=Marks(short_path / "history"))
    (comparison,) = await operator.compare()
    assert (comparison.name, comparison.older, comparison.lost, comparison.live) == (NAME, True, 2, 1)
    assert await operator.accept(comparison)
    assert not await operator.accept(comparison)  # it has another epoch now

    for registry in (running, other):
        await registry.ping()
    assert await assign(running, "e") == ["1-2-3-1"]
    assert await assign(other, "a", "d") == ["1-2-3-0", "1-2-3-2"]
    record = await record_of(other)
    assert server.client().hget(META, "former") == former + b"@1"
    assert len((await record.changes.after(1, 10, epoch=record.history.epoch)).changes) == 2
    with pytest.raises(ChangesGone, match="another epoch"):
        await record.changes.after(1, 10, epoch=former)
    (comparison,) = await operator.compare()
    assert not comparison.older


async def test_a_service_that_was_down_meanwhile_goes_on_from_what_was_accepted(
    server: Valkey, connect: Connect, short_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    marks = Marks.open(short_path)
    registry = await connect(server.url, marks=marks, retry_ms=5000)
    await assign(registry, "a")
    backup = Backup(server, short_path)
    await assign(registry, "b")
    await marks.close()
    backup.restore()
    operator = await connect(server.url, marks=Marks(short_path / "history"))
    await operator.accept((await operator.compare())[0])

    later = await connect(server.url, marks=Marks.open(short_path))

    assert await assign(later, "c") == ["1-2-3-1"]
    assert "lost up to 1 changes" in caplog.text


async def test_an_emptied_registry_that_was_accepted_starts_anew(
    server: Valkey, connect: Connect, short_path: Path
) -> None:
    running = await connect(server.url, marks=Marks.open(short_path), buckets=7)
    await assign(running, "a", "b")
    server.client().flushall()
    await assert_refused(running)
    operator = await connect(server.url, marks=Marks(short_path / "history"))
    (comparison,) = await operator.compare()
    assert (comparison.lost, str(comparison.found)) == (2, "nothing")

    await operator.accept(comparison)

    other = await connect(server.url, buckets=9)  # its record is the one that is made anew
    assert await assign(other, "x") == ["1-2-3-0"]
    assert await assign(running, "x", "b") == ["1-2-3-0", "1-2-3-1"]
    assert (await record_of(running)).buckets == 9


async def test_the_same_backup_restored_again_is_refused_again(
    server: Valkey, connect: Connect, short_path: Path
) -> None:
    registry = await connect(server.url, marks=Marks.open(short_path), retry_ms=5000)
    await assign(registry, "a")
    backup = Backup(server, short_path)
    for _ in range(2):
        await assign(registry, "b")
        backup.restore()
        await assert_refused(registry)
        operator = await connect(server.url, marks=Marks(short_path / "history"))
        await operator.accept((await operator.compare())[0])
        await registry.ping()

    assert await assign(registry, "c") == ["1-2-3-1"]


async def test_the_mark_is_written_before_the_answer(
    server: Valkey, connect: Connect, short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marks = Marks.open(short_path)
    registry = await connect(server.url, marks=marks)
    await assign(registry, "a")
    seen: list[frozenset[Mark]] = []
    pwrite = os.pwrite

    def killed(*arguments: object) -> int:
        pwrite(*arguments)  # type: ignore[arg-type]
        seen.append(Marks(short_path / "history").of(NAME))  # what a successor would read
        raise KeyboardInterrupt  # the answer is never given

    monkeypatch.setattr(os, "pwrite", killed)
    send = (await record_of(registry))._items._send

    with pytest.raises(KeyboardInterrupt):
        await send(_CLAIM, [Request(b"b", b"K" + b"8" * 8 + bytes([1, 2, 3]))])

    assert {mark.revision for mark in seen[0]} == {2}


async def test_what_another_service_assigned_is_marked_once_it_is_told(
    server: Valkey, connect: Connect, short_path: Path
) -> None:
    writer = await connect(server.url)
    reader = await connect(server.url, marks=Marks.open(short_path))
    await assign(writer, "a", "b")

    await (await record_of(reader, create=False)).by_item_ids(["b"])

    assert {mark.revision for mark in Marks(short_path / "history").of(NAME)} == {2}


@pytest.mark.usefixtures("believed")
@pytest.mark.parametrize("durability", ["fsync", "memory"])
async def test_a_server_that_syncs_later_is_marked_only_as_far_as_acknowledged(
    start_valkey: Callable[..., Valkey], connect: Connect, short_path: Path, durability: str
) -> None:
    server = start_valkey(appendfsync="everysec")
    registry = await connect(server.url, marks=Marks.open(short_path), durability=durability)

    await assign(registry, "a")
    await (await record_of(registry)).by_item_ids(["a"])

    assert {mark.revision for mark in Marks(short_path / "history").of(NAME)} == {1}

"""The file of marks: what was written is there for the next service, whatever ended the one before."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from service.errors import RegistryRefused
from service.registry.marks import COPY, ENTRY, Mark, Marks

EPOCH = b"0123456789abcdef"
ROOT = Path(__file__).parents[3]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "history" / "marks-0"


async def marks_with(directory: Path, *revisions: int, name: str = "default:f") -> Marks:
    marks = Marks.open(directory)
    marks.begin(name, Mark(EPOCH, 0))
    for revision in revisions:
        assert marks.advance(name, Mark(EPOCH, revision))
    return marks


def read(directory: Path, name: str = "default:f") -> set[Mark]:
    return set(Marks(directory / "history").of(name))


def content(file: Path) -> bytes:
    return file.read_bytes()


def write(file: Path, packed: bytes) -> None:
    file.write_bytes(packed)


async def test_the_latest_mark_of_each_record_is_found_by_the_next_service(tmp_path: Path) -> None:
    first = await marks_with(tmp_path, 1, 2, 3, 4, 5)
    first.begin("shop:f", Mark(EPOCH, 0))
    first.advance("shop:f", Mark(EPOCH, 2**53))
    await first.close()

    second = Marks.open(tmp_path)

    assert second.of("default:f") == {Mark(EPOCH, 5)}
    assert second.of("shop:f") == {Mark(EPOCH, 2**53)}
    assert second.names() == {"default:f", "shop:f"}
    assert second.of("other:f") == frozenset()
    assert len(list((tmp_path / "history").iterdir())) == 1
    await second.close()


async def test_a_mark_never_goes_back_in_its_epoch(tmp_path: Path) -> None:
    marks = await marks_with(tmp_path, 5, 3)

    assert read(tmp_path) == {Mark(EPOCH, 5)}

    marks.begin("default:f", Mark(b"other", 2))
    assert read(tmp_path) == {Mark(b"other", 2)}
    assert not marks.advance("default:f", Mark(EPOCH, 9))
    assert read(tmp_path) == {Mark(b"other", 2)}
    await marks.close()


async def test_services_on_one_directory_have_a_file_each_and_read_all(tmp_path: Path) -> None:
    first = await marks_with(tmp_path, 7)
    second = await marks_with(tmp_path, 9)
    assert sorted(path.name for path in (tmp_path / "history").iterdir()) == ["marks-0", "marks-1"]
    first.advance("default:f", Mark(EPOCH, 8))
    second.begin("late:f", Mark(EPOCH, 1))

    assert first.of("default:f") == second.of("default:f") == {Mark(EPOCH, 8), Mark(EPOCH, 9)}
    assert first.of("late:f") == {Mark(EPOCH, 1)}
    await first.close()
    third = Marks.open(tmp_path)
    assert third.of("default:f") == {Mark(EPOCH, 8), Mark(EPOCH, 9)}
    assert len(list((tmp_path / "history").iterdir())) == 2
    await second.close()
    await third.close()


async def test_a_mark_survives_a_kill_of_its_service(tmp_path: Path) -> None:
    script = (
        "import asyncio, os, signal, sys, pathlib\n"
        "from service.registry.marks import Mark, Marks\n"
        "async def main():\n"
        "    marks = Marks.open(pathlib.Path(sys.argv[1]))\n"
        "    marks.begin('default:f', Mark(b'0123456789abcdef', 0))\n"
        "    for revision in range(1, 1000):\n"
        "        marks.advance('default:f', Mark(b'0123456789abcdef', revision))\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "asyncio.run(main())\n"
    )

    ended = await asyncio.to_thread(subprocess.run, [sys.executable, "-c", script, tmp_path], cwd=ROOT, check=False)

    assert ended.returncode == -signal.SIGKILL
    marks = Marks.open(tmp_path)
    assert marks.of("default:f") == {Mark(EPOCH, 999)}
    assert len(list((tmp_path / "history").iterdir())) == 1  # its lock went with it
    await marks.close()


@pytest.mark.parametrize("kept", [0, 1, 4, 5, 11, 12, 13, 19])
async def test_a_write_that_was_cut_short_leaves_the_mark_before(tmp_path: Path, file: Path, kept: int) -> None:
    await (await marks_with(tmp_path, 1, 2, 3)).close()
    before = content(file)
    await (await marks_with(tmp_path, 300)).close()
    after = content(file)
    # Of the bytes that the last write changed, only the first few arrive.
    places = [ENTRY, ENTRY + COPY]
    (start,) = [place for place in places if before[place : place + COPY] != after[place : place + COPY]]
    write(file, before[:start] + after[start : start + kept] + before[start + kept :])

    assert read(tmp_path) == {Mark(EPOCH, 3)}


@pytest.mark.parametrize("place", [0, ENTRY + 2 * COPY, ENTRY + 2 * COPY + 8])
async def test_a_damaged_file_is_refused_with_what_to_do(tmp_path: Path, file: Path, place: int) -> None:
    await (await marks_with(tmp_path, 1, 2, 3)).close()
    damaged = bytearray(content(file))
    damaged[place] ^= 0xFF
    write(file, bytes(damaged))

    with pytest.raises(RegistryRefused, match="move the file away"):
        Marks.open(tmp_path)


async def test_two_damaged_copies_are_refused(tmp_path: Path, file: Path) -> None:
    await (await marks_with(tmp_path, 1, 2, 3)).close()
    damaged = bytearray(content(file))
    for copy in (0, 1):
        damaged[ENTRY + copy * COPY + 20] ^= 1
    write(file, bytes(damaged))

    with pytest.raises(RegistryRefused, match="neither copy"):
        Marks.open(tmp_path)


async def test_a_directory_that_cannot_be_written_is_said_once_and_marks_are_kept_in_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "history").write_text("")  # a file where the directory should be

    marks = await marks_with(tmp_path, 4, 5)

    assert marks.of("default:f") == {Mark(EPOCH, 5)}
    assert caplog.text.count("cannot be written") == 1
    assert "a restart of this service forgets it" in caplog.text
    await marks.close()


async def test_names_of_any_length_have_a_mark_of_their_own(tmp_path: Path) -> None:
    long, longer = "n" * 5000, "n" * 5001
    await (await marks_with(tmp_path, 1, name=long)).close()

    assert read(tmp_path, long) == {Mark(EPOCH, 1)}
    assert read(tmp_path, longer) == set()


async def test_marks_are_synced_in_the_background(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.registry.marks.SYNC_INTERVAL_S", 0.01)
    synced: list[int] = []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        if any(os.path.samestat(os.fstat(descriptor), path.stat()) for path in tmp_path.glob("history/*")):
            synced.append(descriptor)  # not those of a service of another test
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    marks = Marks.open(tmp_path)
    synced.clear()
    marks.begin("default:f", Mark(EPOCH, 1))
    for revision in range(2, 50):
        marks.advance("default:f", Mark(EPOCH, revision))
    assert synced == []

    await asyncio.sleep(0.2)

    assert len(synced) == 1
    await marks.close()

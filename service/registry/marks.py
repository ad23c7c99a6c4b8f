"""How far each record had come when this service last acknowledged something, kept where a failover does not reach.

    SID_DATA_DIR/history/marks-0, marks-1, ...    one for each service on the directory, which locks its own

A service writes its own file alone, and reads all of them: a restarted one takes a free file over, with the marks in
it. A mark is written before the answer that it stands for, into the system's page cache: a kill of the service loses
none. It is synced about once a second.

FILE. 512 bytes with the words of `HEADER`; then one entry of 512 bytes for each record, all numbers big-endian:
    2 times 64 bytes    crc32 4 | sequence 8 | revision 8 | epoch 16. Written in turn, so that a write cut short leaves
                        the other; the one with the higher sequence counts. Zeros: not written yet.
    384 bytes           crc32 4 | length 2 | the record's name. Written once.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import logging
import os
import struct
import time
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from zlib import crc32

from service.errors import RegistryRefused

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger(__name__)

HEADER = b"semid marks 1\n"
ENTRY = 512
COPY = 64
NAME = ENTRY - 2 * COPY
LONGEST_NAME = NAME - 6
SYNC_INTERVAL_S = 1.0
CLOCK_GRAIN_NS = 1_000_000_000  # of a file system's times, at most
READS = 3  # of a file that its service writes meanwhile

_MARK = struct.Struct(">QQ16s")


class Mark(NamedTuple):
    """How far a record had come: the revision of the last acknowledged change, and of which history."""

    epoch: bytes
    revision: int


class Marks:
    """The marks of all records, of this service and of those before and beside it on the same data directory."""

    def __init__(self, directory: Path | None = None) -> None:
        """Keeps marks in memory alone; beside them, reads those in `directory`. `open` keeps them in a file."""
        self._directory = directory
        self._files: dict[str, MarkFile] = {}
        self._own: MarkFile | None = None
        self._latest: dict[str, Mark] = {}
        self._syncing: asyncio.Task[None] | None = None
        self._listed_at_ns = 0

    @classmethod
    def open(cls, data_dir: Path) -> Marks:
        """Keeps marks in a file of this service's own; in memory, with a warning, where none can be written.

        Raises:
            RegistryRefused: A file is damaged: what was acknowledged is not known.
        """
        marks = cls(data_dir / "history")
        try:
            marks._own = _take_file(data_dir / "history")
        except OSError as error:
            logger.warning(
                "%s cannot be written (%s): how far the registry has come is kept in memory, and a restart of this "
                "service forgets it",
                data_dir / "history",
                error.strerror,
            )
        else:
            marks._files[marks._own.path.name] = marks._own
        try:
            for file in marks._read_files():
                for name in file.names():
                    file.mark(name)  # damage is found now, not at a request
        except BaseException:
            marks._close_files()
            raise
        return marks

    async def close(self) -> None:
        """Syncs, and lets the file go to the next service."""
        if self._syncing is not None:
            self._syncing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._syncing
        await asyncio.to_thread(self._sync)
        self._close_files()

    def names(self) -> set[str]:
        """The records that have a mark."""
        names = set(self._latest)
        for file in self._read_files():
            names |= {name for name in file.names() if file.mark(name)}
        return names

    def of(self, name: str) -> frozenset[Mark]:
        """The marks of one record, one from each service that had any.

        Raises:
            RegistryRefused: A file is damaged.
        """
        found = {file.mark(name) for file in self._read_files()} | {self._latest.get(name)}
        return frozenset(mark for mark in found if mark is not None)

    def beside(self, name: str) -> frozenset[Mark]:
        """What the other services on the directory have written of one record by now; some microseconds for each.

        Raises:
            RegistryRefused: A file is damaged.
        """
        found = {file.mark(name) for file in self._read_files() if file is not self._own}
        return frozenset(mark for mark in found if mark is not None)

    def begin(self, name: str, mark: Mark) -> None:
        """From here on the record's mark is of this epoch; an earlier one of the same epoch stands if it is higher."""
        latest = self._latest.get(name)
        if latest is None or latest.epoch != mark.epoch or latest.revision < mark.revision:
            self._latest[name] = mark
            if mark.revision or latest:
                self._write(name, mark)

    def advance(self, name: str, mark: Mark) -> bool:
        """Moves the record's mark on; False, and nothing is done, where it is of another epoch by now."""
        latest = self._latest.get(name)
        if latest is None or latest.epoch != mark.epoch:
            return False
        if latest.revision < mark.revision:
            self._latest[name] = mark
            self._write(name, mark)
        return True

    def _write(self, name: str, mark: Mark) -> None:
        if self._own is None:
            return
        try:
            self._own.write(name, mark)
        except OSError as error:
            logger.error(  # noqa: TRY400 - no traceback for a full disk
                "%s cannot be written (%s): the mark of %s is kept in memory", self._own.path, error.strerror, name
            )
        if self._syncing is None or self._syncing.done():
            self._syncing = asyncio.create_task(self._sync_later(), name="registry-marks")

    async def _sync_later(self) -> None:
        await asyncio.sleep(SYNC_INTERVAL_S)
        await asyncio.to_thread(self._sync)

    def _sync(self) -> None:
        if self._own is not None:
            with contextlib.suppress(OSError):  # what matters is in the page cache
                self._own.sync()

    def _read_files(self) -> Iterator[MarkFile]:
        """All files of the directory; those that came since the last look too."""
        if self._directory is not None:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
                self._find_files(self._directory)
        yield from list(self._files.values())

    def _find_files(self, directory: Path) -> None:
        changed_ns = directory.stat().st_mtime_ns
        if changed_ns == self._listed_at_ns:
            return
        for path in directory.glob("marks-*"):
            if path.name not in self._files:
                self._files[path.name] = MarkFile(path, os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        if time.time_ns() - changed_ns > CLOCK_GRAIN_NS:  # else a file that comes now may leave the time as it is
            self._listed_at_ns = changed_ns

    def _close_files(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()
        self._own = None


class MarkFile:
    """One service's marks."""

    def __init__(self, path: Path, descriptor: int) -> None:
        """Reads an open file, and writes it where it was opened so."""
        self.path = path
        self._descriptor = descriptor
        self._places: dict[str, int] = {}
        self._end = ENTRY  # up to where entries were read
        self._sequences: dict[int, int] = {}

    def begin(self) -> None:
        """Writes the header of a new file."""
        if os.fstat(self._descriptor).st_size == 0:
            os.pwrite(self._descriptor, HEADER.ljust(ENTRY, b"\0"), 0)
            self.sync()

    def names(self) -> list[str]:
        """The records that have an entry.

        Raises:
            RegistryRefused: The file is damaged.
        """
        size = os.fstat(self._descriptor).st_size
        if size and self._end == ENTRY and not os.pread(self._descriptor, ENTRY, 0).startswith(HEADER):
            raise self._damaged("its beginning cannot be read")
        while self._end + ENTRY <= size:
            place, self._end = self._end, self._end + ENTRY
            if name := self._name(place):
                self._places[name] = place
        return list(self._places)

    def mark(self, name: str) -> Mark | None:
        """A record's mark; None where it has none here.

        Raises:
            RegistryRefused: The file is damaged.
        """
        self.names()
        place = self._places.get(_fitting(name))
        return self._newest(place)[1] if place is not None else None

    def write(self, name: str, mark: Mark) -> None:
        """Writes a record's mark: some tens of bytes once the record has an entry."""
        name = _fitting(name)
        if name not in self._places:
            self._add(name)
        place = self._places[name]
        sequence = self._sequences.get(place) or self._newest(place)[0]
        self._sequences[place] = sequence = sequence + 1
        packed = _MARK.pack(sequence, mark.revision, mark.epoch)
        os.pwrite(self._descriptor, _checked(packed), place + sequence % 2 * COPY)

    def sync(self) -> None:
        """Returns when all that was written is on the disk."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Closes the file, which lets its lock go."""
        os.close(self._descriptor)

    def _add(self, name: str) -> None:
        encoded = name.encode()
        entry = bytes(2 * COPY) + _checked(struct.pack(">H", len(encoded)) + encoded)
        os.pwrite(self._descriptor, entry.ljust(ENTRY, b"\0"), self._end)
        self._places[name] = self._end
        self._end += ENTRY

    def _name(self, place: int) -> str:
        """The name of an entry; nothing where a power cut left zeros."""
        packed = os.pread(self._descriptor, NAME, place + 2 * COPY)
        length = int.from_bytes(packed[4:6])
        if packed[: 6 + length] != _checked(packed[4 : 6 + length]):
            if not any(packed):
                return ""
            raise self._damaged(f"the name at byte {place + 2 * COPY} cannot be read")
        return packed[6 : 6 + length].decode(errors="replace")

    def _newest(self, place: int) -> tuple[int, Mark | None]:
        """The newer of an entry's two copies, and its sequence."""
        for _ in range(READS):
            packed = os.pread(self._descriptor, 2 * COPY, place)
            newest = _newer(packed[:COPY], packed[COPY:])
            if newest[1] is not None or not any(packed):
                return newest
        raise self._damaged(f"neither copy of the mark at byte {place} can be read")

    def _damaged(self, what: str) -> RegistryRefused:
        # Not passed over: an ID could be issued a second time, which nothing undoes, and a file is moved in a moment.
        return RegistryRefused(
            f"{self.path} is damaged ({what}): how far the registry had come is not known. Make sure that the registry "
            "is not older than it was (a restored copy, a failover), then move the file away."
        )


def _newer(*copies: bytes) -> tuple[int, Mark | None]:
    """The newest of those that are whole, and its sequence."""
    newest: tuple[int, Mark | None] = (0, None)
    for copy in copies:
        if copy[: 4 + _MARK.size] == _checked(copy[4 : 4 + _MARK.size]):
            sequence, revision, epoch = _MARK.unpack(copy[4 : 4 + _MARK.size])
            if sequence > newest[0]:
                newest = sequence, Mark(epoch.rstrip(b"\0"), revision)
    return newest


def _take_file(directory: Path) -> MarkFile:
    """The first file that no running service has."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    for number in count():
        path = directory / f"marks-{number}"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
        except OSError:
            os.close(descriptor)
            raise
        else:
            file = MarkFile(path, descriptor)
            file.begin()
            return file
    raise AssertionError("there is always a next number")


def _checked(packed: bytes) -> bytes:
    """With its checksum before it. Nothing but zeros is not valid."""
    return crc32(packed).to_bytes(4) + packed


def _fitting(name: str) -> str:
    """The name, or what stands for one that is too long for an entry."""
    if len(name.encode()) <= LONGEST_NAME:
        return name
    return f"sha256 {hashlib.sha256(name.encode()).hexdigest()}"

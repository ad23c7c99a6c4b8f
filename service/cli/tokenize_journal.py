"""What a run of `semid tokenize` has been answered so far, on disk beside its result.

    answers --append--> .OUT.run/000000000000.arrow, 000000008192.arrow, ... --finish--> OUT, OUT.rejected.jsonl

A part appears when it is whole and synced, so whatever ends a run leaves the parts before; the next run of the same
command goes on behind them. The result is made of the parts alone, so it does not show how often a run was ended.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import pyarrow as pa
import pyarrow.compute as pc

from service.table import COLUMNS, replaced, write_table

ROWS_PER_PART = 8192
LONGEST_UNSAVED_S = 10.0

ANSWERS = COLUMNS.append(pa.field("error", pa.struct([(name, pa.string()) for name in ("type", "title", "detail")])))
"""A table's columns, null where the item failed, and the item's own error."""


class RunUnderWay(ValueError):
    """Another process is at work on the same result."""


class Counts(NamedTuple):
    """Of a whole run."""

    written: int
    rejected: int


class Journal:
    """The answers of one run; used as a context, at whose end they are on disk.

    Args:
        out: The result.
        identity: What the run is of: a run of something else is not gone on with.

    Attributes:
        rows: How many rows of the input have their answers.
        notes: What the run that began it has noted; write with `note`.

    Raises:
        RunUnderWay: On entering.
    """

    def __init__(self, out: Path, identity: Mapping[str, Any]) -> None:
        self.rows = 0
        self.notes: dict[str, Any] = {}
        self._out = out
        self._identity = dict(identity)
        self._directory = out.with_name(f".{out.name}.run")
        self._parts: list[Path] = []
        self._unsaved: list[pa.RecordBatch] = []
        self._saved_at = time.monotonic()

    def __enter__(self) -> Self:
        self._directory.mkdir(exist_ok=True)
        self._lock = (self._directory / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise RunUnderWay(f"another run writes {self._out}") from error
        self._go_on()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if self._directory.exists():
                self._save()
                if not self._parts:
                    shutil.rmtree(self._directory)
        finally:
            self._lock.close()

    def note(self, **notes: Any) -> None:
        """Keep what holds for the whole run."""
        self.notes |= notes
        self._write_head()

    def append(self, answers: pa.RecordBatch) -> None:
        """Keep the answers (`ANSWERS`) to the next rows; on disk soon."""
        self._unsaved.append(answers)
        unsaved = sum(len(batch) for batch in self._unsaved)
        if unsaved >= ROWS_PER_PART or time.monotonic() > self._saved_at + LONGEST_UNSAVED_S:
            self._save()

    def finish(self, rejected: Path) -> Counts:
        """Write the result, and beside it what was rejected, if anything was; then the journal is gone."""
        counts = self._write_rejected(rejected)
        with write_table(self._out) as table:
            for batch in self.batches():
                table.write(batch.filter(batch["error"].is_null()).select(COLUMNS.names))
        shutil.rmtree(self._directory)
        return counts

    def _write_rejected(self, path: Path) -> Counts:
        row = failures = 0
        with replaced(path) as draft, draft.open("w", encoding="utf-8") as file:
            for batch in self.batches():
                failed = batch["error"].is_valid()
                for place in pc.indices_nonzero(failed).to_pylist():
                    entry = {"row": row + place + 1, "item_id": batch["item_id"][place].as_py()}
                    entry |= batch["error"][place].as_py()
                    file.write(json.dumps(entry, ensure_ascii=False) + "\n")
                    failures += 1
                row += len(batch)
        if not failures:
            path.unlink()
        return Counts(row - failures, failures)

    def batches(self) -> Iterator[pa.RecordBatch]:
        """All answers so far, in order; on disk then."""
        self._save()
        for part in self._parts:
            with pa.memory_map(str(part)) as file, pa.ipc.open_file(file) as batches:
                for number in range(batches.num_record_batches):
                    yield batches.get_batch(number)

    def _go_on(self) -> None:
        """Take up what an earlier run has left, if it was the same run; else begin anew."""
        try:
            head = json.loads(self._head.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            head = {}
        parts = sorted(self._directory.glob("*.arrow"))
        if head.get("identity") != self._identity:
            for part in parts:
                part.unlink()
            self._write_head()
            return
        self.notes = head["notes"]
        for part in parts:
            with pa.memory_map(str(part)) as file, pa.ipc.open_file(file) as batches:
                rows = sum(batches.get_batch(number).num_rows for number in range(batches.num_record_batches))
            self._parts.append(part)
            self.rows += rows

    @property
    def _head(self) -> Path:
        return self._directory / "run.json"

    def _write_head(self) -> None:
        with replaced(self._head) as draft:
            draft.write_text(json.dumps({"identity": self._identity, "notes": self.notes}), encoding="utf-8")

    def _save(self) -> None:
        self._saved_at = time.monotonic()
        if not self._unsaved:
            return
        path = self._directory / f"{self.rows:012}.arrow"
        with replaced(path) as draft, pa.ipc.new_file(str(draft), ANSWERS) as file:
            for batch in self._unsaved:
                file.write_batch(batch)
        _sync(self._directory)
        self._parts.append(path)
        self.rows += sum(len(batch) for batch in self._unsaved)
        self._unsaved = []


def _sync(directory: Path) -> None:
    """What was renamed in it is so after a loss of power too."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

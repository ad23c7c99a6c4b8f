"""What a backfill has done so far, in its output's directory.

    OUT/.backfill/plan.json         what it is of
                  lock              held while it runs
                  codes/PLAN/N.arrow  the codes of block N; a worker that a kill left behind writes to no other plan's
                             N.known  what the record knew of its items before
                  cuts.npy          where the sorted blocks are cut into runs
                  record            which record the claims are of
                  claims/N.known    which items of run N had an ID before
                         N.arrow    what the items of run N hold
                  rejected/N.jsonl  the rejected rows of block N
    OUT/part-N.parquet              the IDs of block N

Each file appears when it is whole and synced, so whatever ends a backfill leaves the files before; the next one of the
same files goes on behind them. The table is a function of these files, so it does not show how often it was ended.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from models.whole_files import sync, write_whole
from service.backfill.code_files import path_of
from service.backfill.plan import Block

SUMMARY = "backfill.json"
REJECTED = "rejected.jsonl"
COLLISIONS = "collisions.json"


class BackfillUnderWay(ValueError):
    """Another process is at work on the same output."""


class Journal:
    """The state of one backfill; used as a context.

    Args:
        out: The output's directory; it is made.
        identity: What the backfill is of.
        force: Whether what is there of anything else gives way.

    Attributes:
        plan: Names this identity.

    Raises:
        BackfillUnderWay: On entering.
        ValueError: On entering: the directory holds something else.
    """

    def __init__(self, out: Path, identity: Mapping[str, Any], *, force: bool = False) -> None:
        self.out = out
        self.directory = out / ".backfill"
        self.cuts = self.directory / "cuts.npy"
        text = json.dumps(identity, sort_keys=True)
        self.plan = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.codes = self.directory / "codes" / self.plan
        self._head = self.directory / "plan.json"
        self._identity = json.loads(text)
        self._force = force

    def __enter__(self) -> Self:
        taken = self.out.is_dir() and any(path != self.directory for path in self.out.iterdir())
        if taken and not self._head.exists() and not self._force:
            raise ValueError(
                f"{self.out} is not empty, and no backfill is under way there; with --force it is written over"
            )
        self.directory.mkdir(parents=True, exist_ok=True)
        self._lock = (self.directory / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise BackfillUnderWay(f"another backfill writes to {self.out}") from error
        try:
            self._go_on()
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def _go_on(self) -> None:
        theirs = json.loads(self._head.read_text(encoding="utf-8")) if self._head.exists() else None
        if theirs != self._identity:
            if theirs is not None and not self._force:
                difference = _difference(theirs, self._identity)
                held = f"{self.out} holds an unfinished backfill of something else ({difference})"
                raise ValueError(f"{held}; with --force it gives way")
            for name in ("codes", "claims", "rejected", "record", "cuts.npy"):
                _remove(self.directory / name)
            self._remove_table()
            write_whole(self._head, json.dumps(self._identity))
        for directory in (self.codes, self.directory / "claims", self.directory / "rejected"):
            directory.mkdir(parents=True, exist_ok=True)

    def finished(self, blocks: int) -> Mapping[str, Any] | None:
        """The summary of this very backfill, where it is done and its table of so many parts is there."""
        summary = self.out / SUMMARY
        if self._head.exists() or not summary.exists():
            return None
        found: Mapping[str, Any] = json.loads(summary.read_text(encoding="utf-8"))
        if found.get("plan") != self.plan or not all(self.part(number).exists() for number in range(blocks)):
            return None
        shutil.rmtree(self.directory, ignore_errors=True)  # a kill as it cleared up
        return found

    def code_file(self, number: int) -> Path:
        """The codes of a block."""
        return path_of(self.codes, number)

    def encoded(self, block: Block) -> bool:
        """Whether a block's codes are there."""
        return self.code_file(block.number).exists()

    def known_file(self, run: int) -> Path:
        """Which items of a run had an ID before it was claimed."""
        return self.directory / "claims" / f"{run:06}.known"

    def claim_file(self, run: int) -> Path:
        """What the items of a run hold."""
        return self.directory / "claims" / f"{run:06}.arrow"

    def rejected_file(self, number: int) -> Path:
        """The rejected rows of a block."""
        return self.directory / "rejected" / f"{number:06}.jsonl"

    def part(self, number: int) -> Path:
        """The IDs of a block."""
        return self.out / f"part-{number:06}.parquet"

    @property
    def record(self) -> str | None:
        """Which record the claims are of."""
        path = self.directory / "record"
        return path.read_text(encoding="utf-8") if path.exists() else None

    def claims_are_of(self, record: str) -> bool:
        """Notes which record is claimed from; False where it was another until now: then nothing is claimed yet."""
        before = self.record or record
        if before != record:
            for leftover in (self.directory / "claims", self.directory / "rejected"):
                _remove(leftover)
                leftover.mkdir()
            self._remove_table()
        write_whole(self.directory / "record", record)
        return before == record

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Writes what was done beside the table; then the journal is gone.

        Its head goes first: of a journal that is half gone nothing can be gone on with.
        """
        write_whole(self.out / SUMMARY, json.dumps({**summary, "plan": self.plan}, indent=2) + "\n")
        self._head.unlink()
        sync(self.directory)
        shutil.rmtree(self.directory)

    def _remove_table(self) -> None:
        for path in (*self.out.glob("part-*.parquet"), *(self.out / name for name in (SUMMARY, REJECTED, COLLISIONS))):
            path.unlink(missing_ok=True)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _difference(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """What differs, in words."""
    names = sorted(name for name in {*theirs, *ours} if theirs.get(name) != ours.get(name))
    return ", ".join(
        "other files" if name == "files" else f"{name} {theirs.get(name)}, now {ours.get(name)}" for name in names
    )

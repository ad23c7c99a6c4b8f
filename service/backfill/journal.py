"""What a backfill has done so far, in a directory of its own beside its table or elsewhere.

    .backfill/plan.json             what it is of
                  lock              held while it runs
                  codes/PLAN/N.arrow  the codes of block N; a worker that a kill left behind writes to no other plan's
                             N.known  what the record knew of its items before
                  cuts.npy          where the sorted blocks are cut into runs
                  record            which record the claims are of
                  claims/N.known    which items of run N had an ID before
                         N.arrow    what the items of run N hold
                  rejected/N.jsonl  the rejected rows of block N

Each file appears when it is whole and synced, so whatever ends a backfill leaves the files before; the next one of the
same files goes on behind them. The table is a function of these files, so it does not show how often it was ended.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Self

from models.whole_files import sync, write_whole
from service.backfill.code_files import path_of
from service.backfill.destination import Destination, require_directory
from service.backfill.plan import Block

DIRECTORY = ".backfill"
SUMMARY = "backfill.json"
REJECTED = "rejected.jsonl"
COLLISIONS = "collisions.json"


def part_name(number: int) -> str:
    """The file with the IDs of a block."""
    return f"part-{number:06}.parquet"


class BackfillUnderWay(ValueError):
    """Another process is at work on the same backfill."""


class Journal:
    """The state of one backfill; used as a context.

    Args:
        place: Where its directory goes; it is made.
        out: Where the table goes.
        identity: What the backfill is of.
        force: Whether what is there of anything else gives way.

    Attributes:
        plan: Names this identity.

    Raises:
        BackfillUnderWay: On entering.
        ValueError: On entering: there is something else, or a file where a directory is needed.
    """

    def __init__(self, place: Path, out: Destination, identity: Mapping[str, Any], *, force: bool = False) -> None:
        self.out = out
        self.directory = place / DIRECTORY
        self.cuts = self.directory / "cuts.npy"
        text = json.dumps(identity, sort_keys=True)
        self.plan = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.codes = self.directory / "codes" / self.plan
        self._head = self.directory / "plan.json"
        self._identity = json.loads(text)
        self._force = force

    def __enter__(self) -> Self:
        require_directory(self.directory)
        if not self._head.exists() and not self._force and (names := self.out.names() - {DIRECTORY}):
            why = (
                "its table is another backfill's, or not whole"
                if SUMMARY in names
                else "no backfill is under way there"
            )
            raise ValueError(f"{self.out} is not empty, and {why}; with --force it is written over")
        self.directory.mkdir(parents=True, exist_ok=True)
        self._lock = (self.directory / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise BackfillUnderWay(f"another backfill is at work in {self.directory}") from error
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
                dry = self.record is None and COLLISIONS in self.out.names()
                held = "the codes of a dry run" if dry else "an unfinished backfill"
                raise ValueError(
                    f"{self.directory.parent} holds {held} of something else "
                    f"({_difference(theirs, self._identity)}); with --force that gives way"
                )
            for name in ("codes", "claims", "rejected", "record", "cuts.npy"):
                _remove(self.directory / name)
            self._remove_table()
            write_whole(self._head, json.dumps(self._identity))
        for directory in (self.codes, self.directory / "claims", self.directory / "rejected"):
            directory.mkdir(parents=True, exist_ok=True)

    def finished(self, blocks: int) -> Mapping[str, Any] | None:
        """The summary of this very backfill, where it is done and its table of so many parts is there."""
        summary = None if self._head.exists() else self.out.read(SUMMARY)
        if summary is None:
            return None
        found: Mapping[str, Any] = json.loads(summary)
        if found.get("plan") != self.plan or not {part_name(number) for number in range(blocks)} <= self.out.names():
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
        self.write_report(SUMMARY, {**summary, "plan": self.plan})
        self._head.unlink()
        sync(self.directory)
        shutil.rmtree(self.directory)

    def write_report(self, name: str, report: Mapping[str, Any]) -> None:
        """Writes JSON beside the table."""
        self.out.write(name, (json.dumps(report, indent=2) + "\n").encode())

    def _remove_table(self) -> None:
        for name in self.out.names():
            if name in {SUMMARY, REJECTED, COLLISIONS} or fnmatch(name, "part-*.parquet"):
                self.out.remove(name)


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

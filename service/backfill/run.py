r"""A backfill from its files to its table; what is done already is not done again.

plan --engine--> codes of each block --cuts--> runs --> claims --> parts of the table
                                                   \--> a dry run counts collisions
"""

from __future__ import annotations

import asyncio
import io
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models import Manifest, read_manifest
from models.whole_files import write_whole
from service.backfill.claims import claim_run
from service.backfill.code_files import unpacked
from service.backfill.collisions import Collisions
from service.backfill.destination import Destination
from service.backfill.encoding import EncodingTask
from service.backfill.engines import Engine
from service.backfill.journal import COLLISIONS, Journal, part_name
from service.backfill.known import ROWS_TOGETHER, known_path, recall
from service.backfill.output import Counts, Table, finish
from service.backfill.plan import INPUT_ORDER, Kind, Plan
from service.backfill.rows import RowReader
from service.backfill.sorting import Slices, cut, run_of, run_rows, runs_of
from service.backup.commands import opened_record
from service.overflow import OverflowPolicy
from service.registry import Record
from service.semantic_id import CodeLayout
from service.settings import Settings

logger = logging.getLogger(__name__)

ITEMS_PER_BUCKET = 50  # docs/scale.md has the memory of others

Stage = Callable[[str, int, int], AbstractContextManager[Callable[[int], object]]]
"""Name, rows in all, rows done already -> what is told of more rows."""


class Request(NamedTuple):
    """What is asked for.

    Attributes:
        plan: The files.
        out: Where the table goes.
        journal: Where the state of the backfill goes: a directory, which workers on other machines see too.
        namespace: The catalogue's.
        engine: Who maps blocks.
        workers: See `Engine.map_blocks`.
        force: Whether anything else that is there gives way.
    """

    plan: Plan
    out: Destination
    journal: Path
    namespace: str = "default"
    engine: Engine = Engine.LOCAL
    workers: int | None = None
    force: bool = False


class Backfill:
    """One run of a backfill.

    Args:
        settings: The tokenizer, the device, and which registry.
        request: What is asked for.
        stage: Shows progress.

    Raises:
        CheckpointError: There is no checkpoint where the settings say.
        ValueError: The tokenizer does not take what the files hold.
    """

    def __init__(self, settings: Settings, request: Request, stage: Stage) -> None:
        self._settings = settings
        self._request = request
        self._plan = request.plan
        self._stage = stage
        self._manifest: Manifest = read_manifest(settings.checkpoint)
        self._layout = CodeLayout(self._manifest.codebook_sizes)
        if self._plan.kind is Kind.TEXTS and self._manifest.text_encoder is None:
            raise ValueError(f"the tokenizer {self._manifest.full_name} takes embeddings only; these files hold texts")

    def run(self) -> Counts:
        """Gives every item its ID, and writes the table.

        Raises:
            SemidError: The registry cannot be reached or refuses, or a worker failed: the same run goes on from there.
            ValueError: A file cannot be read, or something else is where the table goes.
        """
        self._check_promises()
        with self._journal() as journal:
            asyncio.run(self._recall(journal))  # if there is no registry, hours of encoding are not for nothing
            cuts = self._sorted(journal)
            asyncio.run(self._claim(journal, cuts))
            self._write(journal, cuts)
            counts = finish(journal, self._plan.blocks, runs_of(cuts))
            journal.finish(
                {
                    "tokenizer": self._manifest.full_name,
                    "namespace": self._request.namespace,
                    "order_by": self._plan.columns.order_by,
                    "files": [file.path for file in self._plan.files],
                    "record": journal.record,
                    **counts._asdict(),
                }
            )
        return counts

    def finished(self) -> Counts | None:
        """What this very backfill counted, where it is done already: its table is there, and its record the same.

        Raises:
            SemidError: The registry cannot be reached or refuses.
        """
        summary = None if self._request.force else self._journal().finished(len(self._plan.blocks))
        if summary is None or summary.get("record") != asyncio.run(self._record_name()):
            return None
        return Counts(*(summary[name] for name in Counts._fields))

    def count_collisions(self) -> dict[str, Any]:
        """Encodes, and counts the collisions of these files among themselves; writes nothing to a registry.

        The codes stay, for a run of the same files.

        Raises:
            SemidError: A worker failed.
            ValueError: As in `run`.
        """
        with self._journal() as journal:
            cuts = self._sorted(journal)
            collisions = Collisions(len(self._manifest.codebook_sizes))
            paths = self._code_files(journal)
            for number in runs_of(cuts):
                collisions.add(unpacked(run_of(paths, cuts, number).rows["codes"], self._layout))
            rejected = self._plan.rows - int(cuts[-1].sum())
            report = {"tokenizer": self._manifest.full_name, "rejected": rejected, **collisions.report()}
            journal.write_report(COLLISIONS, report)
        return report

    def _journal(self) -> Journal:
        identity = {
            **self._plan.identity(),
            "tokenizer": self._manifest.full_name,
            "namespace": self._request.namespace,
        }
        return Journal(self._request.journal, self._request.out, identity, force=self._request.force)

    def _check_promises(self) -> None:
        """Raises ValueError where IDs would not be issued as is asked for, or as the service does."""
        if self._plan.columns.order_by != INPUT_ORDER and "+cluster://" in (self._settings.redis_url or ""):
            raise ValueError("on a cluster suffixes are issued in no order: leave --order-by out")
        if self._plan.columns.display is not None and not self._settings.display_bytes:
            raise ValueError("no titles are kept: set SID_DISPLAY_BYTES, or leave --display out")
        overflow = OverflowPolicy(self._settings.overflow).candidates(self._request.namespace)
        if overflow and self._manifest.max_suffix is not None:
            raise ValueError(
                f"SID_OVERFLOW places items of the namespace {self._request.namespace} beside codes that are full; a "
                "backfill does not: set it to error, and tokenize what is rejected through the service"
            )

    async def _record_name(self) -> str:
        async with opened_record(self._settings, self._manifest, self._request.namespace) as record:
            return _name_of(record)

    async def _recall(self, journal: Journal) -> None:
        """Asks what the record knows of the items that are to be encoded."""
        patience_s = self._settings.registry_wait_s
        missing = [block for block in self._plan.blocks if not journal.encoded(block)]
        rows = sum(block.rows for block in missing)
        async with opened_record(self._settings, self._manifest, self._request.namespace) as record:
            if not rows or not await record.count() or self._manifest.max_suffix is not None:
                return  # under a finite suffix vocabulary an item may hold codes beside its own
            with closing(RowReader(["item_id"], ROWS_TOGETHER)) as reader, self._stage("known", rows, 0) as done:
                for block in missing:
                    await recall(record, reader, block, known_path(journal.codes, block.number), patience_s)
                    done(block.rows)

    def _sorted(self, journal: Journal) -> NDArray[np.int64]:
        """Encodes what is missing, and cuts all blocks into runs."""
        self._encode(journal)
        if not journal.cuts.exists():
            file = io.BytesIO()
            np.save(file, cut(self._code_files(journal), run_rows(self._plan.rows)), allow_pickle=False)
            write_whole(journal.cuts, file.getvalue())
        cuts: NDArray[np.int64] = np.load(journal.cuts, allow_pickle=False)
        return cuts

    def _code_files(self, journal: Journal) -> list[Path]:
        return [journal.code_file(block.number) for block in self._plan.blocks]

    def _encode(self, journal: Journal) -> None:
        plan, request, settings = self._plan, self._request, self._settings
        missing = [block for block in plan.blocks if not journal.encoded(block)]
        if not missing:
            return
        task = EncodingTask(
            settings={
                "checkpoint": str(settings.checkpoint.absolute()),
                "device": settings.device,
                "text_encoder": settings.text_encoder,
                "text_precision": settings.text_precision,
                "threads": settings.threads,
                "batch_tokens": settings.batch_tokens,
                "max_text_bytes": settings.max_text_bytes,
            },
            kind=plan.kind,
            columns=plan.columns,
            directory=journal.codes.absolute(),
        )
        with self._stage("codes", plan.rows, plan.rows - sum(block.rows for block in missing)) as done:
            for block in request.engine.map_blocks(task, missing, request.workers):
                done(block.rows)

    async def _claim(self, journal: Journal, cuts: NDArray[np.int64]) -> None:
        rows = int(cuts[-1].sum())
        buckets = min(max(self._settings.buckets, rows // ITEMS_PER_BUCKET), 2**32)
        settings = self._settings.model_copy(update={"buckets": buckets})
        async with opened_record(settings, self._manifest, self._request.namespace, create=True, marked=True) as record:
            if not journal.claims_are_of(_name_of(record)):
                logger.warning("The registry has another record than this backfill began with: all is claimed again")
            runs = [run for run in runs_of(cuts) if not journal.claim_file(run).exists()]
            missing = int(sum((cuts[run + 1] - cuts[run]).sum() for run in runs))
            paths = self._code_files(journal)
            with self._stage("claims", rows, rows - missing) as done:
                for number in runs:
                    run = await asyncio.to_thread(run_of, paths, cuts, number)
                    await claim_run(record, journal, number, run, settings.registry_wait_s)
                    done(len(run.rows))

    def _write(self, journal: Journal, cuts: NDArray[np.int64]) -> None:
        origin = {"tokenizer": self._manifest.full_name, "namespace": self._request.namespace}
        table = Table(journal, Slices(cuts), self._layout, origin)
        there = journal.out.names()
        missing = [block for block in self._plan.blocks if part_name(block.number) not in there]
        rows = self._plan.rows
        with self._stage("table", rows, rows - sum(block.rows for block in missing)) as done:
            for block in missing:
                table.write(block)
                done(block.rows)


def _name_of(record: Record) -> str:
    return f"{record.history.name} {record.history.epoch.decode()}"

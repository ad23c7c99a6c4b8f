"""Tokenizers loaded, made the default and unloaded while requests are answered.

call --edit--> plan, a file --followed by every process--> checkpoints loaded --> the set that new requests are given
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from models import CheckpointError, Manifest, read_manifest
from service.admin.directories import Directories
from service.admin.plan import Plan, PlanFile, Planned
from service.admin.reports import Report, Reports
from service.errors import (
    CheckpointRefused,
    EncoderStopped,
    LoadingUnderWay,
    NotLoadedEverywhere,
    SemidError,
    TakesOtherContent,
)
from service.loading import Loader
from service.records import Records
from service.tokenizers import LoadedTokenizer, Tokenizers, TokenizerSet

log = logging.getLogger(__name__)

LOOKED_AGAIN_AFTER_S = 0.25
TRIED_AGAIN_AFTER_S = 30.0
ASKED_AGAIN_AFTER_S = 0.05
WAIT_S = 120.0  # for other processes, each of which loads what this one has loaded


class Swapped(NamedTuple):
    """What a call has changed.

    Attributes:
        manifest: Of the tokenizer that it was about.
        plan: What is to be loaded from now on.
        workers: Processes that serve.
        pending: How many of them have not followed yet.
    """

    manifest: Manifest
    plan: Plan
    workers: int
    pending: int

    def as_answer(self) -> dict[str, Any]:
        """As it is answered."""
        return {
            "tokenizer": self.manifest.full_name,
            "default": self.plan.default.tokenizer,
            "loaded": [planned.tokenizer for planned in self.plan.tokenizers],
            "workers": self.workers,
            "pending": self.pending,
            "manifest": asdict(self.manifest),
        }


class Sources(NamedTuple):
    """Where tokenizers come from.

    Attributes:
        loader: Checkpoints -> tokenizers at work.
        records: Their records.
        directories: Which checkpoints may be loaded.
        of_settings: Directories of those that the settings name, which may lie anywhere, by full name.
    """

    loader: Loader
    records: Records
    directories: Directories
    of_settings: Mapping[str, Path]


class HotSwap:
    """Keeps what this process has loaded as the plan says, and changes the plan.

    Use `begin`.

    Attributes:
        tokenizers: What is loaded.
    """

    def __init__(
        self, tokenizers: Tokenizers, sources: Sources, plans: PlanFile, reports: Reports, at_most: int
    ) -> None:
        self.tokenizers = tokenizers
        self._sources = sources
        self._plans = plans
        self._reports = reports
        self._at_most = at_most
        self._ready: dict[str, LoadedTokenizer] = {}  # loaded for a call, and not yet in the set
        self._failures: dict[str, str] = {}
        self._loading = asyncio.Lock()
        self._changed = asyncio.Event()
        self._following: asyncio.Task[None] | None = None

    @classmethod
    async def begin(cls, sources: Sources, plans: PlanFile, reports: Reports, at_most: int) -> HotSwap:
        """Load what the plan says, and follow it from then on.

        Args:
            sources: Where tokenizers come from.
            plans: The plan.
            reports: Where this process says how far it has followed.
            at_most: So many tokenizers may be loaded side by side; those of the settings count, and are always.

        Raises:
            CheckpointError: One is not what was frozen, or no longer where it was.
            SemidError: The registry refuses its record or cannot be reached.
        """
        plan = plans.look()
        loaded: list[LoadedTokenizer] = []
        try:
            for planned in plan.tokenizers:
                loaded.append(await _load(sources, planned))
        except BaseException as error:
            for tokenizer in loaded:
                await tokenizer.batcher.stop()
            if isinstance(error, SemidError | CheckpointError) and planned.tokenizer not in plan.settings:
                raise CheckpointError(
                    f"{planned.tokenizer} was loaded by a call and cannot be loaded again: {error}. Put it right, or "
                    f"move {plans.path} away for the tokenizers of the settings"
                ) from error
            raise
        swap = cls(Tokenizers(TokenizerSet(tuple(loaded))), sources, plans, reports, at_most)
        swap._say(plan)  # before the last look at the plan: whoever changes it afterwards waits for this process too
        if plans.look().revision != plan.revision:
            await swap._follow_to(plans.look())
        swap._following = asyncio.create_task(swap._follow())
        return swap

    @property
    def settings(self) -> tuple[str, ...]:
        """The full names of the tokenizers that the settings name."""
        return tuple(self._sources.of_settings)

    @property
    def default_since(self) -> datetime | None:
        """When a call made the default tokenizer that; None where it is by the settings."""
        return self._plans.look().default_since

    async def load(self, checkpoint: str, *, default: bool, force: bool) -> Swapped:
        """Load a checkpoint beside the others; returns when it is warm in every process of the service.

        Args:
            checkpoint: Its directory; see `Directories.find`.
            default: Make it the default then.
            force: Even where some callers' requests would be refused from then on.

        Raises:
            CheckpointRefused: It lies elsewhere, or is not what was frozen.
            ServiceError: It cannot be loaded beside the others, for one of many reasons. Nothing has changed.
        """
        if self._loading.locked():
            raise LoadingUnderWay("one is loaded at a time: try again when it is there")
        async with self._loading:
            planned, manifest = await asyncio.to_thread(self._find, checkpoint)
            another = partial(Plan.with_another, planned=planned, at_most=self._at_most, force=force)
            another(self._plans.look())  # refused now, not after seconds
            if default:
                self._require_same_content(manifest, force=force)
            await self._load_for_call(planned)
        try:
            plan = await self._change(another)
            done = await self._settled(manifest, plan, undo=lambda found: found.without(planned.tokenizer))
        finally:
            left_over = self._ready.pop(planned.tokenizer, None)  # the plan did not take it, or not for long
            if left_over is not None:
                await left_over.batcher.stop()
        log.info("%s is loaded from %s", planned.tokenizer, planned.directory)
        if default and not done.pending:
            return await self.make_default(planned.tokenizer, force=force)
        return done

    async def make_default(self, name: str, *, force: bool) -> Swapped:
        """Let one answer where none is named, from the next request on; those under way end as they began.

        Args:
            name: `name@fingerprint`, or a `name` that only one has.
            force: Even where it takes other content than the default one.

        Raises:
            UnknownTokenizer, AmbiguousTokenizer: See `Plan.named`.
            TakesOtherContent: It cannot take what callers send now, and nobody insists.
            NotLoadedEverywhere: A process could not follow.
        """
        before = self._plans.look()
        chosen = before.named(name).tokenizer
        manifest = self.tokenizers.named(chosen).manifest
        self._require_same_content(manifest, force=force)
        now = datetime.now(UTC)
        plan = await self._change(lambda found: found.with_default(chosen, now))
        was = before.default.tokenizer, before.default_since
        done = await self._settled(manifest, plan, undo=lambda found: found.with_default(*was))
        log.info("%s is the default tokenizer, after %s", chosen, before.default.tokenizer)
        return done

    async def unload(self, name: str) -> Swapped:
        """Let one go: no new request is given it; those under way end with it, and then its model's memory is free.

        Args:
            name: `name@fingerprint`, or a `name` that only one has.

        Raises:
            UnknownTokenizer, AmbiguousTokenizer: See `Plan.named`.
            TokenizerIsDefault: It is the default.
        """
        chosen = self._plans.look().named(name).tokenizer
        manifest = self.tokenizers.named(chosen).manifest
        plan = await self._change(lambda found: found.without(chosen))
        done = await self._settled(manifest, plan)
        log.info("%s is unloaded; what it assigned stays in the registry", chosen)
        return done

    async def close(self) -> None:
        """Follow no longer, and stop the models."""
        if self._following is not None:
            self._following.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._following
        self._reports.close()
        for tokenizer in self._ready.values():
            await tokenizer.batcher.stop()
        await self.tokenizers.close()

    def _find(self, checkpoint: str) -> tuple[Planned, Manifest]:
        directory = self._sources.directories.find(checkpoint)
        try:
            manifest = read_manifest(directory)
            return Planned(tokenizer=manifest.full_name, directory=directory), manifest
        except (CheckpointError, ValueError) as error:
            raise CheckpointRefused(str(error)) from error

    async def _load_for_call(self, planned: Planned) -> None:
        """Raise CheckpointRefused, or what the registry says of its record, unless it can be loaded and is warm."""
        try:
            self._ready[planned.tokenizer] = await _load(self._sources, planned)
        except (CheckpointError, ValueError) as error:
            raise CheckpointRefused(str(error)) from error
        except (EncoderStopped, RuntimeError, MemoryError) as error:  # torch has no other for a device without room
            log.exception("%s cannot be loaded", planned.tokenizer)
            raise CheckpointRefused(f"it cannot be loaded here, as the log says: {type(error).__name__}") from error

    def _require_same_content(self, manifest: Manifest, *, force: bool) -> None:
        """Raise TakesOtherContent unless a tokenizer takes whatever the default one takes."""
        now = self.tokenizers.current.default.manifest
        wants = [f"embeddings of {now.widths[0]} numbers"] if manifest.widths[0] != now.widths[0] else []
        if manifest.text_encoder is None and now.text_encoder is not None:
            wants.append("texts")
        if wants and not force:
            raise TakesOtherContent(
                f"callers who name no tokenizer may send {' and '.join(wants)}, which {manifest.full_name} does not "
                'take; with "force": true it becomes the default all the same'
            )

    async def _change(self, edit: Callable[[Plan], Plan]) -> Plan:
        plan = await asyncio.to_thread(self._plans.change, edit)
        self._changed.set()
        return plan

    async def _settled(self, manifest: Manifest, plan: Plan, undo: Callable[[Plan], Plan] | None = None) -> Swapped:
        """Returns when every process has followed, or has not for long enough.

        Raises:
            NotLoadedEverywhere: One cannot; it was undone.
        """
        deadline = time.monotonic() + WAIT_S
        while True:
            said = await asyncio.to_thread(self._reports.living)
            reports = [report for report in said if report is not None and report.settings == plan.settings]
            behind = said.count(None) + sum(report.revision < plan.revision for report in reports)
            for report in reports:
                if undo is not None and report.revision >= plan.revision and manifest.full_name in report.failures:
                    await self._change(undo)
                    raise NotLoadedEverywhere(report.failures[manifest.full_name])
            if not behind or time.monotonic() > deadline:
                return Swapped(manifest, plan, len(reports) + said.count(None), behind)
            await asyncio.sleep(ASKED_AGAIN_AFTER_S)

    async def _follow(self) -> None:
        """The plan's follower: at once where this process changed it, soon where another did."""
        reached, reached_at = self._plans.look().revision, time.monotonic()
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), LOOKED_AGAIN_AFTER_S)
            self._changed.clear()
            try:
                plan = self._plans.look()
                due = self._failures and time.monotonic() - reached_at > TRIED_AGAIN_AFTER_S
                if plan.revision != reached or due:
                    await self._follow_to(plan)
                    reached, reached_at = plan.revision, time.monotonic()
            except Exception:
                log.exception("the plan of the tokenizers cannot be followed just now")

    async def _follow_to(self, plan: Plan) -> None:
        """Load what is missing, let go what is too much, and say so."""
        at_work = {tokenizer.full_name: tokenizer for tokenizer in self.tokenizers.current.loaded}
        self._failures = {}
        for planned in plan.tokenizers:
            name = planned.tokenizer
            if name in at_work:
                continue
            try:
                at_work[name] = self._ready.pop(name) if name in self._ready else await self._load_alone(planned)
            except Exception as error:  # whatever it is, the others serve on
                log.exception("%s cannot be loaded", name)
                self._failures[name] = str(error) if isinstance(error, SemidError | CheckpointError) else repr(error)
        wanted = [at_work[planned.tokenizer] for planned in plan.tokenizers if planned.tokenizer in at_work]
        if plan.default.tokenizer in self._failures:
            before = self.tokenizers.current.default
            wanted = [before, *(tokenizer for tokenizer in wanted if tokenizer is not before)]
        self.tokenizers.replace(TokenizerSet(tuple(wanted)))
        self._say(plan)

    async def _load_alone(self, planned: Planned) -> LoadedTokenizer:
        async with self._loading:
            return await _load(self._sources, planned)

    def _say(self, plan: Plan) -> None:
        self._reports.say(Report(settings=plan.settings, revision=plan.revision, failures=self._failures))


async def _load(sources: Sources, planned: Planned) -> LoadedTokenizer:
    """A planned tokenizer at work, whose record can be read.

    Raises:
        CheckpointError: It is not what was frozen, or its directory holds another by now.
        SemidError: Its directory is none to load from, or the registry refuses its record.
    """
    directory = sources.of_settings.get(planned.tokenizer)
    if directory is None:
        directory = await asyncio.to_thread(sources.directories.find, str(planned.directory))
    manifest = await asyncio.to_thread(read_manifest, directory)
    if manifest.full_name != planned.tokenizer:
        raise CheckpointError(f"{directory} holds {manifest.full_name} now, no longer {planned.tokenizer}")
    await sources.records.of("default", manifest)
    return await sources.loader.load(directory, manifest)

r"""The use case by arrays: what most items of a bulk need.

    columns --registry--> unchanged items: answered
                      \--> new items --batcher--> codes --registry--> answered
                      \--> all others, a few: as items of a JSON body are (`tokenization`)

The others are those whose content changed, that were retired, that stand twice, whose codes are full. Of a feed of new
embeddings none is asked for first: the claim finds out which are known, and only these are. A dry run encodes all that
are not answered, and asks how many items have their codes.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from service.bulk.columns import ROWS_ON_THE_LOOP, TEXTS_AT_ONCE, AnswerColumns, EmbeddingColumn, ItemColumns, Places
from service.bulk.row_thread import RowThread
from service.bulk.terms import pause
from service.errors import Overloaded
from service.metrics import Metrics
from service.novelty import Novelty
from service.records import Records
from service.registry import Record
from service.registry.assignment_columns import Held
from service.schemas import TokenizeOptions
from service.semantic_id import SemanticId
from service.tokenization import Tokenization
from service.tokenizers import LoadedTokenizer


@dataclass(frozen=True)
class _Work:
    """Items on their way to their answers; `done` are those that have theirs."""

    tokenizer: LoadedTokenizer
    options: TokenizeOptions
    columns: ItemColumns
    patient: bool
    answers: AnswerColumns
    done: NDArray[np.bool_]

    @classmethod
    def begin(
        cls, tokenizer: LoadedTokenizer, options: TokenizeOptions, columns: ItemColumns, *, patient: bool
    ) -> _Work:
        answers = AnswerColumns.empty(len(columns), len(tokenizer.manifest.codebook_sizes))
        answers.failures.update(columns.failures)
        done = np.zeros(len(columns), np.bool_)
        done[list(columns.failures)] = True
        return cls(tokenizer, options, columns, patient, answers, done)

    def item_ids(self, places: Places) -> list[bytes]:
        return [self.columns.item_ids[i] for i in places.tolist()]


class ColumnTokenization:
    """`Tokenization` of columns: what most items of a bulk need by arrays, the rest by it."""

    def __init__(self, tokenization: Tokenization, records: Records, metrics: Metrics, thread: RowThread) -> None:
        self._tokenization = tokenization
        self._records = records
        self._metrics = metrics
        self._thread = thread
        self._novelty = Novelty()

    async def knows(self, tokenizer: LoadedTokenizer, options: TokenizeOptions) -> bool:
        """Whether what comes is likely to be known: nearly all that came lately was."""
        if not options.assign:
            return False
        return self._novelty.unlikely(await self._records.of(options.namespace, tokenizer.manifest))

    async def answer(
        self, tokenizer: LoadedTokenizer, options: TokenizeOptions, columns: ItemColumns, *, patient: bool = False
    ) -> AnswerColumns:
        """The answer to each item.

        Args:
            tokenizer: Which.
            options: Of the request.
            columns: The items.
            patient: Where the queue has no room, wait for some: of a stream, whose caller can be kept from sending.

        Raises:
            ServiceError: They all fail.
        """
        work = _Work.begin(tokenizer, options, columns, patient=patient)
        self._count(work, "failed", len(columns.failures))
        once = columns.once()
        places = np.flatnonzero(once)
        record = await self._records.of(options.namespace, tokenizer.manifest)
        if options.assign:
            await self._digests(work.columns)
            await self._settle(work, record, places)
        else:
            await self._preview(work, record, places)
        if not work.done.all():
            await self._digests(work.columns)
            # Those that stand twice have to be seen together.
            for part in (np.flatnonzero(~work.done & ~once), *_portions(np.flatnonzero(~work.done & once))):
                await _patiently(work, partial(self._answer_others, work, part))
        if options.assign and columns.displays:
            await self._keep_displays(work)
        return work.answers

    async def _answer_others(self, work: _Work, places: Places) -> None:
        """Answers items as those of a JSON body are."""
        if not len(places):
            return
        found, failures = await self._tokenization.items(work.tokenizer, work.options, work.columns.items(places))
        work.answers.failures.update(failures)
        for place, answer in found.items():
            work.answers.put(place, answer)

    async def _keep_displays(self, work: _Work) -> None:
        """Keeps the titles of those that did not fail."""
        failures = work.answers.failures
        given = {place: display for place, display in work.columns.displays.items() if place not in failures}
        lost = [place for place in work.columns.displays if place in failures]
        record = await self._records.of(work.options.namespace, work.tokenizer.manifest)
        with self._metrics.registry_call("display"):
            await record.displays.put(work.columns.named(given))
            await record.displays.retire([work.columns.item_ids[place] for place in lost])

    async def _settle(self, work: _Work, record: Record, places: Places) -> None:
        """Answers those that are known and unchanged, and those that are new."""
        if not len(places):
            return
        if self._are_new(record, work.columns):
            await self._assign(work, places)
            self._novelty.saw(record, work.answers.created[places].mean())
            await self._recall(work, record, places[~work.done[places]])
            return
        new = await self._recall(work, record, places)
        if isinstance(work.columns.contents, EmbeddingColumn):
            self._novelty.saw(record, len(new) / len(places))
            await self._assign(work, new)
            return
        share = 1 - work.done[places].mean()
        for part in _portions(new):
            await _patiently(work, partial(self._assign, work, part))
        self._novelty.saw(record, share)

    def _are_new(self, record: Record, columns: ItemColumns) -> bool:
        """Whether nearly all are likely to be: to encode an embedding in vain costs no more than to ask for it."""
        embeddings = isinstance(columns.contents, EmbeddingColumn)
        return embeddings and record.claims_at_once and self._novelty.expected(record)

    async def _recall(self, work: _Work, record: Record, places: Places) -> Places:
        """Answers those that are known and unchanged; returns those that are new."""
        if not len(places):
            return places
        held = await self._held(work, record, places)
        stands = held.live & (held.digests == work.columns.digests[places])
        if work.options.on_change == "reassign":
            stands &= ~held.content_changed
        known, answers = places[stands], work.answers
        answers.codes[known] = held.codes[stands]
        answers.suffixes[known] = held.suffixes[stands]
        answers.content_changed[known] = held.content_changed[stands]
        answers.quantization_errors[known] = answers.margins[known] = np.nan
        work.done[known] = True
        self._count(work, "known", len(known))
        return places[~held.known]

    async def _assign(self, work: _Work, places: Places) -> None:
        """Answers those that get the next suffix of their codes."""
        answers = work.answers
        places, codes = await self._encode(work, places)
        if not len(places):
            return
        answers.codes[places] = codes
        record = await self._records.of(work.options.namespace, work.tokenizer.manifest, create=True)
        if shown := work.columns.displays:
            announced = {place: shown[place] for place in places.tolist() if place in shown}
            await record.displays.announce(work.columns.named(announced))
        with self._metrics.registry_call("claim"):
            suffixes = await record.claim_columns(
                work.item_ids(places), work.columns.digests[places], answers.codes[places]
            )
        answers.suffixes[places] = suffixes
        created = places[suffixes >= 0]
        answers.created[created] = True
        work.done[created] = True
        self._count(work, "created", len(created))
        self._metrics.collisions.labels(work.tokenizer.full_name).inc(int((suffixes > 0).sum()))

    async def _preview(self, work: _Work, record: Record, places: Places) -> None:
        """Answers what items would get, and what they hold."""
        held = await self._held(work, record, places)
        answers = work.answers
        holders = places[held.live]
        answers.codes[holders] = held.codes[held.live]
        answers.suffixes[holders] = held.suffixes[held.live]
        answers.content_changed[holders] = held.content_changed[held.live]
        stands = held.live & ~held.content_changed
        if stands.any():
            stands &= held.digests == (await self._digests(work.columns))[places]
        encoded, codes = await self._encode(work, places[~stands])
        changed = (answers.suffixes[encoded] >= 0) & (answers.codes[encoded] != codes).any(axis=1)
        answers.content_changed[encoded] = changed
        answers.semantic_ids.update(zip(encoded[changed].tolist(), _written(answers, encoded[changed]), strict=True))
        answers.codes[encoded] = codes
        done = np.union1d(places[stands], encoded)
        with self._metrics.registry_call("find"):
            answers.group_sizes[done] = await record.group_size_columns(answers.codes[done])
        work.done[done] = True
        self._count(work, "known", int(stands.sum()))
        self._count(work, "dry_run", len(encoded))

    async def _digests(self, columns: ItemColumns) -> NDArray[np.uint64]:
        """Those of all items, computed off the loop unless they are few."""
        if len(columns) >= ROWS_ON_THE_LOOP and not columns.has_digests:
            await self._thread.run(lambda: columns.digests)
        return columns.digests

    async def _held(self, work: _Work, record: Record, places: Places) -> Held:
        """What these items hold."""
        with self._metrics.registry_call("recall"):
            return await record.held(work.item_ids(places))

    async def _encode(self, work: _Work, places: Places) -> tuple[Places, NDArray[np.int64]]:
        """Those that the model could encode, and their codes; their measures are part of the answers."""
        if not len(places):
            return places, np.zeros((0, work.answers.codes.shape[1]), np.int64)
        encoded = await work.tokenizer.batcher.encode_columns(work.columns.contents.at(places))
        could = np.ones(len(places), np.bool_)
        could[list(encoded.failures)] = False
        if not could.any():  # then nobody knows of how many levels the codes would be
            return places[could], np.zeros((0, work.answers.codes.shape[1]), np.int64)
        places = places[could]
        work.answers.margins[places] = encoded.margins[could]
        work.answers.quantization_errors[places] = encoded.quantization_errors[could]
        return places, encoded.codes[could]

    def _count(self, work: _Work, outcome: str, items: int) -> None:
        self._metrics.items.labels(work.tokenizer.full_name, outcome).inc(items)


def _portions(places: Places) -> list[Places]:
    """Of texts, or of what is as dear."""
    return [places[start : start + TEXTS_AT_ONCE] for start in range(0, len(places), TEXTS_AT_ONCE)]


async def _patiently(work: _Work, attempt: Callable[[], Awaitable[None]]) -> None:
    """Attempts a part of the work. Who is patient waits for room: sent again, what has its ID already would be known.

    Raises:
        Overloaded: There is no room, and the caller is to hear of it.
    """
    while True:
        try:
            return await attempt()
        except Overloaded as error:
            if not work.patient:
                raise
            await pause(error)


def _written(answers: AnswerColumns, places: Places) -> list[str]:
    """The Semantic IDs of these codes and suffixes."""
    numbers = np.column_stack([answers.codes[places], answers.suffixes[places]]).tolist()
    return [str(SemanticId(tuple(codes), suffix)) for *codes, suffix in numbers]

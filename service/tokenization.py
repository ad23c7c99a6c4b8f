r"""The use case on one page: read, recall, encode, assign, answer.

entries --ItemReader--> items --registry--> unchanged ones: answered
                              \--batcher--> codes --registry--> assignments: answered

A few embeddings go straight to the batcher, unless others are in their way: the claim finds out which are known. So
does a single text, where those before it were new.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from typing import TypeVar, cast

from service.answers import Answer, assigned, in_order, preview
from service.batching.jobs import EncodedRow
from service.batching.lanes import SMALL_ROWS
from service.content import Item, ItemReader
from service.errors import (
    ConflictingDuplicate,
    EncodingFailed,
    ItemError,
    SuffixExhausted,
    TooManyItems,
)
from service.metrics import Metrics
from service.micro_batches import MicroBatches
from service.novelty import Novelty
from service.overflow import OverflowPolicy
from service.records import Records
from service.registry import Assignment, Claim, ClaimResult, Record
from service.schemas import TokenizeOptions, TokenizeRequest
from service.tokenizers import LoadedTokenizer, Tokenizers

T = TypeVar("T")
R = TypeVar("R")
F = TypeVar("F", bound=ItemError)

TOGETHER = 4  # items of one request, at most, that share a micro-batch with those of others
ENTRIES_ON_THE_LOOP = 16  # a thread costs as much as reading these


class Tokenization:
    """Items in, Semantic IDs out.

    Args:
        tokenizers: Those that are loaded.
        records: Theirs.
        max_items: Of one request.
        overflow: What becomes of items whose codes are full.
        metrics: Where items are counted and calls of the registry timed.
    """

    def __init__(
        self,
        *,
        tokenizers: Tokenizers,
        records: Records,
        max_items: int,
        overflow: OverflowPolicy,
        metrics: Metrics,
    ) -> None:
        self._tokenizers = tokenizers
        self._records = records
        self._max_items = max_items
        self._overflow = overflow
        self._metrics = metrics
        self._together = MicroBatches(self.items)
        self._novelty = Novelty()

    def admitted(self, request: TokenizeRequest) -> LoadedTokenizer:
        """The tokenizer that a request names, to its end.

        Raises:
            TooManyItems: It has more items than one request may.
            UnknownTokenizer, AmbiguousTokenizer: See `Tokenizers.named`.
        """
        if len(request.items) > self._max_items:
            msg = f"{len(request.items)} items, at most {self._max_items} are taken in one request"
            raise TooManyItems(msg)
        return self._tokenizers.named(request.tokenizer)

    async def entries(
        self, tokenizer: LoadedTokenizer, request: TokenizeOptions, entries: Sequence[object]
    ) -> list[Answer]:
        """An entry of the answer for each of a request, or of a part of a stream, in order.

        Raises:
            ServiceError: They all fail.
        """
        if len(entries) < ENTRIES_ON_THE_LOOP:
            items, failures = _read(entries, tokenizer.reader)
        else:
            items, failures = await asyncio.to_thread(_read, entries, tokenizer.reader)
        if failures:
            self._metrics.items.labels(tokenizer.full_name, "failed").inc(len(failures))
        answer = self._together.answer if request.assign and _may_share(items) else self.items
        answers, unplaced = await answer(tokenizer, request, items)
        return in_order(entries, answers, failures | unplaced)

    async def items(
        self, tokenizer: LoadedTokenizer, request: TokenizeOptions, items: Mapping[int, Item]
    ) -> tuple[dict[int, Answer], dict[int, ItemError]]:
        """The answer to each valid item, or its error, by its place.

        Raises:
            ServiceError: They all fail.
        """
        failures: dict[int, ItemError] = {**_conflicting(items)}
        items = _without(items, failures)
        record = await self._records.of(request.namespace, tokenizer.manifest)
        unasked = request.assign and record.claims_at_once and self._encodes_unasked(tokenizer, record, items)
        found = {} if unasked else await self._recall(record, items)
        known = {i: assignment for i, assignment in found.items() if assignment.live}
        # Content that changed is encoded again where its own codes are asked for: to be reassigned, or in a dry run.
        afresh = request.on_change == "reassign" or not request.assign
        encoded, unencodable = await _encode(
            tokenizer,
            {i: item for i, item in items.items() if i not in known or not _stands(item, known[i], afresh=afresh)},
        )
        failures.update(unencodable)
        items = _without(items, unencodable)
        if request.assign:
            claimed, unplaced = await self._place(request, tokenizer, items, encoded)
            failures.update(unplaced)
            if unasked:
                known, encoded = _told(items, encoded, claimed, afresh=afresh)
            if 0 < len(items) <= SMALL_ROWS:
                self._novelty.saw(record, len(encoded) / len(items))
            answers = assigned(_without(items, unplaced), known, encoded, claimed)
            await self._keep_displays(request, tokenizer, items, unplaced)
        else:
            answers = await self._dry_run(record, items, known, encoded)
        self._count(tokenizer.full_name, answers, failures, encoded, dry_run=not request.assign)
        return answers, failures

    def _encodes_unasked(self, tokenizer: LoadedTokenizer, record: Record, items: Mapping[int, Item]) -> bool:
        """Whether these are encoded without a question to the registry which of them are known.

        A few embeddings take less to encode than to ask for; a text is worth it where it is likely to be new.
        """
        has_text = any(isinstance(item.content, str) for item in items.values())
        few = len(items) == 1 and self._novelty.expected(record) if has_text else len(items) <= SMALL_ROWS
        return few and tokenizer.batcher.encodes_soon

    async def _keep_displays(
        self,
        request: TokenizeOptions,
        tokenizer: LoadedTokenizer,
        items: Mapping[int, Item],
        unplaced: Iterable[int],
    ) -> None:
        """Keeps the titles that were given with items, known ones too; none of those that found no place."""
        if given := _displays(items):
            record = await self._records.of(request.namespace, tokenizer.manifest)
            lost = [item_id for item_id in _displays({i: items[i] for i in unplaced}) if given.pop(item_id, None)]
            await self._timed("display", record.displays.put(given))
            await record.displays.retire(lost)

    async def _recall(self, record: Record, items: Mapping[int, Item]) -> dict[int, Assignment]:
        """Assignments of the items that have one; one that was retired has to claim its own again."""
        found = await self._timed("recall", record.by_item_ids([item.item_id for item in items.values()]))
        return {i: assignment for i, assignment in zip(items, found, strict=True) if assignment}

    async def _place(
        self,
        request: TokenizeOptions,
        tokenizer: LoadedTokenizer,
        items: Mapping[int, Item],
        encoded: Mapping[int, EncodedRow],
    ) -> tuple[dict[int, ClaimResult], dict[int, ItemError]]:
        """What was claimed, and what found no place: under its codes, nor, where the namespace wants it, beside them.

        The few items whose codes are full are encoded once more for their alternatives: to rank those of all would
        cost every item what few need.
        """
        claimed, exhausted = await self._claim(request, tokenizer, items, encoded)
        candidates = self._overflow.candidates(request.namespace) if exhausted else 0
        if not candidates:
            return claimed, {**exhausted}
        ranked, unencodable = await _encode(tokenizer, {i: items[i] for i in exhausted}, candidates)
        beside, exhausted = await self._claim(request, tokenizer, items, ranked)
        return claimed | beside, {**unencodable, **exhausted}

    async def _claim(
        self,
        request: TokenizeOptions,
        tokenizer: LoadedTokenizer,
        items: Mapping[int, Item],
        encoded: Mapping[int, EncodedRow],
    ) -> tuple[dict[int, ClaimResult], dict[int, SuffixExhausted]]:
        """What was claimed, and what has no suffix left. Only now a new namespace leaves anything behind."""
        if not encoded:
            return {}, {}
        record = await self._records.of(request.namespace, tokenizer.manifest, create=True)
        reassign = request.on_change == "reassign"
        claims = [_claim_of(items[i], row, reassign=reassign) for i, row in encoded.items()]
        await record.displays.announce(_displays({i: items[i] for i in encoded}))
        return _parted(zip(encoded, await self._timed("claim", record.claim(claims)), strict=True), SuffixExhausted)

    async def _dry_run(
        self,
        record: Record,
        items: Mapping[int, Item],
        known: Mapping[int, Assignment],
        encoded: Mapping[int, EncodedRow],
    ) -> dict[int, Answer]:
        codes = {i: encoded[i].codes if i in encoded else known[i].semantic_id.codes for i in items}
        sizes = await self._timed("find", record.group_sizes(list(codes.values())))
        return {
            i: {**preview(items[i], codes[i], known.get(i), encoded.get(i)), "group_size": size}
            for i, size in zip(items, sizes, strict=True)
        }

    async def _timed(self, call: str, work: Awaitable[T]) -> T:
        with self._metrics.registry_call(call):
            return await work

    def _count(
        self,
        tokenizer: str,
        answers: Mapping[int, Answer],
        failures: Mapping[int, ItemError],
        encoded: Mapping[int, EncodedRow],
        *,
        dry_run: bool,
    ) -> None:
        created = sum([answer["created"] for answer in answers.values()])
        computed = len(answers.keys() & encoded.keys())
        outcomes = {
            "created": created,
            "known": len(answers) - computed,
            "dry_run" if dry_run else "existing": computed - created,
            "failed": len(failures),
        }
        for outcome, count in outcomes.items():
            if count:
                self._metrics.items.labels(tokenizer, outcome).inc(count)
        if created and (
            collisions := sum([bool(answer["created"] and answer["suffix"]) for answer in answers.values()])
        ):
            self._metrics.collisions.labels(tokenizer).inc(collisions)
        if overflows := sum(["overflow" in answer for answer in answers.values()]):
            self._metrics.overflows.labels(tokenizer).inc(overflows)


def _may_share(items: Mapping[int, Item]) -> bool:
    """Whether these few may go one way with those of other requests: embeddings without titles to keep."""
    if not 0 < len(items) <= TOGETHER:
        return False
    for item in items.values():  # noqa: SIM110 - every request asks, and a generator takes three times as long
        if item.display is not None or isinstance(item.content, str):
            return False
    return True


def _told(
    items: Mapping[int, Item],
    encoded: Mapping[int, EncodedRow],
    claimed: Mapping[int, ClaimResult],
    *,
    afresh: bool,
) -> tuple[dict[int, Assignment], dict[int, EncodedRow]]:
    """The known and unchanged ones, as their claims tell of them, and what was encoded of all others."""
    known = {
        i: result.assignment
        for i, result in claimed.items()
        if result.unchanged and _stands(items[i], result.assignment, afresh=afresh)
    }
    return known, {i: row for i, row in encoded.items() if i not in known}


def _stands(item: Item, assignment: Assignment, *, afresh: bool) -> bool:
    """Whether the assignment is the answer without the model; `afresh` where the codes of changed content count."""
    return item.digest == assignment.digest and not (afresh and assignment.content_changed)


def _read(entries: Sequence[object], reader: ItemReader) -> tuple[dict[int, Item], dict[int, ItemError]]:
    """Valid items and failures by their place."""
    items: dict[int, Item] = {}
    failures: dict[int, ItemError] = {}
    for i, entry in enumerate(entries):
        try:
            items[i] = reader.read(entry)
        except ItemError as error:
            failures[i] = error
    return items, failures


def _without(items: Mapping[int, T], left_out: Mapping[int, object]) -> Mapping[int, T]:
    """All of them where none is left out, as is usual."""
    return {i: item for i, item in items.items() if i not in left_out} if left_out else items


def _parted(results: Iterable[tuple[int, T | F]], fault: type[F]) -> tuple[dict[int, T], dict[int, F]]:
    """What there is, and the faults, by their places."""
    found: dict[int, T] = {}
    faults: dict[int, F] = {}
    for i, result in results:
        if isinstance(result, fault):
            faults[i] = result
        else:
            found[i] = cast("T", result)
    return found, faults


def _conflicting(items: Mapping[int, Item]) -> dict[int, ConflictingDuplicate]:
    """An item id with two contents fails at each of its places."""
    if len(items) < 2:
        return {}
    digests: dict[str, set[bytes]] = {}
    for item in items.values():
        digests.setdefault(item.item_id, set()).add(item.digest)
    return {
        i: ConflictingDuplicate(f"{len(digests[item.item_id])} contents are given for it")
        for i, item in items.items()
        if len(digests[item.item_id]) > 1
    }


async def _encode(
    tokenizer: LoadedTokenizer, items: Mapping[int, Item], alternatives: int = 0
) -> tuple[dict[int, EncodedRow], dict[int, EncodingFailed]]:
    """What was encoded, and what the model failed on."""
    contents = [item.content for item in items.values()]
    rows = await tokenizer.batcher.encode(contents, alternatives=alternatives)
    return _parted(zip(items, rows, strict=True), EncodingFailed)


def _claim_of(item: Item, row: EncodedRow, *, reassign: bool) -> Claim:
    """The claim of an encoded item; its own last code, tried first, is no alternative; none counts twice."""
    return Claim(item.item_id, row.codes, item.digest, reassign, tuple(dict.fromkeys(row.alternatives))[1:])


def _displays(items: Mapping[int, Item]) -> dict[bytes, str]:
    """The titles that were given with items; the last of an item that stands twice."""
    return {item.item_id.encode(): item.display for item in items.values() if item.display is not None}

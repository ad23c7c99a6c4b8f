r"""The use case on one page: read, recall, encode, assign, answer.

entries --ItemReader--> items --registry--> unchanged ones: answered
                              \--batcher--> codes --registry--> assignments: answered
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from service.answers import (
    Answer,
    assigned,
    holder,
    in_order,
    looked_up,
    preview,
    require_not_retired,
    unanswered,
    unknown_item,
)
from service.batcher import Batcher, EncodedRow
from service.content import Item, ItemReader
from service.errors import (
    ConflictingDuplicate,
    EncodingFailed,
    ItemError,
    MalformedSemanticId,
    NotAssigned,
    SuffixExhausted,
    TooManyItems,
)
from service.metrics import Metrics
from service.records import Records
from service.registry import Assignment, Claim, ClaimResult, Record
from service.schemas import LookupRequest, TokenizeRequest
from service.semantic_id import SemanticId

T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """Of one request: items to tokenize, Semantic IDs to look up."""

    max_items: int
    max_lookups: int


class Tokenization:
    """Items in, Semantic IDs out; and the way back."""

    def __init__(
        self,
        *,
        records: Records,
        reader: ItemReader,
        batcher: Batcher,
        limits: Limits,
        metrics: Metrics,
    ) -> None:
        self._records = records
        self._reader = reader
        self._batcher = batcher
        self._limits = limits
        self._metrics = metrics

    async def tokenize(self, request: TokenizeRequest) -> Answer:
        """Answer `POST /tokenize`: an entry per item, in order.

        Raises:
            ServiceError: A fault of the whole request.
        """
        if len(request.items) > self._limits.max_items:
            msg = f"{len(request.items)} items, at most {self._limits.max_items} are taken in one request"
            raise TooManyItems(msg)
        record = await self._records.of(request.namespace, request.tokenizer)
        items, failures = self._read(request.items)
        known = await self._recall(record, items)
        # Content that changed is encoded again where its own codes are asked for: to be reassigned, or in a dry run.
        afresh = request.on_change == "reassign" or not request.assign
        encoded, unencodable = await self._encode(
            {i: item for i, item in items.items() if i not in known or not _stands(item, known[i], afresh=afresh)}
        )
        failures.update(unencodable)
        items = {i: item for i, item in items.items() if i not in unencodable}
        if request.assign:
            claimed, exhausted = await self._claim(request, items, encoded)
            failures.update(exhausted)
            answers = assigned({i: item for i, item in items.items() if i not in exhausted}, known, encoded, claimed)
        else:
            answers = await self._dry_run(record, items, known, encoded)
        self._count(answers, failures, encoded, dry_run=not request.assign)
        return self._envelope(request.namespace, in_order(request.items, answers, failures))

    async def by_semantic_id(self, text: str, namespace: str, tokenizer: str | None) -> Answer:
        """Answer `GET /item/{semantic_id}`.

        Raises:
            MalformedSemanticId: It is not one of this tokenizer.
            NotAssigned: It was never issued.
            Retired: Its item was retired.
        """
        record = await self._records.of(namespace, tokenizer)
        semantic_id = self._parse(text)
        (assignment,) = await self._timed("find", record.by_semantic_ids([semantic_id]))
        if assignment is None:
            msg = f"no item holds {semantic_id} in the namespace {namespace}"
            raise NotAssigned(msg)
        require_not_retired(assignment)
        return {**holder(assignment), **self._records.origin(namespace)}

    async def by_item_id(self, item_id: str, namespace: str, tokenizer: str | None) -> Answer:
        """Answer `GET /assignment/{item_id}`.

        Raises:
            NotAssigned: The item has no Semantic ID.
            Retired: It was retired.
        """
        record = await self._records.of(namespace, tokenizer)
        (assignment,) = await self._timed("find", record.by_item_ids([item_id]))
        if assignment is None:
            raise unknown_item(namespace)
        require_not_retired(assignment)
        return {**holder(assignment), **self._records.origin(namespace)}

    async def retire(self, item_id: str, namespace: str, tokenizer: str | None) -> Answer:
        """Answer `DELETE /assignment/{item_id}`: what it held, and since when it is retired.

        Raises:
            NotAssigned: The item has no Semantic ID.
        """
        record = await self._records.of(namespace, tokenizer)
        (assignment,) = await self._timed("find", record.by_item_ids([item_id]))
        if assignment is not None and assignment.retired_at is None:
            (assignment,) = await self._timed("retire", record.retire([item_id]))
        if assignment is None:
            raise unknown_item(namespace)
        return {**holder(assignment), "retired_at": assignment.retired_at, **self._records.origin(namespace)}

    async def lookup(self, request: LookupRequest) -> Answer:
        """Answer `POST /lookup`: an entry per Semantic ID, in order; each fails alone."""
        if len(request.semantic_ids) > self._limits.max_lookups:
            msg = (
                f"{len(request.semantic_ids)} Semantic IDs, at most {self._limits.max_lookups} are taken in one request"
            )
            raise TooManyItems(msg)
        record = await self._records.of(request.namespace, request.tokenizer)
        answers: dict[int, Answer] = {}
        parsed: dict[int, SemanticId] = {}
        for i, text in enumerate(request.semantic_ids):
            try:
                parsed[i] = self._parse(text)
            except MalformedSemanticId as error:
                answers[i] = unanswered(text, error)
        found = await self._timed("find", record.by_semantic_ids(list(parsed.values())))
        for (i, semantic_id), assignment in zip(parsed.items(), found, strict=True):
            answers[i] = looked_up(request.semantic_ids[i], semantic_id, assignment)
        return self._envelope(request.namespace, [answers[i] for i in range(len(answers))])

    def _read(self, entries: Sequence[object]) -> tuple[dict[int, Item], dict[int, ItemError]]:
        """Valid items and failures by their place; an item id with two contents fails at each of its places."""
        items: dict[int, Item] = {}
        failures: dict[int, ItemError] = {}
        digests: dict[str, set[bytes]] = {}
        for i, entry in enumerate(entries):
            try:
                items[i] = item = self._reader.read(entry)
                digests.setdefault(item.item_id, set()).add(item.digest)
            except ItemError as error:
                failures[i] = error
        for i in [i for i, item in items.items() if len(digests[item.item_id]) > 1]:
            failures[i] = ConflictingDuplicate(f"{len(digests[items.pop(i).item_id])} contents are given for it")
        return items, failures

    async def _recall(self, record: Record, items: Mapping[int, Item]) -> dict[int, Assignment]:
        """Assignments of the items that hold one now; one that was retired has to claim its own again."""
        found = await self._timed("recall", record.by_item_ids([item.item_id for item in items.values()]))
        return {i: assignment for i, assignment in zip(items, found, strict=True) if assignment and assignment.live}

    async def _encode(self, items: Mapping[int, Item]) -> tuple[dict[int, EncodedRow], dict[int, EncodingFailed]]:
        """What was encoded, and what the model failed on."""
        rows = dict(zip(items, await self._batcher.encode([item.content for item in items.values()]), strict=True))
        encoded = {i: row for i, row in rows.items() if isinstance(row, EncodedRow)}
        return encoded, {i: row for i, row in rows.items() if isinstance(row, EncodingFailed)}

    async def _claim(
        self, request: TokenizeRequest, items: Mapping[int, Item], encoded: Mapping[int, EncodedRow]
    ) -> tuple[dict[int, ClaimResult], dict[int, SuffixExhausted]]:
        """What was claimed, and what has no suffix left. Only now a new namespace leaves anything behind."""
        if not encoded:
            return {}, {}
        record = await self._records.of(request.namespace, request.tokenizer, create=True)
        reassign = request.on_change == "reassign"
        claims = [Claim(items[i].item_id, row.codes, items[i].digest, reassign) for i, row in encoded.items()]
        results = dict(zip(encoded, await self._timed("claim", record.claim(claims)), strict=True))
        claimed = {i: result for i, result in results.items() if isinstance(result, ClaimResult)}
        return claimed, {i: result for i, result in results.items() if isinstance(result, SuffixExhausted)}

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

    def _parse(self, text: object) -> SemanticId:
        if not isinstance(text, str):
            msg = "a Semantic ID is a string"
            raise MalformedSemanticId(msg)
        return SemanticId.parse(text, self._records.manifest.codebook_sizes)

    def _envelope(self, namespace: str, items: list[Answer]) -> Answer:
        return {**self._records.origin(namespace), "items": items}

    async def _timed(self, call: str, work: Awaitable[T]) -> T:
        started = time.perf_counter()
        try:
            return await work
        finally:
            self._metrics.registry_seconds.labels(call).observe(time.perf_counter() - started)

    def _count(
        self, answers: Mapping[int, Answer], failures: Mapping[int, ItemError], encoded: Iterable[int], *, dry_run: bool
    ) -> None:
        created = sum(answer["created"] for answer in answers.values())
        computed = len(answers.keys() & set(encoded))
        outcomes = {
            "created": created,
            "known": len(answers) - computed,
            "dry_run" if dry_run else "existing": computed - created,
            "failed": len(failures),
        }
        for outcome, count in outcomes.items():
            self._metrics.items.labels(outcome).inc(count)


def _stands(item: Item, assignment: Assignment, *, afresh: bool) -> bool:
    """Whether the assignment is the answer without the model; `afresh` where the codes of changed content count."""
    return item.digest == assignment.digest and not (afresh and assignment.content_changed)

"""What is held: looked up by Semantic ID or by item, and retired; one at a time, or many."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from service.answers import (
    Answer,
    assignment_of,
    holder,
    looked_up,
    require_not_retired,
    unanswered,
    unassigned,
    unknown_item,
)
from service.content import read_item_id
from service.counterparts import show_counterparts
from service.displays import show
from service.errors import InvalidItemId, MalformedSemanticId, NotAssigned, TooManyItems
from service.metrics import Metrics
from service.records import Records
from service.registry import Assignment, Record
from service.schemas import AssignmentsRequest, LookupRequest, RecordOptions, RetireRequest
from service.semantic_id import SemanticId
from service.tokenizers import LoadedTokenizer, Tokenizers

T = TypeVar("T")


class _Asked(NamedTuple):
    """Of what something is asked: a namespace, under a tokenizer."""

    tokenizer: LoadedTokenizer
    namespace: str
    record: Record

    @property
    def origin(self) -> Mapping[str, str]:
        return self.tokenizer.origin(self.namespace)


class Assignments:
    """Semantic IDs and item ids in, assignments out. Of many an entry each, in order; a faulty one fails alone.

    Args:
        tokenizers: Those that are loaded.
        records: Theirs.
        max_lookups: Of one request.
        metrics: Where calls of the registry are timed.
    """

    def __init__(self, tokenizers: Tokenizers, records: Records, max_lookups: int, metrics: Metrics) -> None:
        self._tokenizers = tokenizers
        self._records = records
        self._max_lookups = max_lookups
        self._metrics = metrics

    async def of_semantic_id(self, text: str, options: RecordOptions) -> Answer:
        """Answer `GET /item/{semantic_id}`.

        Raises:
            MalformedSemanticId: It is not one of this tokenizer.
            NotAssigned: It was never issued.
            Retired: Its item was retired.
            ServiceError: A fault of the whole request.
        """
        semantic_id = _parse(text, self._tokenizers.named(options.tokenizer))
        asked = await self._asked(options)
        (assignment,) = await self._timed("find", asked.record.by_semantic_ids([semantic_id]))
        if assignment is None:
            msg = f"no item holds {semantic_id} in the namespace {asked.namespace}"
            raise NotAssigned(msg)
        require_not_retired(assignment)
        return await self._shown(asked, {**holder(assignment), **asked.origin})

    async def of_semantic_ids(self, request: LookupRequest) -> Answer:
        """Answer `POST /lookup`.

        Raises:
            ServiceError: A fault of the whole request.
        """
        self._check_number(len(request.semantic_ids), "Semantic IDs")
        asked = await self._asked(request)
        answers: dict[int, Answer] = {}
        parsed: dict[int, SemanticId] = {}
        for i, text in enumerate(request.semantic_ids):
            try:
                parsed[i] = _parse(text, asked.tokenizer)
            except MalformedSemanticId as error:
                answers[i] = unanswered(text, error)
        found = await self._timed("find", asked.record.by_semantic_ids(list(parsed.values())))
        for (i, semantic_id), assignment in zip(parsed.items(), found, strict=True):
            answers[i] = looked_up(request.semantic_ids[i], semantic_id, assignment)
        await self._show(asked, list(answers.values()), counterparts=request.counterparts)
        return {**asked.origin, "items": [answers[i] for i in range(len(answers))]}

    async def of_item(self, item_id: str, options: RecordOptions) -> Answer:
        """Answer `GET /assignment`.

        Raises:
            NotAssigned: The item has no Semantic ID.
            Retired: It was retired.
            ServiceError: A fault of the whole request.
        """
        asked = await self._asked(options)
        (assignment,) = await self._timed("find", asked.record.by_item_ids([item_id]))
        if assignment is None:
            raise unknown_item(asked.namespace)
        require_not_retired(assignment)
        return await self._shown(asked, {**holder(assignment), **asked.origin})

    async def of_items(self, request: AssignmentsRequest) -> Answer:
        """Answer `POST /assignments`.

        Raises:
            ServiceError: A fault of the whole request.
        """
        item_ids, faults = self._read(request.item_ids)
        asked = await self._asked(request)
        found = await self._timed("find", asked.record.by_item_ids(list(item_ids.values())))
        items = [assignment_of(*pair, asked.namespace) for pair in zip(item_ids.values(), found, strict=True)]
        holders = [item for item in items if "error" not in item]
        await self._show(asked, holders, counterparts=request.counterparts)
        return {**asked.origin, "items": _in_order(item_ids, items, faults)}

    async def retire_item(self, item_id: str, options: RecordOptions) -> Answer:
        """Answer `DELETE /assignment`: what it held, and since when it is retired.

        Raises:
            NotAssigned: The item has no Semantic ID.
            ServiceError: A fault of the whole request; it may be retired.
        """
        asked = await self._asked(options)
        assignment = (await self._retired(asked.record, [item_id]))[item_id]
        if assignment is None:
            raise unknown_item(asked.namespace)
        return {**holder(assignment), "retired_at": assignment.retired_at, **asked.origin}

    async def retire_items(self, request: RetireRequest) -> Answer:
        """Answer `POST /retire`.

        Raises:
            ServiceError: A fault of the whole request; some may be retired.
        """
        item_ids, faults = self._read(request.item_ids)
        asked = await self._asked(request)
        retired = await self._retired(asked.record, list(item_ids.values()))
        items = [assignment_of(each, retired[each], asked.namespace, retired=True) for each in item_ids.values()]
        return {**asked.origin, "items": _in_order(item_ids, items, faults)}

    async def _asked(self, options: RecordOptions) -> _Asked:
        tokenizer = self._tokenizers.named(options.tokenizer)
        return _Asked(tokenizer, options.namespace, await self._records.of(options.namespace, tokenizer.manifest))

    async def _retired(self, record: Record, item_ids: Sequence[str]) -> dict[str, Assignment | None]:
        """What these held, retired now or before; None for those that have no Semantic ID."""
        known = dict(zip(item_ids, await self._timed("find", record.by_item_ids(item_ids)), strict=True))
        live = [item_id for item_id, assignment in known.items() if assignment and assignment.retired_at is None]
        if live:
            known.update(zip(live, await self._timed("retire", record.retire(live)), strict=True))
        await record.displays.retire([item_id.encode() for item_id, assignment in known.items() if assignment])
        return known

    async def _shown(self, asked: _Asked, answer: Answer) -> Answer:
        await self._show(asked, [answer], counterparts=True)
        return answer

    async def _show(self, asked: _Asked, answers: Sequence[Answer], *, counterparts: bool) -> None:
        """Add titles, and what the items hold under the other tokenizers."""
        await show(asked.record, answers)
        if counterparts and (others := self._tokenizers.current.beside(asked.tokenizer)):
            await self._timed("find", show_counterparts(others, self._records, asked.namespace, answers))

    async def _timed(self, call: str, work: Awaitable[T]) -> T:
        with self._metrics.registry_call(call):
            return await work

    def _check_number(self, number: int, what: str) -> None:
        if number > self._max_lookups:
            msg = f"{number} {what}, at most {self._max_lookups} are taken in one request"
            raise TooManyItems(msg)

    def _read(self, given: Sequence[object]) -> tuple[dict[int, str], dict[int, Answer]]:
        """Item ids, and the answers to what is none, by their place.

        Raises:
            TooManyItems: There are more than one request may have.
        """
        self._check_number(len(given), "item ids")
        item_ids: dict[int, str] = {}
        faults: dict[int, Answer] = {}
        for i, value in enumerate(given):
            try:
                item_ids[i] = read_item_id(value)
            except InvalidItemId as error:
                faults[i] = unassigned(value, error)
        return item_ids, faults


def _in_order(item_ids: Mapping[int, str], items: Sequence[Answer], faults: Mapping[int, Answer]) -> list[Answer]:
    """An entry for each place."""
    entries = {**dict(zip(item_ids, items, strict=True)), **faults}
    return [entries[i] for i in range(len(entries))]


def _parse(text: object, tokenizer: LoadedTokenizer) -> SemanticId:
    if not isinstance(text, str):
        msg = "a Semantic ID is a string"
        raise MalformedSemanticId(msg)
    return SemanticId.parse(text, tokenizer.manifest.codebook_sizes)

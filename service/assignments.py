"""Many items at once: what they hold, and their retirement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from service.answers import Answer, assignment_of, unassigned
from service.content import read_item_id
from service.counterparts import show_counterparts
from service.displays import show
from service.errors import InvalidItemId, TooManyItems
from service.metrics import Metrics
from service.records import Records
from service.schemas import AssignmentsRequest, RetireRequest
from service.tokenizers import Tokenizers


class Assignments:
    """Item ids in, assignments out: an entry each, in order; a faulty one fails alone."""

    def __init__(self, tokenizers: Tokenizers, records: Records, metrics: Metrics, max_items: int) -> None:
        self._tokenizers = tokenizers
        self._records = records
        self._metrics = metrics
        self._max_items = max_items

    async def look_up(self, request: AssignmentsRequest) -> Answer:
        """Answer `POST /assignments`.

        Raises:
            ServiceError: A fault of the whole request.
        """
        item_ids, faults = self._read(request.item_ids)
        tokenizer = self._tokenizers.named(request.tokenizer)
        record = await self._records.of(request.namespace, tokenizer.manifest)
        with self._metrics.registry_call("find"):
            found = await record.by_item_ids(list(item_ids.values()))
        items = [assignment_of(*pair, request.namespace) for pair in zip(item_ids.values(), found, strict=True)]
        holders = [item for item in items if "error" not in item]
        await show(record, holders)
        if request.counterparts and (others := self._tokenizers.current.beside(tokenizer)):
            with self._metrics.registry_call("find"):
                await show_counterparts(others, self._records, request.namespace, holders)
        return {**tokenizer.origin(request.namespace), "items": _in_order(item_ids, items, faults)}

    async def retire(self, request: RetireRequest) -> Answer:
        """Answer `POST /retire`.

        Raises:
            ServiceError: A fault of the whole request; some may be retired.
        """
        item_ids, faults = self._read(request.item_ids)
        tokenizer = self._tokenizers.named(request.tokenizer)
        record = await self._records.of(request.namespace, tokenizer.manifest)
        asked = list(item_ids.values())
        with self._metrics.registry_call("find"):
            known = dict(zip(asked, await record.by_item_ids(asked), strict=True))
        live = [item_id for item_id, assignment in known.items() if assignment and assignment.retired_at is None]
        if live:
            with self._metrics.registry_call("retire"):
                known.update(zip(live, await record.retire(live), strict=True))
        await record.displays.retire([item_id.encode() for item_id, assignment in known.items() if assignment])
        items = [assignment_of(item_id, known[item_id], request.namespace, retired=True) for item_id in asked]
        return {**tokenizer.origin(request.namespace), "items": _in_order(item_ids, items, faults)}

    def _read(self, given: Sequence[object]) -> tuple[dict[int, str], dict[int, Answer]]:
        """Item ids, and the answers to what is none, by their place.

        Raises:
            TooManyItems: There are more than one request may have.
        """
        if len(given) > self._max_items:
            msg = f"{len(given)} item ids, at most {self._max_items} are taken in one request"
            raise TooManyItems(msg)
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

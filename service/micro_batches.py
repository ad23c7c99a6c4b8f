"""Embeddings of small requests that come together, on one way through the model and the registry.

    requests --a turn or two of the event loop--> micro-batch --use case, once for all--> each request its own

Most of what a request of one item costs is the way, not the item: its place in the queue, its claim, what is counted
of it. On one way together they cost little more than one of them.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

from service.answers import Answer
from service.batching.lanes import SMALL_ROWS
from service.content import Item
from service.errors import ItemError
from service.schemas import TokenizeOptions
from service.telemetry.serving import SERVING, Part, Serving, ServingTogether
from service.tokenizers import LoadedTokenizer

Outcome: TypeAlias = tuple[dict[int, Answer], dict[int, ItemError]]
"""The answer to each item, or its error, by its place."""

UseCase: TypeAlias = Callable[[LoadedTokenizer, TokenizeOptions, Mapping[int, Item]], Awaitable[Outcome]]


class _Caller(NamedTuple):
    items: Mapping[int, Item]
    serving: Serving | None
    outcome: asyncio.Future[Outcome]


class _MicroBatch:
    """Callers whose items may go one way; at most `SMALL_ROWS` items, as more would be bulk, no item id twice.

    Attributes:
        tokenizer: Of all of them.
        options: The same for all of them.
        callers: Those.
        rows: How many items.
        item_ids: Theirs.
        serving: Where the time of its way goes; None before it is under way.
        task: The way.
        unwanted: Whether the task was cancelled as a caller has left.
    """

    def __init__(self, tokenizer: LoadedTokenizer, options: TokenizeOptions) -> None:
        self.tokenizer = tokenizer
        self.options = options
        self.callers: list[_Caller] = []
        self.rows = 0
        self.item_ids: set[str] = set()
        self.serving: ServingTogether | None = None
        self.task: asyncio.Task[None] | None = None
        self.unwanted = False

    def takes(self, items: Mapping[int, Item]) -> bool:
        """Whether these may come along."""
        room = self.rows + len(items) <= SMALL_ROWS
        return room and self.item_ids.isdisjoint([item.item_id for item in items.values()])

    def add(self, caller: _Caller) -> None:
        """They come along."""
        self.callers.append(caller)
        self.rows += len(caller.items)
        self.item_ids.update([item.item_id for item in caller.items.values()])

    def staying(self) -> list[_Caller]:
        """Those who still wait for their outcome."""
        return [caller for caller in self.callers if not caller.outcome.done()]

    def left(self) -> None:
        """A caller has left: its items go no further, unless they are through the model and others stay."""
        if self.task is None or self.serving is None or self.unwanted:
            return  # what is not under way begins with those who stay: a task that is cancelled before never would
        if Part.MODEL not in self.serving.seconds or not self.staying():
            self.unwanted = self.task.cancel()


class MicroBatches:
    """Gathers small requests that come at the same time.

    Args:
        use_case: What is done with items of one tokenizer and namespace, whichever request they are of.
    """

    def __init__(self, use_case: UseCase) -> None:
        self._use_case = use_case
        self._gathering: dict[Any, _MicroBatch] = {}
        self._under_way: set[asyncio.Task[None]] = set()

    async def answer(self, tokenizer: LoadedTokenizer, options: TokenizeOptions, items: Mapping[int, Item]) -> Outcome:
        """The use case's outcome for these items; alone where the model is busy: who is known need not wait for others.

        Raises:
            ServiceError: They all fail.
        """
        loop = asyncio.get_running_loop()
        key = (tokenizer, options.namespace, options.assign, options.on_change)
        batch = self._gathering.get(key)
        if batch is not None and not batch.takes(items):
            self._begin(key, batch)
            batch = None
        if batch is None:
            if not tokenizer.batcher.encodes_soon:
                return await self._use_case(tokenizer, options, items)
            batch = self._gathering[key] = _MicroBatch(tokenizer, options)
            loop.call_soon(self._gather, key, batch, 0)
        outcome: asyncio.Future[Outcome] = loop.create_future()
        batch.add(_Caller(items, SERVING.get(), outcome))
        try:
            return await outcome
        except asyncio.CancelledError:
            batch.left()
            raise

    def _gather(self, key: object, batch: _MicroBatch, seen: int) -> None:
        """Begin once a turn of the loop brings no more items."""
        if batch.task is None:
            if seen < batch.rows < SMALL_ROWS:
                asyncio.get_running_loop().call_soon(self._gather, key, batch, batch.rows)
            else:
                self._begin(key, batch)

    def _begin(self, key: object, batch: _MicroBatch) -> None:
        del self._gathering[key]
        batch.task = asyncio.create_task(self._serve(batch), name="micro-batch")
        self._under_way.add(batch.task)
        batch.task.add_done_callback(self._under_way.discard)

    async def _serve(self, batch: _MicroBatch) -> None:
        """One way for all; from its beginning again, for those who stay, where one leaves before the model is done."""
        while callers := batch.staying():
            batch.serving = ServingTogether([caller.serving for caller in callers if caller.serving is not None])
            SERVING.set(batch.serving)
            items = dict(enumerate(itertools.chain.from_iterable([caller.items.values() for caller in callers])))
            try:
                outcome = await self._use_case(batch.tokenizer, batch.options, items)
            except asyncio.CancelledError:
                if not batch.unwanted:
                    for caller in callers:
                        caller.outcome.cancel()
                    raise
                batch.unwanted = False
                batch.task.uncancel()  # type: ignore[union-attr]
            except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to those who wait
                for caller in batch.staying():
                    caller.outcome.set_exception(error)
            else:
                _hand_out(callers, outcome)


def _hand_out(callers: list[_Caller], outcome: Outcome) -> None:
    """Each caller its own, by its own places."""
    answers, failures = outcome
    at = 0
    for items, _, own in callers:
        places = dict(zip(items, itertools.count(at), strict=False))
        at += len(items)
        if not own.done():
            answered = {i: answers[place] for i, place in places.items() if place in answers}
            failed = {i: failures[place] for i, place in places.items() if place in failures} if failures else {}
            own.set_result((answered, failed))

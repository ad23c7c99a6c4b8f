"""Small requests that come together: one way for all, and nobody's outcome depends on the others."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from service.content import Item
from service.errors import EncodingFailed, ItemError, RegistryUnavailable
from service.micro_batches import MicroBatches, Outcome
from service.schemas import TokenizeOptions
from service.telemetry.serving import SERVING, Part, Serving

OPTIONS = TokenizeOptions()


class Loaded:
    """A tokenizer whose model is busy with others' work, or not."""

    def __init__(self, *, encodes_soon: bool) -> None:
        self.batcher = self
        self.encodes_soon = encodes_soon


TOKENIZER: Any = Loaded(encodes_soon=True)


class UseCase:
    """Answers each item with its id, once it is let."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.begun = asyncio.Event()
        self.may_encode = asyncio.Event()
        self.may_claim = asyncio.Event()
        self.may_encode.set()
        self.may_claim.set()
        self.dropped = 0

    async def __call__(self, _tokenizer: Any, _options: TokenizeOptions, items: Mapping[int, Item]) -> Outcome:
        self.calls.append([item.item_id for item in items.values()])
        self.begun.set()
        try:
            await self.may_encode.wait()
            if (serving := SERVING.get()) is not None:
                serving.waited(Part.MODEL, 0.5)
            await self.may_claim.wait()
        except asyncio.CancelledError:
            self.dropped += 1
            raise
        failures: dict[int, ItemError] = {
            i: EncodingFailed("no") for i, item in items.items() if item.item_id.startswith("bad")
        }
        return {i: {"item_id": item.item_id} for i, item in items.items() if i not in failures}, failures


@pytest.fixture
async def use_case() -> UseCase:
    return UseCase()


def items(*item_ids: str) -> dict[int, Item]:
    """Valid items of a request, whose first entry was none."""
    return {i: Item(item_id, np.ones(2, np.float32), b"digest42") for i, item_id in enumerate(item_ids, start=1)}


async def answers_of(together: MicroBatches, *requests: tuple[str, ...]) -> list[Outcome]:
    return await asyncio.gather(*[together.answer(TOKENIZER, OPTIONS, items(*ids)) for ids in requests])


async def test_requests_that_come_together_are_one_call_and_each_has_its_own_answers(use_case: UseCase) -> None:
    outcomes = await answers_of(MicroBatches(use_case), ("a", "bad b"), ("c",))

    assert use_case.calls == [["a", "bad b", "c"]]
    assert [answers for answers, _ in outcomes] == [{1: {"item_id": "a"}}, {1: {"item_id": "c"}}]
    assert [list(failures) for _, failures in outcomes] == [[2], []]


async def test_no_micro_batch_is_as_large_as_bulk(use_case: UseCase) -> None:
    outcomes = await answers_of(MicroBatches(use_case), *[(f"{i}a", f"{i}b", f"{i}c") for i in range(12)])

    assert [len(call) for call in use_case.calls] == [15, 15, 6]
    assert [answers[3]["item_id"] for answers, _ in outcomes] == [f"{i}c" for i in range(12)]


async def test_an_item_of_two_requests_is_in_two_micro_batches(use_case: UseCase) -> None:
    """In one, two contents for it would be the fault of a request."""
    await answers_of(MicroBatches(use_case), ("a", "b"), ("b", "c"))

    assert use_case.calls == [["a", "b"], ["b", "c"]]


async def test_requests_that_ask_for_other_things_do_not_go_together(use_case: UseCase) -> None:
    together = MicroBatches(use_case)
    another: Any = Loaded(encodes_soon=True)
    asked = [OPTIONS, TokenizeOptions(namespace="shop"), TokenizeOptions(on_change="reassign")]

    await asyncio.gather(
        together.answer(another, OPTIONS, items("z")),
        *[together.answer(TOKENIZER, options, items(f"{i}")) for i, options in enumerate(asked)],
    )

    assert sorted(use_case.calls) == [["0"], ["1"], ["2"], ["z"]]


async def test_where_the_model_is_busy_nobody_waits_for_another(use_case: UseCase) -> None:
    together = MicroBatches(use_case)
    busy: Any = Loaded(encodes_soon=False)

    await asyncio.gather(*[together.answer(busy, OPTIONS, items(item_id)) for item_id in "ab"])

    assert use_case.calls == [["a"], ["b"]]


async def test_the_items_of_a_caller_who_leaves_before_the_model_is_done_go_no_further(use_case: UseCase) -> None:
    use_case.may_encode.clear()
    together = MicroBatches(use_case)
    callers = [asyncio.create_task(together.answer(TOKENIZER, OPTIONS, items(item_id))) for item_id in "abc"]
    await use_case.begun.wait()

    for leaver in callers[:2]:
        leaver.cancel()
    await asyncio.wait(callers[:2])
    use_case.may_encode.set()
    answers, _ = await callers[2]

    assert all(leaver.cancelled() for leaver in callers[:2])
    assert use_case.calls == [["a", "b", "c"], ["c"]]
    assert answers == {1: {"item_id": "c"}}


async def test_a_caller_who_leaves_after_the_model_keeps_nobody_from_an_answer(use_case: UseCase) -> None:
    use_case.may_claim.clear()
    together = MicroBatches(use_case)
    leaver, stayer = (asyncio.create_task(together.answer(TOKENIZER, OPTIONS, items(item_id))) for item_id in "ab")
    await use_case.begun.wait()
    await asyncio.sleep(0)

    leaver.cancel()
    await asyncio.wait([leaver])
    use_case.may_claim.set()

    assert (await stayer)[0] == {1: {"item_id": "b"}}
    assert use_case.calls == [["a", "b"]]


async def test_where_all_have_left_nothing_goes_on(use_case: UseCase) -> None:
    use_case.may_claim.clear()
    together = MicroBatches(use_case)
    callers = [asyncio.create_task(together.answer(TOKENIZER, OPTIONS, items(item_id))) for item_id in "ab"]
    await use_case.begun.wait()
    await asyncio.sleep(0)

    for caller in callers:
        caller.cancel()
    await asyncio.wait(callers)
    await asyncio.sleep(0.01)

    assert (use_case.calls, use_case.dropped) == ([["a", "b"]], 1)


@pytest.mark.parametrize("turns", [1, 2], ids=["as they gather", "as its task is about to begin"])
async def test_those_who_leave_before_it_begins_are_not_in_it(use_case: UseCase, turns: int) -> None:
    together = MicroBatches(use_case)
    leaver, stayer = (asyncio.create_task(together.answer(TOKENIZER, OPTIONS, items(item_id))) for item_id in "ab")
    for _ in range(turns):
        await asyncio.sleep(0)

    leaver.cancel()

    assert (await asyncio.wait_for(stayer, 10))[0] == {1: {"item_id": "b"}}
    assert use_case.calls == [["b"]]


async def test_a_fault_of_all_is_everybodys() -> None:
    async def down(*_: object) -> Outcome:
        raise RegistryUnavailable("away")

    together = MicroBatches(down)
    outcomes = await asyncio.gather(
        *[together.answer(TOKENIZER, OPTIONS, items(item_id)) for item_id in "ab"], return_exceptions=True
    )

    assert all(isinstance(outcome, RegistryUnavailable) for outcome in outcomes)


async def test_each_request_is_told_what_was_waited_for(use_case: UseCase) -> None:
    together = MicroBatches(use_case)

    async def served(request_id: str) -> Serving:
        serving = Serving(request_id)
        SERVING.set(serving)
        await together.answer(TOKENIZER, OPTIONS, items(request_id))
        return serving

    requests = await asyncio.gather(served("a"), served("b"))

    assert [request.seconds for request in requests] == [{Part.MODEL: 0.5}, {Part.MODEL: 0.5}]
    assert len(use_case.calls) == 1

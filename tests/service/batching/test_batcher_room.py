"""Room in the queue, and turns of several models."""

from __future__ import annotations

import asyncio

import pytest

from service.batching.capacity import Capacity
from service.errors import EncoderStopped, Overloaded
from tests.service.letters import STEP_S, LetterEncoder, MakeBatcher, batcher_of, hold, queued, row_of


async def test_a_full_queue_refuses_and_says_when_to_come_again(make_batcher: MakeBatcher) -> None:
    batcher, encoder = make_batcher(queue_tokens=10)
    busy = await hold(batcher, encoder)
    (waiting,) = await queued(batcher, ["a" * 8])
    fitting = (await queued(batcher, ["c" * 2]))[0]

    with pytest.raises(Overloaded) as refusal:
        await batcher.encode(["b" * 3])
    encoder.free.set()

    assert refusal.value.status == 429
    assert int(refusal.value.headers()["Retry-After"]) >= 1
    assert await fitting == [row_of("cc")]
    await asyncio.gather(busy, waiting)
    assert await batcher.encode(["b" * 3]) == [row_of("bbb")]


async def test_who_comes_again_for_alternatives_is_not_refused(make_batcher: MakeBatcher) -> None:
    batcher, encoder = make_batcher(queue_tokens=10)
    busy = await hold(batcher, encoder)
    waiting = await queued(batcher, ["a" * 8], ["c" * 2])

    with pytest.raises(Overloaded):
        await batcher.encode(["b" * 3])
    again = asyncio.ensure_future(batcher.encode(["b" * 3], alternatives=2))
    await asyncio.sleep(0)
    encoder.free.set()

    (row,) = await again
    assert row.codes == row_of("bbb").codes
    await asyncio.gather(busy, *waiting)


async def test_bulk_that_small_requests_leave_no_room_for_comes_again_when_they_are_done(
    make_batcher: MakeBatcher,
) -> None:
    batcher, encoder = make_batcher(queue_tokens=64)
    busy = await hold(batcher, encoder)
    small = await queued(batcher, *[["a" * 16]] * 4)

    with pytest.raises(Overloaded) as refusal:
        await batcher.encode(["b"] * 100)
    encoder.free.set()

    assert refusal.value.retry_after_s > 0
    await asyncio.gather(busy, *small)


async def test_the_largest_request_is_taken_while_there_is_any_room(make_batcher: MakeBatcher) -> None:
    batcher, encoder = make_batcher(queue_tokens=10)
    busy = await hold(batcher, encoder)
    (waiting,) = await queued(batcher, ["a" * 9])

    (large,) = await queued(batcher, ["b" * 50])
    encoder.free.set()

    assert await large == [row_of("b" * 50)]
    await asyncio.gather(busy, waiting)


async def test_the_rows_of_callers_who_left_hold_no_place_in_the_queue(make_batcher: MakeBatcher) -> None:
    batcher, encoder = make_batcher(queue_tokens=10)
    busy = await hold(batcher, encoder)
    stays, leaves = await queued(batcher, ["s" * 5], ["l" * 50])

    leaves.cancel()
    await asyncio.wait({leaves})
    comes = asyncio.create_task(batcher.encode(["c" * 4]))
    await asyncio.sleep(STEP_S)
    encoder.free.set()

    assert await asyncio.gather(busy, stays, comes) == [[row_of("busy")], [row_of("s" * 5)], [row_of("c" * 4)]]


async def test_an_empty_queue_takes_any_one_request(make_batcher: MakeBatcher) -> None:
    batcher, _ = make_batcher(queue_tokens=10)

    assert await batcher.encode(["a" * 50]) == [row_of("a" * 50)]


async def test_one_bound_holds_for_the_queues_of_all_models() -> None:
    capacity = Capacity(10)
    encoders = [LetterEncoder(), LetterEncoder()]
    first, second = (batcher_of(encoder, 100, capacity) for encoder in encoders)
    for batcher in (first, second):
        batcher.start()
    busy = await hold(first, encoders[0])
    stays, leaves = await queued(first, ["s" * 5], ["l" * 50])

    with pytest.raises(Overloaded):
        await second.encode(["x"])
    leaves.cancel()
    await asyncio.wait({leaves})
    comes = asyncio.create_task(second.encode(["c" * 4]))  # the leaver's room, in the other model's queue
    await asyncio.sleep(STEP_S)
    full = capacity.queued_tokens
    encoders[0].free.set()

    assert await asyncio.gather(busy, stays, comes) == [[row_of("busy")], [row_of("s" * 5)], [row_of("c" * 4)]]
    assert (full, capacity.queued_tokens) == (9, 0)
    for batcher in (first, second):
        await batcher.stop()


async def test_models_take_turns_and_a_busy_one_does_not_keep_the_others_out() -> None:
    capacity = Capacity(1000)
    busy_encoder, other_encoder = LetterEncoder(), LetterEncoder()
    order: list[str] = []
    for name, encoder in (("busy", busy_encoder), ("other", other_encoder)):
        work = encoder._encode
        encoder._encode = lambda *rows, name=name, work=work: order.append(name) or work(*rows)
    busy, other = batcher_of(busy_encoder, 1, capacity), batcher_of(other_encoder, 1, capacity)
    for batcher in (busy, other):
        batcher.start()
    held = await hold(busy, busy_encoder)
    (waiting,) = await queued(busy, ["a"] * 10)
    (late,) = await queued(other, ["b"])
    await asyncio.sleep(STEP_S)
    side_by_side = len(other_encoder.batches)
    busy_encoder.free.set()
    await asyncio.gather(held, waiting, late)

    assert side_by_side == 0
    assert order[:3] == ["busy", "other", "busy"]
    assert len(order) == 12
    for batcher in (busy, other):
        await batcher.stop()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_a_model_that_dies_in_its_turn_ends_it() -> None:
    capacity = Capacity(1000)
    dying, healthy = LetterEncoder(), LetterEncoder()
    dying.fault = SystemExit("a dying thread")
    first, second = batcher_of(dying, 100, capacity), batcher_of(healthy, 100, capacity)
    for batcher in (first, second):
        batcher.start()

    with pytest.raises(EncoderStopped):
        await asyncio.wait_for(first.encode(["a"]), 10)

    assert await asyncio.wait_for(second.encode(["b"]), 10) == [row_of("b")]
    for batcher in (first, second):
        await batcher.stop()

"""Admission and micro-batching, with an encoder whose codes say which content they were made of."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models import Encoding
from service.batcher import Batcher, Content, EncodedRow
from service.capacity import Capacity
from service.errors import EncoderStopped, EncodingFailed, Overloaded
from service.metrics import Metrics

STEP_S = 0.02


class LetterEncoder:
    """A text's word pieces are its letters; its codes are its length and its letters' sum. It can be held and broken.

    Attributes:
        batches: The contents of every batch that reached the model.
        free: The model runs while this is set.
        fault: Raised in place of an encoding.
        poison: A content whose batch fails.
    """

    def __init__(self) -> None:
        self.batches: list[list[object]] = []
        self.free = threading.Event()
        self.free.set()
        self.entered = threading.Semaphore(0)
        self.fault: BaseException | None = None
        self.lost_rows = 0
        self.poison: list[object] = []

    def split(self, texts: Sequence[str]) -> list[list[int]]:
        return [[ord(letter) for letter in text] for text in texts]

    def encode_texts(self, pieces: Sequence[Sequence[int]], *, alternatives: int = 0) -> Encoding:
        return self._encode([list(row) for row in pieces], [(len(row), sum(row)) for row in pieces], alternatives)

    def encode(self, embeddings: torch.Tensor, *, alternatives: int = 0) -> Encoding:
        rows = embeddings.tolist()
        return self._encode(rows, [(len(row), int(sum(row))) for row in rows], alternatives)

    def _encode(self, contents: list[list[object]], codes: list[tuple[int, int]], alternatives: int) -> Encoding:
        self.batches.append(contents)
        self.entered.release()
        assert self.free.wait(30)
        if self.fault is not None:
            raise self.fault
        if self.poison in contents:
            raise RuntimeError("poison")
        rows = torch.tensor(codes[self.lost_rows :])
        measure = rows[:, 1].to(torch.float64)
        ranked = rows[:, 1:] + torch.arange(alternatives)
        return Encoding(rows, measure, measure / 2, torch.zeros(len(rows), dtype=torch.bool), ranked)


def row_of(content: Content) -> EncodedRow:
    numbers = [ord(letter) for letter in content] if isinstance(content, str) else content.tolist()
    total = int(sum(numbers))
    return EncodedRow((len(numbers), total), float(total), total / 2)


def vector(*numbers: float) -> np.ndarray:
    return np.array(numbers, dtype=np.float32)


def batcher_of(
    encoder: LetterEncoder, batch_tokens: int, capacity: Capacity, metrics: Metrics | None = None
) -> Batcher:
    measured = (metrics or Metrics()).of_model("letters@0")
    return Batcher(encoder, batch_tokens=batch_tokens, capacity=capacity, metrics=measured)


Make = Callable[..., tuple[Batcher, LetterEncoder]]


@pytest.fixture
async def make() -> AsyncIterator[Make]:
    made: list[tuple[Batcher, LetterEncoder]] = []

    def make(batch_tokens: int = 100, queue_tokens: int = 1000) -> tuple[Batcher, LetterEncoder]:
        encoder = LetterEncoder()
        batcher = batcher_of(encoder, batch_tokens, Capacity(queue_tokens))
        batcher.start()
        made.append((batcher, encoder))
        return batcher, encoder

    yield make
    for batcher, encoder in made:
        encoder.free.set()
        await batcher.stop()


async def hold(batcher: Batcher, encoder: LetterEncoder) -> asyncio.Task[list[EncodedRow]]:
    """A request that keeps the model busy until it is set free."""
    encoder.free.clear()
    busy = asyncio.create_task(batcher.encode(["busy"]))
    await asyncio.to_thread(encoder.entered.acquire, timeout=10)
    return busy


async def queued(batcher: Batcher, *requests: Sequence[Content]) -> list[asyncio.Task[list[EncodedRow]]]:
    """Requests that wait in the queue, in this order."""
    tasks = []
    for request in requests:
        before = len(batcher._rows)
        tasks.append(asyncio.create_task(batcher.encode(request)))
        while len(batcher._rows) < before + len(request) and not tasks[-1].done():  # noqa: ASYNC110 - a thread counts
            await asyncio.sleep(0.001)
    return tasks


async def test_rows_come_back_in_the_order_of_their_contents(make: Make) -> None:
    batcher, _ = make()
    contents: list[Content] = ["ccc", "a", vector(1, 2), "bb", vector(7, 3)]

    rows = await batcher.encode(contents)

    assert rows == [row_of(content) for content in contents]


async def test_no_contents_need_no_model(make: Make) -> None:
    batcher, encoder = make()

    assert await batcher.encode([]) == []
    assert encoder.batches == []


async def test_a_lone_request_waits_for_no_timer(make: Make) -> None:
    batcher, _ = make()
    await batcher.encode(["warm"])

    durations = []
    for _attempt in range(50):
        started = time.perf_counter()
        await batcher.encode(["lone"])
        durations.append(time.perf_counter() - started)

    # The usual batching delays are 5 ms and more. The fastest, as a busy machine adds delays of its own.
    assert min(durations) < 0.002


async def test_what_gathers_while_the_model_works_is_one_batch(make: Make) -> None:
    batcher, encoder = make()
    busy = await hold(batcher, encoder)
    waiting = await queued(batcher, ["a"], ["b", "c"], ["d"])

    encoder.free.set()
    rows = await asyncio.gather(*waiting)

    assert [len(batch) for batch in encoder.batches] == [1, 4]
    assert rows == [[row_of("a")], [row_of("b"), row_of("c")], [row_of("d")]]
    assert await busy == [row_of("busy")]


async def test_a_batch_keeps_to_its_budget_of_padded_tokens(make: Make) -> None:
    batcher, encoder = make(batch_tokens=12)
    busy = await hold(batcher, encoder)
    waiting = await queued(batcher, ["aaa", "bbb", "cccc", "dddd", "eeeee"])

    encoder.free.set()
    await asyncio.gather(busy, *waiting)

    padded = [len(batch) * max(map(len, batch)) for batch in encoder.batches]
    assert [len(batch) for batch in encoder.batches] == [1, 3, 2]
    assert max(padded) <= 12


async def test_a_row_longer_than_the_budget_runs_alone(make: Make) -> None:
    batcher, encoder = make(batch_tokens=4)

    rows = await batcher.encode(["a" * 9, "b", "c"])

    assert rows[0] == row_of("a" * 9)
    assert [len(batch) for batch in encoder.batches] == [2, 1]


async def test_texts_and_embeddings_are_batches_of_their_own(make: Make) -> None:
    batcher, encoder = make()
    busy = await hold(batcher, encoder)
    waiting = await queued(batcher, ["a"], [vector(1, 2)], ["b"])

    encoder.free.set()
    rows = await asyncio.gather(*waiting)
    await busy

    assert rows == [[row_of("a")], [row_of(vector(1, 2))], [row_of("b")]]
    assert [len(batch) for batch in encoder.batches] == [1, 1, 1, 1]


async def test_alternatives_are_ranked_only_for_those_who_ask_in_batches_of_their_own(make: Make) -> None:
    batcher, encoder = make()
    busy = await hold(batcher, encoder)
    plain = asyncio.create_task(batcher.encode(["a", vector(1, 2)]))
    ranked = asyncio.create_task(batcher.encode(["b", vector(3, 4)], alternatives=3))
    while len(batcher._rows) < 4:  # noqa: ASYNC110 - a thread counts
        await asyncio.sleep(0.001)

    encoder.free.set()
    await busy

    assert await plain == [row_of("a"), row_of(vector(1, 2))]
    assert [row.alternatives for row in await ranked] == [(98, 99, 100), (7, 8, 9)]
    assert len(encoder.batches) == 5


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


@settings(max_examples=40, deadline=None)
@given(
    requests=st.lists(
        st.lists(
            st.text("abcdefgh", min_size=1, max_size=12)
            | st.lists(st.integers(1, 99), min_size=3, max_size=3).map(lambda numbers: vector(*numbers)),
            min_size=1,
            max_size=6,
        ),
        min_size=1,
        max_size=12,
    ),
    leaving=st.sets(st.integers(0, 11)),
    batch_tokens=st.integers(1, 40),
)
def test_every_caller_gets_its_own_rows_whatever_the_load(
    requests: list[list[Content]], leaving: set[int], batch_tokens: int
) -> None:
    async def load() -> None:
        encoder = LetterEncoder()
        batcher = batcher_of(encoder, batch_tokens, Capacity(10_000))
        batcher.start()
        tasks = [asyncio.create_task(batcher.encode(request)) for request in requests]
        await asyncio.sleep(0)
        for place in leaving & set(range(len(tasks))):
            tasks[place].cancel()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        await batcher.stop()

        for place, (request, answer) in enumerate(zip(requests, answers, strict=True)):
            if place in leaving:
                assert isinstance(answer, asyncio.CancelledError)
            else:
                assert answer == [row_of(content) for content in request]
        for batch in encoder.batches:
            assert len(batch) == 1 or len(batch) * max(map(len, batch)) <= max(batch_tokens, 3 * len(batch))
        assert batcher._queued_tokens == 0

    asyncio.run(load())


async def test_the_rows_of_a_caller_who_left_never_reach_the_model(make: Make) -> None:
    batcher, encoder = make()
    busy = await hold(batcher, encoder)
    leaver, stayer = await queued(batcher, ["gone", "gone too"], ["here"])

    leaver.cancel()
    encoder.free.set()

    assert await stayer == [row_of("here")]
    assert await busy == [row_of("busy")]
    assert encoder.batches[1:] == [[[ord(letter) for letter in "here"]]]
    assert batcher._queued_tokens == 0


async def test_a_caller_who_leaves_while_the_model_works_harms_nobody(make: Make) -> None:
    batcher, encoder = make()
    busy = await hold(batcher, encoder)

    busy.cancel()
    encoder.free.set()

    assert await batcher.encode(["next"]) == [row_of("next")]
    assert batcher.alive


async def test_a_full_queue_refuses_and_says_when_to_come_again(make: Make) -> None:
    batcher, encoder = make(queue_tokens=10)
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


async def test_the_largest_request_is_taken_while_there_is_any_room(make: Make) -> None:
    batcher, encoder = make(queue_tokens=10)
    busy = await hold(batcher, encoder)
    (waiting,) = await queued(batcher, ["a" * 9])

    (large,) = await queued(batcher, ["b" * 50])
    encoder.free.set()

    assert await large == [row_of("b" * 50)]
    await asyncio.gather(busy, waiting)


async def test_the_rows_of_callers_who_left_hold_no_place_in_the_queue(make: Make) -> None:
    batcher, encoder = make(queue_tokens=10)
    busy = await hold(batcher, encoder)
    stays, leaves = await queued(batcher, ["s" * 5], ["l" * 50])

    leaves.cancel()
    await asyncio.wait({leaves})
    comes = asyncio.create_task(batcher.encode(["c" * 4]))
    await asyncio.sleep(STEP_S)
    encoder.free.set()

    assert await asyncio.gather(busy, stays, comes) == [[row_of("busy")], [row_of("s" * 5)], [row_of("c" * 4)]]


async def test_an_empty_queue_takes_any_one_request(make: Make) -> None:
    batcher, _ = make(queue_tokens=10)

    assert await batcher.encode(["a" * 50]) == [row_of("a" * 50)]


async def test_a_row_that_the_model_fails_on_fails_alone(make: Make) -> None:
    batcher, encoder = make()
    busy = await hold(batcher, encoder)
    waiting = await queued(batcher, ["a", "bad", "c"], ["d"])
    encoder.poison = [ord(letter) for letter in "bad"]

    encoder.free.set()
    outcomes = await asyncio.gather(busy, *waiting)

    failed = outcomes[1][1]
    assert isinstance(failed, EncodingFailed)
    assert failed.detail == "RuntimeError"
    assert [outcomes[1][0], outcomes[1][2]] == [row_of("a"), row_of("c")]
    assert [outcomes[0], outcomes[2]] == [[row_of("busy")], [row_of("d")]]


async def test_any_number_of_bad_rows_leaves_the_thread_alive(make: Make) -> None:
    batcher, encoder = make()
    await batcher.encode(["good"])
    encoder.poison = [ord(letter) for letter in "bad"]

    outcomes = await batcher.encode(["bad"] * 20 + ["good"])

    assert [type(outcome) for outcome in outcomes] == [EncodingFailed] * 20 + [EncodedRow]
    assert batcher.alive


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_a_model_that_fails_on_what_it_could_do_before_is_lost(make: Make) -> None:
    batcher, encoder = make()
    await batcher.encode(["good"])
    encoder.fault = RuntimeError("the device is lost")

    with pytest.raises(EncoderStopped, match="thread has ended"):
        await asyncio.wait_for(batcher.encode(["a", "b"]), 5)

    await asyncio.to_thread(batcher._worker.join, 10)
    assert not batcher.alive


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_an_encoder_that_loses_rows_fails_its_callers(make: Make) -> None:
    batcher, encoder = make()
    encoder.lost_rows = 1

    with pytest.raises(EncoderStopped):
        await asyncio.wait_for(batcher.encode(["a", "b"]), 5)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("fault", [SystemExit("a dying thread"), MemoryError(), RuntimeError("the device is lost")])
async def test_a_dead_thread_answers_everyone_and_is_seen(make: Make, fault: BaseException) -> None:
    batcher, encoder = make(batch_tokens=1)
    busy = await hold(batcher, encoder)
    waiting = await queued(batcher, *([letter] for letter in "abcdefgh"))
    encoder.fault = fault

    encoder.free.set()
    outcomes = await asyncio.wait_for(asyncio.gather(busy, *waiting, return_exceptions=True), 10)
    await asyncio.to_thread(batcher._worker.join, 10)

    assert [type(outcome) for outcome in outcomes] == [EncoderStopped] * 9
    assert not batcher.alive
    with pytest.raises(EncoderStopped, match="thread has ended"):
        await batcher.encode(["late"])


async def test_stop_finishes_what_is_queued_and_refuses_what_is_new(make: Make) -> None:
    batcher, encoder = make(batch_tokens=1)
    busy = await hold(batcher, encoder)
    waiting = await queued(batcher, ["a", "b"], ["c"])

    stopping = asyncio.create_task(batcher.stop())
    await asyncio.sleep(STEP_S)
    with pytest.raises(EncoderStopped, match="shutting down"):
        await batcher.encode(["late"])
    encoder.free.set()
    await stopping

    assert await asyncio.gather(busy, *waiting) == [
        [row_of("busy")],
        [row_of("a"), row_of("b")],
        [row_of("c")],
    ]
    assert not batcher.alive


async def test_the_metrics_count_what_reached_the_model() -> None:
    encoder, metrics = LetterEncoder(), Metrics()
    batcher = batcher_of(encoder, 100, Capacity(100), metrics)
    batcher.start()

    await batcher.encode(["aa", "b"])
    await batcher.stop()

    exposition = metrics.render().decode()
    assert 'semid_batch_rows_sum{tokenizer="letters@0"} 2.0' in exposition
    assert 'semid_batch_tokens_sum{tokenizer="letters@0"} 3.0' in exposition
    assert 'semid_queue_tokens{tokenizer="letters@0"} 0.0' in exposition

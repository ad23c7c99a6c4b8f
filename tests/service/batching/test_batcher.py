"""Micro-batching, with an encoder whose codes say which content they were made of."""

from __future__ import annotations

import asyncio
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.batching.capacity import Capacity
from service.batching.jobs import Content
from service.errors import EncoderStopped
from service.metrics import Metrics
from tests.service.letters import STEP_S, LetterEncoder, MakeBatcher, batcher_of, hold, queued, row_of, vector


async def test_rows_come_back_in_the_order_of_their_contents(make_batcher: MakeBatcher) -> None:
    batcher, _ = make_batcher()
    contents: list[Content] = ["ccc", "a", vector(1, 2), "bb", vector(7, 3)]

    rows = await batcher.encode(contents)

    assert rows == [row_of(content) for content in contents]


async def test_no_contents_need_no_model(make_batcher: MakeBatcher) -> None:
    batcher, encoder = make_batcher()

    assert await batcher.encode([]) == []
    assert encoder.batches == []


async def test_a_lone_request_waits_for_no_timer(make_batcher: MakeBatcher) -> None:
    batcher, _ = make_batcher()
    await batcher.encode(["warm"])

    durations = []
    for _attempt in range(50):
        started = time.perf_counter()
        await batcher.encode(["lone"])
        durations.append(time.perf_counter() - started)

    # The usual batching delays are 5 ms and more. The fastest, as a busy machine adds delays of its own.
    assert min(durations) < 0.002


async def test_requests_that_arrive_together_are_one_batch_though_the_model_was_idle(make_batcher: MakeBatcher) -> None:
    batcher, encoder = make_batcher()

    await asyncio.gather(*[batcher.encode([content]) for content in ("a", "b", "c")])

    assert [len(batch) for batch in encoder.batches] == [3]


async def test_a_loop_that_ended_before_it_woke_the_worker_keeps_no_other_waiting(make_batcher: MakeBatcher) -> None:
    batcher, _ = make_batcher()

    async def leave() -> None:
        asyncio.get_running_loop().call_soon(asyncio.ensure_future, batcher.encode(["left"]))

    for _ in range(3):
        await asyncio.to_thread(asyncio.run, leave())

    assert await asyncio.wait_for(batcher.encode(["here"]), 10) == [row_of("here")]


async def test_what_gathers_while_the_model_works_is_one_batch(make_batcher: MakeBatcher) -> None:
    batcher, encoder = make_batcher()
    busy = await hold(batcher, encoder)
    waiting = await queued(batcher, ["a"], ["b", "c"], ["d"])

    encoder.free.set()
    rows = await asyncio.gather(*waiting)

    assert [len(batch) for batch in encoder.batches] == [1, 4]
    assert rows == [[row_of("a")], [row_of("b"), row_of("c")], [row_of("d")]]
    assert await busy == [row_of("busy")]


async def test_a_batch_keeps_to_its_budget_of_padded_tokens(make_batcher: MakeBatcher) -> None:
    batcher, encoder = make_batcher(batch_tokens=12)
    busy = await hold(batcher, encoder)
    waiting = await queued(batcher, ["aaa", "bbb", "cccc", "dddd", "eeeee"])

    encoder.free.set()
    await asyncio.gather(busy, *waiting)

    padded = [len(batch) * max(map(len, batch)) for batch in encoder.batches]
    assert [len(batch) for batch in encoder.batches] == [1, 3, 2]
    assert max(padded) <= 12


async def test_a_row_longer_than_the_budget_runs_alone(make_batcher: MakeBatcher) -> None:
    batcher, encoder = make_batcher(batch_tokens=4)

    rows = await batcher.encode(["a" * 9, "b", "c"])

    assert rows[0] == row_of("a" * 9)
    assert [len(batch) for batch in encoder.batches] == [2, 1]


async def test_texts_and_embeddings_are_batches_of_their_own(make_batcher: MakeBatcher) -> None:
    batcher, encoder = make_batcher()
    busy = await hold(batcher, encoder)
    waiting = await queued(batcher, ["a"], [vector(1, 2)], ["b"])

    encoder.free.set()
    rows = await asyncio.gather(*waiting)
    await busy

    assert rows == [[row_of("a")], [row_of(vector(1, 2))], [row_of("b")]]
    assert [len(batch) for batch in encoder.batches] == [1, 2, 1]


async def test_alternatives_are_ranked_for_those_who_ask_in_batches_of_their_own(
    make_batcher: MakeBatcher,
) -> None:
    batcher, encoder = make_batcher()
    busy = await hold(batcher, encoder)
    plain = asyncio.create_task(batcher.encode([vector(1, 2)]))
    ranked = asyncio.create_task(batcher.encode([vector(3, 4)], alternatives=3))
    text = asyncio.create_task(batcher.encode(["b"], alternatives=3))
    while batcher.queued_rows < 3:  # noqa: ASYNC110 - a thread counts
        await asyncio.sleep(0.001)

    encoder.free.set()
    await busy

    assert await plain == [row_of(vector(1, 2))]
    assert [row.alternatives for row in [*await ranked, *await text]] == [(7, 8, 9), (98, 99, 100)]
    assert len(encoder.batches) == 4


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
        assert batcher._capacity.queued_tokens == 0

    asyncio.run(load())


async def test_the_rows_of_a_caller_who_left_never_reach_the_model(make_batcher: MakeBatcher) -> None:
    batcher, encoder = make_batcher()
    busy = await hold(batcher, encoder)
    leaver, stayer = await queued(batcher, ["gone", "gone too"], ["here"])

    leaver.cancel()
    encoder.free.set()

    assert await stayer == [row_of("here")]
    assert await busy == [row_of("busy")]
    assert encoder.batches[1:] == [[[ord(letter) for letter in "here"]]]
    assert batcher._capacity.queued_tokens == 0


async def test_a_caller_who_leaves_while_the_model_works_harms_nobody(make_batcher: MakeBatcher) -> None:
    batcher, encoder = make_batcher()
    busy = await hold(batcher, encoder)

    busy.cancel()
    encoder.free.set()

    assert await batcher.encode(["next"]) == [row_of("next")]
    assert batcher.alive


async def test_stop_finishes_what_is_queued_and_refuses_what_is_new(make_batcher: MakeBatcher) -> None:
    batcher, encoder = make_batcher(batch_tokens=1)
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
    assert 'semid_queue_tokens{lane="small",tokenizer="letters@0"} 0.0' in exposition


def test_the_metrics_tell_the_memory_of_the_process() -> None:
    (line,) = [line for line in Metrics().render().decode().splitlines() if line.startswith("process_resident_memory")]

    assert float(line.split()[1]) > 2**20

"""Rows that fail, and models that die."""

from __future__ import annotations

import asyncio

import pytest

from service.batching.jobs import EncodedRow
from service.errors import EncoderStopped, EncodingFailed
from tests.service.letters import MakeBatcher, hold, queued, row_of


async def test_a_row_that_the_model_fails_on_fails_alone(make_batcher: MakeBatcher) -> None:
    batcher, encoder = make_batcher()
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


async def test_any_number_of_bad_rows_leaves_the_thread_alive(make_batcher: MakeBatcher) -> None:
    batcher, encoder = make_batcher()
    await batcher.encode(["good"])
    encoder.poison = [ord(letter) for letter in "bad"]

    outcomes = await batcher.encode(["bad"] * 20 + ["good"])

    assert [type(outcome) for outcome in outcomes] == [EncodingFailed] * 20 + [EncodedRow]
    assert batcher.alive


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_a_model_that_fails_on_what_it_could_do_before_is_lost(make_batcher: MakeBatcher) -> None:
    batcher, encoder = make_batcher()
    await batcher.encode(["good"])
    encoder.fault = RuntimeError("the device is lost")

    with pytest.raises(EncoderStopped, match="thread has ended"):
        await asyncio.wait_for(batcher.encode(["a", "b"]), 5)

    await asyncio.to_thread(batcher._workers[0].join, 10)
    assert not batcher.alive


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_an_encoder_that_loses_rows_fails_its_callers(make_batcher: MakeBatcher) -> None:
    batcher, encoder = make_batcher()
    encoder.lost_rows = 1

    with pytest.raises(EncoderStopped):
        await asyncio.wait_for(batcher.encode(["a", "b"]), 5)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("fault", [SystemExit("a dying thread"), MemoryError(), RuntimeError("the device is lost")])
async def test_a_dead_thread_answers_everyone_and_is_seen(make_batcher: MakeBatcher, fault: BaseException) -> None:
    batcher, encoder = make_batcher(batch_tokens=1)
    busy = await hold(batcher, encoder)
    waiting = await queued(batcher, *([letter] for letter in "abcdefgh"))
    encoder.fault = fault

    encoder.free.set()
    outcomes = await asyncio.wait_for(asyncio.gather(busy, *waiting, return_exceptions=True), 10)
    await asyncio.to_thread(batcher._workers[0].join, 10)

    assert [type(outcome) for outcome in outcomes] == [EncoderStopped] * 9
    assert not batcher.alive
    with pytest.raises(EncoderStopped, match="thread has ended"):
        await batcher.encode(["late"])

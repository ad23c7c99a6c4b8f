"""Texts that no fast path decides are decided beside the model, and nobody else waits for them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from service.batching.jobs import EncodedRow, Job, Kind
from service.batching.undecided import ROOM
from service.errors import EncodingFailed
from service.metrics import Metrics
from service.telemetry.serving import Part, Serving
from tests.service.letters import LetterEncoder, MakeBatcher, row_of

BULK = [f"text {number}" for number in range(40)]


@pytest.fixture
def make_doubtful(make_batcher: MakeBatcher) -> MakeBatcher:
    """A batcher whose encoder decides no text of a set by itself."""

    def make(doubtful: Sequence[str], **options: object) -> tuple[object, LetterEncoder]:
        batcher, encoder = make_batcher(batch_tokens=1000, **options)
        encoder.doubtful = set(doubtful)
        return batcher, encoder

    return make  # type: ignore[return-value]


async def test_a_listing_waits_for_no_text_that_is_decided_beside_the_model(make_doubtful: MakeBatcher) -> None:
    batcher, encoder = make_doubtful(BULK[:ROOM])
    encoder.deciding.clear()
    bulk = asyncio.create_task(batcher.encode(BULK))

    for _ in range(3):
        assert await asyncio.wait_for(batcher.encode(["listing"]), 10) == [row_of("listing")]
    assert not bulk.done()
    encoder.deciding.set()

    assert await bulk == [row_of(text) for text in BULK]
    assert sorted(encoder.alone) == sorted(BULK[:ROOM])


async def test_a_listing_waits_for_no_other_that_is_decided_beside_the_model(make_doubtful: MakeBatcher) -> None:
    batcher, encoder = make_doubtful(["doubtful"])
    encoder.deciding.clear()
    doubtful = asyncio.create_task(batcher.encode(["doubtful"]))

    assert await asyncio.wait_for(batcher.encode(["listing"]), 10) == [row_of("listing")]
    waited = not doubtful.done()
    encoder.deciding.set()

    assert waited
    assert await doubtful == [row_of("doubtful")]
    assert encoder.alone == ["doubtful"]


async def test_more_than_there_is_room_for_are_decided_all_the_same(make_doubtful: MakeBatcher) -> None:
    metrics = Metrics()
    batcher, encoder = make_doubtful(BULK, metrics=metrics)

    rows = await asyncio.gather(batcher.encode(BULK), batcher.encode(BULK[::-1]))

    assert rows == [[row_of(text) for text in BULK], [row_of(text) for text in BULK[::-1]]]
    assert set(encoder.alone) == set(BULK)
    assert 'path="canonical",tokenizer="letters@0"} 80.0' in metrics.render().decode()


async def test_equal_texts_are_decided_once(make_doubtful: MakeBatcher) -> None:
    batcher, encoder = make_doubtful(["same"])

    assert await batcher.encode(["same"] * 40) == [row_of("same")] * 40
    assert encoder.alone == ["same"]


async def test_a_text_that_cannot_be_decided_fails_alone(make_doubtful: MakeBatcher) -> None:
    batcher, _ = make_doubtful(["wrong"])

    *others, failed = await batcher.encode([*BULK, "wrong"])

    assert others == [row_of(text) for text in BULK]
    assert isinstance(failed, EncodingFailed)
    assert isinstance((await batcher.encode(["after"]))[0], EncodedRow)


async def test_what_nobody_waits_for_any_more_is_not_decided(make_doubtful: MakeBatcher) -> None:
    batcher, encoder = make_doubtful(BULK[:ROOM])
    encoder.deciding.clear()
    bulk = asyncio.create_task(batcher.encode(BULK))
    await asyncio.to_thread(encoder.entered.acquire, timeout=10)
    await batcher.encode(["behind it"])
    bulk.cancel()
    await asyncio.wait([bulk])
    encoder.deciding.set()

    await batcher.stop()

    assert len(encoder.alone) <= 1


async def test_a_service_that_stops_decides_what_is_under_way(make_doubtful: MakeBatcher) -> None:
    batcher, encoder = make_doubtful(BULK[:2])
    encoder.deciding.clear()
    bulk = asyncio.create_task(batcher.encode(BULK))
    await asyncio.to_thread(encoder.entered.acquire, timeout=10)
    stopping = asyncio.create_task(batcher.stop())
    await asyncio.sleep(0)
    encoder.deciding.set()
    await stopping

    assert await bulk == [row_of(text) for text in BULK]


async def test_no_request_is_told_that_it_waited_for_less_than_nothing() -> None:
    job = Job(Kind(is_text=True, alternatives=0), [[1], [2]], asyncio.get_running_loop().create_future())
    job.encoded_at = job.queued_at + 1.0
    for side_by_side_s in (0.75, 0.5):
        job.took(side_by_side_s)
    serving = Serving("request")

    job.tell(serving)

    assert serving.seconds == {Part.QUEUE: 0.0, Part.MODEL: pytest.approx(1.0)}

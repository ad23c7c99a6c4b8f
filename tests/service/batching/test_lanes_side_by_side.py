"""On processors small requests have turns of their own: they go beside bulk, and before it where both want a core."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import AsyncIterator

import pytest

from models import Encoding
from service.batching.batcher import TIMES_ALONE, Batcher
from service.batching.capacity import Capacity
from service.batching.lanes import NICER
from tests.service.letters import LetterEncoder, batcher_of, queued, row_of, vector

FEED = ["f" * 10] * 60
LISTING = ["new"]


class HeldFeeds(LetterEncoder):
    """Feeds, which begin with an f, are encoded while they are let; the niceness of who encodes is noted."""

    def __init__(self) -> None:
        super().__init__()
        self.feeding = threading.Event()
        self.feed_on = threading.Event()
        self.feeds = 0
        self.most_feeds = 0
        self.niceness: dict[str, int] = {}

    def _encode(self, contents: list[list[object]], codes: list[tuple[int, int]], alternatives: int) -> Encoding:
        of_feed = contents[0][0] == ord("f")
        self.niceness["bulk" if of_feed else "small"] = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        if of_feed:
            self.feeds += 1
            self.most_feeds = max(self.most_feeds, self.feeds)
            self.feeding.set()
            assert self.feed_on.wait(30)
        try:
            return super()._encode(contents, codes, alternatives)
        finally:
            self.feeds -= of_feed


@pytest.fixture
def encoder() -> HeldFeeds:
    return HeldFeeds()


@pytest.fixture
async def batchers(encoder: HeldFeeds) -> AsyncIterator[list[Batcher]]:
    """Two models that share the machine, side by side in lanes."""
    capacity = Capacity(100_000, side_by_side=True)
    made = [batcher_of(encoder, 100, capacity) for _ in range(2)]
    for batcher in made:
        batcher.start()
    yield made
    encoder.feed_on.set()
    for batcher in made:
        await batcher.stop()


async def feeding(batcher: Batcher, encoder: HeldFeeds) -> asyncio.Task[object]:
    """A feed whose first batch is in the model, and stays there."""
    feed = asyncio.create_task(batcher.encode(FEED))
    assert await asyncio.to_thread(encoder.feeding.wait, 10)
    return feed


async def test_a_listing_is_answered_while_a_batch_of_a_feed_is_in_the_model(
    batchers: list[Batcher], encoder: HeldFeeds
) -> None:
    feed = await feeding(batchers[0], encoder)

    of_the_same, of_another = await asyncio.wait_for(
        asyncio.gather(*(batcher.encode(LISTING) for batcher in batchers)), 10
    )
    waited = not feed.done()
    encoder.feed_on.set()

    assert of_the_same == of_another == [row_of("new")]
    assert waited
    assert await feed == [row_of("f" * 10)] * 60


async def test_feeds_of_two_models_go_one_after_the_other(batchers: list[Batcher], encoder: HeldFeeds) -> None:
    first = await feeding(batchers[0], encoder)
    (second,) = await queued(batchers[1], FEED)
    await asyncio.wait_for(batchers[1].encode(LISTING), 10)  # the other model could have begun by now
    encoder.feed_on.set()

    await asyncio.gather(first, second)

    assert encoder.most_feeds == 1


@pytest.mark.skipif(sys.platform != "linux", reason="threads have a niceness of their own on Linux alone")
async def test_bulk_leaves_the_processors_to_all_others(batchers: list[Batcher], encoder: HeldFeeds) -> None:
    feed = await feeding(batchers[0], encoder)
    await batchers[0].encode(LISTING)
    encoder.feed_on.set()
    await feed

    assert encoder.niceness["small"] == os.getpriority(os.PRIO_PROCESS, 0)
    assert encoder.niceness["bulk"] == min(19, encoder.niceness["small"] + NICER)


async def test_a_feed_of_texts_does_not_keep_a_few_embeddings_from_the_model(
    batchers: list[Batcher], encoder: HeldFeeds
) -> None:
    feed = await feeding(batchers[0], encoder)

    soon = batchers[0].encodes_soon
    row = await asyncio.wait_for(batchers[0].encode([vector(1, 2)]), 10)
    encoder.feed_on.set()
    await feed

    assert soon
    assert row == [row_of(vector(1, 2))]


async def test_batches_of_bulk_are_long_as_no_listing_waits_for_them(encoder: HeldFeeds) -> None:
    capacity = Capacity(100_000, side_by_side=True)
    batcher = batcher_of(encoder, 4096, capacity, batch_s=0.1)
    batcher._paces[True].tokens_per_s = 5_000.0
    encoder.feed_on.set()
    batcher.start()
    await batcher.encode(LISTING)

    await batcher.encode(["f" * 10] * 300)
    await batcher.stop()

    assert len(encoder.batches[1]) == pytest.approx(50 * TIMES_ALONE, abs=20)  # the listing moved the pace


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_both_lanes_end_with_the_model(batchers: list[Batcher], encoder: HeldFeeds) -> None:
    dying, other = batchers
    feed = await feeding(dying, encoder)
    encoder.fault = SystemExit("a dying thread")
    encoder.feed_on.set()
    outcomes = await asyncio.wait_for(asyncio.gather(feed, return_exceptions=True), 10)
    encoder.fault = None

    for worker in dying._workers:
        await asyncio.to_thread(worker.join, 10)

    assert type(outcomes[0]).__name__ == "EncoderStopped"
    assert not any(worker.is_alive() for worker in dying._workers)
    assert await other.encode(LISTING) == [row_of("new")]

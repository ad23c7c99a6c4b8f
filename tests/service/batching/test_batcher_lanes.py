"""Small requests beside bulk: who overtakes whom, who is refused, and that nobody starves."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest

from service.batching.batcher import MIN_BATCH_TOKENS, SPLIT_TEXTS, TIMES_ALONE, Batcher, Pace
from service.batching.capacity import ALONE_AFTER_S, Capacity
from service.batching.lanes import SMALL_ROWS, Lane
from service.errors import Overloaded
from tests.service.letters import STEP_S, LetterEncoder, MakeBatcher, batcher_of, hold, queued, row_of

FEED = ["f" * 10] * 60  # far too much for one batch of 100 tokens
LISTING = ["new"]


def letters(batch: Sequence[Sequence[int]]) -> set[str]:
    """Which letters the texts of a batch begin with."""
    return {chr(row[0]) for row in batch}


async def test_a_single_listing_overtakes_a_feed_that_is_queued(make_batcher: MakeBatcher) -> None:
    batcher, encoder = make_batcher(queue_tokens=10_000, batch_takes_s=0.01)
    busy = await hold(batcher, encoder)
    feeds = await queued(batcher, FEED, FEED, FEED)
    (listing,) = await queued(batcher, LISTING)

    encoder.free.set()

    assert await listing == [row_of("new")]
    await asyncio.gather(busy, *feeds)
    assert [letters(batch) for batch in encoder.batches[:3]] == [{"b"}, {"n"}, {"f"}]
    assert [len(batch) for batch in encoder.batches[2:]] == [10] * 18


async def test_small_requests_that_wait_go_together(make_batcher: MakeBatcher) -> None:
    batcher, encoder = make_batcher(batch_takes_s=0.01)
    busy = await hold(batcher, encoder)
    (feed,) = await queued(batcher, FEED)
    listings = await queued(batcher, *[LISTING] * 8)

    encoder.free.set()
    await asyncio.gather(busy, feed, *listings)

    assert letters(encoder.batches[1]) == {"n"}
    assert len(encoder.batches[1]) == 8


async def test_feeds_share_the_model_in_turns(make_batcher: MakeBatcher) -> None:
    batcher, encoder = make_batcher()
    busy = await hold(batcher, encoder)
    feeds = await queued(batcher, ["f" * 10] * 60, ["g" * 10] * 20)

    encoder.free.set()
    await asyncio.gather(busy, *feeds)

    assert [letters(batch) for batch in encoder.batches[1:]] == [{"f"}, {"g"}, {"f"}, {"g"}, {"f"}, {"f"}, {"f"}, {"f"}]


async def test_a_feed_goes_on_whatever_number_of_small_requests_come(make_batcher: MakeBatcher) -> None:
    batcher, encoder = make_batcher(batch_tokens=30, queue_tokens=10_000, batch_takes_s=1.0)
    busy = await hold(batcher, encoder)
    (feed,) = await queued(batcher, FEED)
    listings = await queued(batcher, *[["n" * 10] * SMALL_ROWS] * 12)

    encoder.free.set()
    await asyncio.gather(busy, feed, *listings)

    order = "".join(letters(batch).pop() for batch in encoder.batches[1:])
    while_both_wait = order[: 1 + min(order.rindex("n"), order.rindex("f"))]
    assert while_both_wait.count("f") == pytest.approx(len(while_both_wait) / 4, abs=1)
    assert "nnnnn" not in while_both_wait


async def test_a_small_request_goes_first_whatever_small_ones_had_before(make_batcher: MakeBatcher) -> None:
    batcher, encoder = make_batcher(batch_tokens=30, queue_tokens=10_000, batch_takes_s=0.1)
    for _ in range(100):  # ten seconds of it, with nobody else there
        await batcher.encode(LISTING)
    busy = await hold(batcher, encoder)
    (feed,) = await queued(batcher, FEED)
    (listing,) = await queued(batcher, LISTING)
    before = len(encoder.batches)

    encoder.free.set()
    await asyncio.gather(busy, feed, listing)

    assert letters(encoder.batches[before]) == {"n"}


async def test_a_lane_in_which_nobody_waited_saves_nothing_up(make_batcher: MakeBatcher) -> None:
    batcher, encoder = make_batcher(batch_tokens=30, queue_tokens=10_000, batch_takes_s=1.0)
    await batcher.encode(FEED)  # twenty seconds of bulk alone: small requests are owed sixty now, or nothing
    busy = await hold(batcher, encoder)
    (feed,) = await queued(batcher, FEED)
    listings = await queued(batcher, *[["n" * 10] * SMALL_ROWS] * 12)
    before = len(encoder.batches)

    encoder.free.set()
    await asyncio.gather(busy, feed, *listings)

    order = "".join(letters(batch).pop() for batch in encoder.batches[before:])
    assert "f" in order[:6]


async def test_small_requests_overtake_the_feed_of_another_model_too() -> None:
    capacity = Capacity(100_000, clock=lambda: 0.01 * len(order))
    fed, other, asked = LetterEncoder(), LetterEncoder(), LetterEncoder()
    batchers = [batcher_of(encoder, 100, capacity) for encoder in (fed, other, asked)]
    order: list[str] = []
    for name, encoder in (("fed", fed), ("other", other), ("asked", asked)):
        work = encoder._encode
        encoder._encode = lambda *rows, name=name, work=work: order.append(name) or work(*rows)
    for batcher in batchers:
        batcher.start()
    busy = await hold(batchers[0], fed)
    feeds = [*(await queued(batchers[0], FEED)), *(await queued(batchers[1], FEED))]
    await asyncio.sleep(STEP_S)  # the other model's feed waits for its turn before the listing comes
    (listing,) = await queued(batchers[2], LISTING)
    await asyncio.sleep(STEP_S)

    fed.free.set()
    await asyncio.gather(busy, listing, *feeds)
    for batcher in batchers:
        await batcher.stop()

    assert order[:3] == ["fed", "asked", "other"]


async def test_bulk_that_fills_the_queue_leaves_room_for_small_requests(make_batcher: MakeBatcher) -> None:
    batcher, encoder = make_batcher(queue_tokens=1000)
    busy = await hold(batcher, encoder)
    feeds = await queued(batcher, FEED, FEED)  # 1,200 tokens: beyond the bound, as any room takes any one request

    with pytest.raises(Overloaded) as refusal:
        await batcher.encode(FEED)
    listings = await queued(batcher, *[["n" * 10]] * 13)
    with pytest.raises(Overloaded):
        await batcher.encode(LISTING)
    encoder.free.set()

    assert "1200 tokens" in refusal.value.detail
    assert await asyncio.gather(*listings) == [[row_of("n" * 10)]] * 13
    await asyncio.gather(busy, *feeds)


async def test_bulk_is_refused_before_it_takes_the_room_of_small_requests(make_batcher: MakeBatcher) -> None:
    batcher, encoder = make_batcher(queue_tokens=1000)
    busy = await hold(batcher, encoder)
    feeds = await queued(batcher, ["f" * 10] * 88)

    with pytest.raises(Overloaded):
        await batcher.encode(FEED)
    listings = await queued(batcher, *[["n" * 10]] * 12)
    encoder.free.set()

    await asyncio.gather(busy, *feeds, *listings)


async def test_small_requests_may_use_all_the_room_that_bulk_leaves(make_batcher: MakeBatcher) -> None:
    batcher, encoder = make_batcher(queue_tokens=1000)
    busy = await hold(batcher, encoder)
    listings = await queued(batcher, *[["n" * 100]] * 10)

    with pytest.raises(Overloaded):
        await batcher.encode(LISTING)
    encoder.free.set()

    await asyncio.gather(busy, *listings)


async def test_who_is_refused_is_told_the_time_that_its_own_lane_takes(make_batcher: MakeBatcher) -> None:
    batcher, encoder = make_batcher(queue_tokens=1000)
    busy = await hold(batcher, encoder)
    batcher._paces[True].tokens_per_s = 100.0
    feeds = await queued(batcher, FEED, FEED)
    listings = await queued(batcher, *[["n" * 25]] * 5)

    with pytest.raises(Overloaded) as small:
        await batcher.encode(LISTING)
    with pytest.raises(Overloaded) as bulk:
        await batcher.encode(FEED)
    encoder.free.set()

    assert small.value.retry_after_s == pytest.approx(1.25 / 0.75)  # three quarters of the model, while bulk waits
    assert bulk.value.retry_after_s == pytest.approx(12 + 1.25)  # all of it, once the small ones are done
    await asyncio.gather(busy, *feeds, *listings)


class Steady(Pace):
    """A pace that was measured, and stays: how long this machine takes here says nothing."""

    def measure(self, tokens: int, elapsed_s: float) -> None:
        pass


async def test_a_batch_takes_no_longer_than_set_by_the_measured_pace(make_batcher: MakeBatcher) -> None:
    batcher, encoder = make_batcher(batch_tokens=4096, queue_tokens=10**6, batch_s=0.1)
    busy = await hold(batcher, encoder)
    batcher._paces[True] = Steady(5_000.0)
    (feed,) = await queued(batcher, ["f" * 10] * 300)

    encoder.free.set()
    await asyncio.gather(busy, feed)

    assert len(encoder.batches[1]) == 50


async def test_bulk_that_has_been_alone_for_long_has_longer_batches(make_batcher: MakeBatcher) -> None:
    batcher, encoder = make_batcher(batch_tokens=4096, queue_tokens=10**6, batch_s=0.1)
    busy = await hold(batcher, encoder)
    batcher._paces[True] = Steady(5_000.0)
    (feed,) = await queued(batcher, ["f" * 10] * 300)
    batcher._capacity._small_at -= ALONE_AFTER_S

    encoder.free.set()
    await asyncio.gather(busy, feed)

    assert len(encoder.batches[1]) == 50 * TIMES_ALONE


async def test_a_slow_model_has_batches_that_are_worth_its_while(make_batcher: MakeBatcher) -> None:
    batcher, encoder = make_batcher(batch_tokens=4096, queue_tokens=10**6, batch_s=0.1)
    busy = await hold(batcher, encoder)
    batcher._paces[True] = Steady(5.0)
    (feed,) = await queued(batcher, ["f" * 16] * 300)

    encoder.free.set()
    await asyncio.gather(busy, feed)

    assert len(encoder.batches[1]) == MIN_BATCH_TOKENS / 16


def test_the_pace_follows_the_model_by_its_time_not_by_the_number_of_batches() -> None:
    pace = Pace(5_000.0)

    for _ in range(100):
        pace.measure(1, 0.001)
    after_many_short_ones = pace.tokens_per_s
    pace.measure(60_000, 6.0)

    assert 4_500 < after_many_short_ones < 5_000
    assert 9_500 < pace.tokens_per_s < 10_000


class HeldSplitter(LetterEncoder):
    """Splits what begins with an f only while it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.splitting = threading.Event()
        self.split_on = threading.Event()
        self.split_texts: list[int] = []

    def split(self, texts: Sequence[str]) -> list[list[int]]:
        if texts[0].startswith("f"):
            self.split_texts.append(len(texts))
            self.splitting.set()
            assert self.split_on.wait(30)
        return super().split(texts)


async def started(encoder: LetterEncoder) -> Batcher:
    batcher = batcher_of(encoder, 100, Capacity(100_000))
    batcher.start()
    return batcher


async def test_a_single_listing_does_not_wait_for_the_word_pieces_of_a_feed() -> None:
    encoder = HeldSplitter()
    batcher = await started(encoder)
    feed = asyncio.create_task(batcher.encode(FEED))
    assert await asyncio.to_thread(encoder.splitting.wait, 10)

    listing = await asyncio.wait_for(batcher.encode(LISTING), 10)
    encoder.split_on.set()

    assert listing == [row_of("new")]
    assert await feed == [row_of("f" * 10)] * 60
    await batcher.stop()


async def test_the_word_pieces_of_a_feed_are_split_some_at_a_time_and_no_more_once_its_caller_left() -> None:
    encoder = HeldSplitter()
    batcher = await started(encoder)
    gone = asyncio.create_task(batcher.encode(["f"] * (3 * SPLIT_TEXTS + 1)))
    assert await asyncio.to_thread(encoder.splitting.wait, 10)

    gone.cancel()
    encoder.split_on.set()
    stays = await batcher.encode(["f"] * (2 * SPLIT_TEXTS + 1))
    await batcher.stop()

    assert encoder.split_texts == [SPLIT_TEXTS, SPLIT_TEXTS, SPLIT_TEXTS, 1]
    assert len(stays) == 2 * SPLIT_TEXTS + 1


async def test_queue_metrics_tell_the_lanes_apart(make_batcher: MakeBatcher) -> None:
    batcher, encoder = make_batcher()
    busy = await hold(batcher, encoder)
    waiting = await queued(batcher, FEED, LISTING)
    depth = {lane: gauge._value.get() for lane, gauge in batcher._metrics.queue_tokens.items()}

    encoder.free.set()
    await asyncio.gather(busy, *waiting)

    assert depth == {Lane.SMALL: 3, Lane.BULK: 600}

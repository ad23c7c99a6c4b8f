"""Who is next in a lane: in turns or in the order of coming, batch by batch, kind by kind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.batching.jobs import Job, Kind, Row, rows_of
from service.batching.lanes import SMALL_ROWS, SMALL_TOKENS, Lane, LaneQueue, lane_of

TEXT = Kind(is_text=True, alternatives=0)


@contextmanager
def jobs() -> Iterator[Callable[..., list[Row]]]:
    """Makes the rows of jobs: a number is a text of so many word pieces, None an embedding."""
    loop = asyncio.new_event_loop()

    def rows(*contents: int | None, alternatives: int = 0) -> list[Row]:
        job = Job(loop.create_future(), [None] * len(contents), len(contents))
        embedding = np.zeros(3, dtype=np.float32)
        return rows_of(job, [embedding if tokens is None else [0] * tokens for tokens in contents], alternatives)

    yield rows
    loop.close()


@pytest.fixture
def make_rows() -> Iterator[Callable[..., list[Row]]]:
    with jobs() as make:
        yield make


def batches(queue: LaneQueue, budget: int) -> list[list[Row]]:
    """All that waits, batch by batch."""
    taken = []
    while queue:
        taken.append(queue.take(lambda _: budget))
    return taken


def test_a_request_is_small_by_rows_and_tokens_and_a_lone_text_always(make_rows: Callable[..., list[Row]]) -> None:
    assert lane_of(make_rows(*[SMALL_TOKENS // SMALL_ROWS] * SMALL_ROWS)) is Lane.SMALL
    assert lane_of(make_rows(10 * SMALL_TOKENS)) is Lane.SMALL
    assert lane_of(make_rows(SMALL_TOKENS, 1)) is Lane.BULK
    assert lane_of(make_rows(*[1] * (SMALL_ROWS + 1))) is Lane.BULK
    assert lane_of(make_rows(*[None] * SMALL_ROWS)) is Lane.SMALL


def test_jobs_in_turns_have_equal_shares_whatever_their_size(make_rows: Callable[..., list[Row]]) -> None:
    queue = LaneQueue(in_turns=True)
    feed, page = make_rows(*[5] * 40), make_rows(*[5] * 6)
    queue.add(feed)
    queue.add(page)

    order = ["feed" if batch[0].job is feed[0].job else "page" for batch in batches(queue, budget=10)]

    assert order[:6] == ["feed", "page"] * 3
    assert order[6:] == ["feed"] * 17


def test_without_turns_the_first_job_is_done_before_the_next(make_rows: Callable[..., list[Row]]) -> None:
    queue = LaneQueue(in_turns=False)
    first, second = make_rows(*[5] * 4), make_rows(*[5] * 4)
    queue.add(first)
    queue.add(second)

    assert batches(queue, budget=10) == [first[:2], first[2:], second[:2], second[2:]]


def test_what_a_job_leaves_free_of_its_batch_goes_to_the_next(make_rows: Callable[..., list[Row]]) -> None:
    queue = LaneQueue(in_turns=True)
    few, many = make_rows(5), make_rows(*[5] * 5)
    queue.add(few)
    queue.add(many)

    assert batches(queue, budget=20) == [few + many[:3], many[3:]]


def test_a_job_that_filled_up_anothers_batch_keeps_its_own_turn(make_rows: Callable[..., list[Row]]) -> None:
    queue = LaneQueue(in_turns=True)
    few, second, third = make_rows(5), make_rows(*[5] * 6), make_rows(*[5] * 4)
    for rows in (few, second, third):
        queue.add(rows)

    assert batches(queue, budget=10) == [few + second[:1], second[1:3], third[:2], second[3:5], third[2:], second[5:]]


@pytest.mark.parametrize("in_turns", [True, False])
def test_kinds_do_not_mix_and_none_is_passed_over(make_rows: Callable[..., list[Row]], in_turns: bool) -> None:  # noqa: FBT001
    queue = LaneQueue(in_turns=in_turns)
    texts, embeddings, ranked = make_rows(2, 2, 2), make_rows(None, None), make_rows(2, alternatives=16)
    for rows in (texts, embeddings, ranked):
        queue.add(rows)
    later = make_rows(2)
    queue.add(later)

    taken = batches(queue, budget=6)

    assert taken == [texts, embeddings, ranked, later]


def test_one_job_of_two_kinds_is_two_batches_and_the_shortest_rows_come_first(
    make_rows: Callable[..., list[Row]],
) -> None:
    queue = LaneQueue(in_turns=True)
    mixed = make_rows(4, None, 2, 3)
    queue.add(mixed)

    assert batches(queue, budget=100) == [[mixed[2], mixed[3], mixed[0]], [mixed[1]]]


@given(
    sizes=st.lists(st.lists(st.integers(1, 12) | st.none(), min_size=1, max_size=9), min_size=1, max_size=8),
    leaving=st.sets(st.integers(0, 7)),
    budget=st.integers(1, 30),
    in_turns=st.booleans(),
    searched=st.booleans(),
)
def test_every_row_of_those_who_stay_is_taken_once_and_the_count_is_right(
    sizes: list[list[int | None]],
    leaving: set[int],
    budget: int,
    in_turns: bool,  # noqa: FBT001
    searched: bool,  # noqa: FBT001
) -> None:
    with jobs() as make:
        queue = LaneQueue(in_turns=in_turns)
        requests = [make(*contents) for contents in sizes]
        for rows in requests:
            queue.add(rows)
        everything = [row for rows in requests for row in rows]
        counted = (queue.tokens, queue.rows)
        for place in leaving & set(range(len(requests))):
            requests[place][0].job.future.cancel()
        if searched:
            queue.forget_leavers()

        taken = batches(queue, budget)

        stayed = [row for row in everything if not row.job.left]
        assert counted == (sum(row.tokens for row in everything), len(everything))
        assert sorted(id(row) for batch in taken for row in batch) == sorted(map(id, stayed))
        assert (queue.tokens, queue.rows, dict(queue.tokens_by_kind)) == (0, 0, {})
        for batch in taken:
            assert len({row.kind for row in batch}) <= 1
            assert len(batch) <= 1 or len(batch) * max(row.tokens for row in batch) <= budget


def test_rows_of_those_who_left_count_no_longer_once_searched_for(make_rows: Callable[..., list[Row]]) -> None:
    queue = LaneQueue(in_turns=True)
    gone, here = make_rows(7, None), make_rows(3)
    queue.add(gone)
    queue.add(here)
    gone[0].job.future.cancel()

    queue.forget_leavers()

    assert (queue.tokens, queue.rows, queue.tokens_by_kind) == (3, 1, {TEXT: 3})

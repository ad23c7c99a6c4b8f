"""Who is next in a lane: in turns or in the order of coming, batch by batch, kind by kind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.batching.jobs import Batch, Job, Kind, Span
from service.batching.lanes import SMALL_ROWS, SMALL_TOKENS, Lane, LaneQueue, lane_of

TEXT, EMBEDDING = Kind(is_text=True, alternatives=0), Kind(is_text=False, alternatives=0)

Taken = list[tuple[Job, int, int]]


@contextmanager
def jobs() -> Iterator[Callable[..., Job]]:
    """Makes jobs: of texts by their numbers of word pieces, or of so many embeddings."""
    loop = asyncio.new_event_loop()

    def texts(*lengths: int, embeddings: int = 0, alternatives: int = 0) -> Job:
        contents = np.zeros((embeddings, 3), np.float32) if embeddings else [[0] * length for length in sorted(lengths)]
        return Job(Kind(not embeddings, alternatives), contents, loop.create_future())

    yield texts
    loop.close()


@pytest.fixture
def make_job() -> Iterator[Callable[..., Job]]:
    with jobs() as make:
        yield make


def batches(queue: LaneQueue, budget: int) -> list[Batch]:
    """All that waits, batch by batch."""
    taken = []
    while queue:
        batch = queue.take(lambda _: budget)
        taken += [batch] if batch else []
    return taken


def spans(queue: LaneQueue, budget: int) -> list[Taken]:
    """The same as the rows of jobs."""
    return [[tuple(span) for span in batch.spans] for batch in batches(queue, budget)]


def test_a_request_is_small_by_rows_and_tokens_and_a_lone_text_always(make_job: Callable[..., Job]) -> None:
    assert lane_of(make_job(*[SMALL_TOKENS // SMALL_ROWS] * SMALL_ROWS)) is Lane.SMALL
    assert lane_of(make_job(10 * SMALL_TOKENS)) is Lane.SMALL
    assert lane_of(make_job(SMALL_TOKENS, 1)) is Lane.BULK
    assert lane_of(make_job(*[1] * (SMALL_ROWS + 1))) is Lane.BULK
    assert lane_of(make_job(embeddings=SMALL_ROWS)) is Lane.SMALL


def test_jobs_in_turns_have_equal_shares_whatever_their_size(make_job: Callable[..., Job]) -> None:
    queue = LaneQueue(in_turns=True)
    feed, page = make_job(*[5] * 40), make_job(*[5] * 6)
    queue.add(feed)
    queue.add(page)

    order = ["feed" if batch.jobs == {feed} else "page" for batch in batches(queue, budget=10)]

    assert order[:6] == ["feed", "page"] * 3
    assert order[6:] == ["feed"] * 17


def test_without_turns_the_first_job_is_done_before_the_next(make_job: Callable[..., Job]) -> None:
    queue = LaneQueue(in_turns=False)
    first, second = make_job(*[5] * 4), make_job(*[5] * 4)
    queue.add(first)
    queue.add(second)

    assert spans(queue, budget=10) == [[(first, 0, 2)], [(first, 2, 4)], [(second, 0, 2)], [(second, 2, 4)]]


def test_what_a_job_leaves_free_of_its_batch_goes_to_the_next(make_job: Callable[..., Job]) -> None:
    queue = LaneQueue(in_turns=True)
    few, many = make_job(5), make_job(*[5] * 5)
    queue.add(few)
    queue.add(many)

    assert spans(queue, budget=20) == [[(few, 0, 1), (many, 0, 3)], [(many, 3, 5)]]


def test_a_job_that_filled_up_anothers_batch_keeps_its_own_turn(make_job: Callable[..., Job]) -> None:
    queue = LaneQueue(in_turns=True)
    few, second, third = make_job(5), make_job(*[5] * 6), make_job(*[5] * 4)
    for job in (few, second, third):
        queue.add(job)

    assert spans(queue, budget=10) == [
        [(few, 0, 1), (second, 0, 1)],
        [(second, 1, 3)],
        [(third, 0, 2)],
        [(second, 3, 5)],
        [(third, 2, 4)],
        [(second, 5, 6)],
    ]


@pytest.mark.parametrize("in_turns", [True, False])
def test_kinds_do_not_mix_and_none_is_passed_over(make_job: Callable[..., Job], in_turns: bool) -> None:  # noqa: FBT001
    queue = LaneQueue(in_turns=in_turns)
    texts, embeddings, ranked, later = (
        make_job(2, 2, 2),
        make_job(embeddings=2),
        make_job(2, alternatives=16),
        make_job(2),
    )
    for job in (texts, embeddings, ranked, later):
        queue.add(job)

    taken = batches(queue, budget=6)

    assert [batch.jobs for batch in taken] == [{texts}, {embeddings}, {ranked}, {later}]
    assert [batch.kind for batch in taken] == [TEXT, EMBEDDING, Kind(True, 16), TEXT]


def test_a_batch_keeps_to_the_padding_that_its_longest_row_costs(make_job: Callable[..., Job]) -> None:
    queue = LaneQueue(in_turns=False)
    short, long = make_job(1, 2, 2), make_job(4, 9)
    queue.add(short)
    queue.add(long)

    assert spans(queue, budget=12) == [[(short, 0, 3)], [(long, 0, 1)], [(long, 1, 2)]]


@given(
    sizes=st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=9) | st.integers(1, 9), min_size=1, max_size=8),
    leaving=st.sets(st.integers(0, 7)),
    budget=st.integers(1, 30),
    in_turns=st.booleans(),
    searched=st.booleans(),
)
def test_every_row_of_those_who_stay_is_taken_once_and_the_count_is_right(
    sizes: list[list[int] | int],
    leaving: set[int],
    budget: int,
    in_turns: bool,  # noqa: FBT001
    searched: bool,  # noqa: FBT001
) -> None:
    with jobs() as make:
        queue = LaneQueue(in_turns=in_turns)
        requests = [make(embeddings=size) if isinstance(size, int) else make(*size) for size in sizes]
        for job in requests:
            queue.add(job)
        counted = (queue.tokens, queue.rows)
        for place in leaving & set(range(len(requests))):
            requests[place].future.cancel()
        if searched:
            queue.forget_leavers()

        taken = batches(queue, budget)

        assert counted == (sum(job.tokens() for job in requests), sum(job.rows for job in requests))
        assert (queue.tokens, queue.rows, dict(queue.tokens_by_kind)) == (0, 0, {})
        rows = [(job, place) for batch in taken for job, start, stop in batch.spans for place in range(start, stop)]
        assert sorted(rows, key=lambda row: (id(row[0]), row[1])) == sorted(
            ((job, place) for job in requests if not job.left for place in range(job.rows)),
            key=lambda row: (id(row[0]), row[1]),
        )
        for batch in taken:
            assert {job.kind for job in batch.jobs} == {batch.kind}
            lengths = [job.length(place) for job, start, stop in batch.spans for place in range(start, stop)]
            assert batch.rows == len(lengths)
            assert batch.tokens == sum(lengths)
            assert len(lengths) == 1 or len(lengths) * max(lengths) <= budget


def test_a_batch_is_halved_across_its_jobs(make_job: Callable[..., Job]) -> None:
    first, second, third = make_job(1), make_job(2, 3, 4), make_job(5)
    batch = Batch(TEXT, [Span(first, 0, 1), Span(second, 0, 3), Span(third, 0, 1)])

    one, other = batch.halves()

    assert [tuple(span) for span in one.spans] == [(first, 0, 1), (second, 0, 1)]
    assert [tuple(span) for span in other.spans] == [(second, 1, 3), (third, 0, 1)]
    assert [len(pieces) for half in (one, other) for pieces in half.contents()] == [1, 2, 3, 4, 5]


def test_rows_of_those_who_left_count_no_longer_once_searched_for(make_job: Callable[..., Job]) -> None:
    queue = LaneQueue(in_turns=True)
    gone, here = make_job(7, 1), make_job(3)
    queue.add(gone)
    queue.add(here)
    gone.future.cancel()

    queue.forget_leavers()

    assert (queue.tokens, queue.rows, queue.tokens_by_kind) == (3, 1, {TEXT: 3})

"""What is sent behind comes last, and not so far behind where that starves it."""

from __future__ import annotations

import threading

from models.native.niceness import LAST, behind, send_behind


def steps_of(durations: list[tuple[float, float]], steps: int) -> list[int]:
    """By which each of several pieces of work is done; of each how long it takes, and how long none follows."""
    times, found = [0.0], []

    def work(by: int) -> None:
        found.append(by)
        times.append(times[-1] + durations[len(found) - 1][0])

    def thread() -> None:
        send_behind(steps)
        for _, pause in durations:
            behind(work, clock=lambda: times[-1])
            times.append(times[-1] + pause)

    asking = threading.Thread(target=thread)
    asking.start()
    asking.join()
    return found


def test_it_comes_last_while_that_costs_it_little() -> None:
    assert steps_of([(0.1, 0), (0.9, 5), (0.1, 0)], 12) == [LAST] * 3


def test_where_it_starves_it_is_nicer_for_ten_times_as_long_and_then_last_again() -> None:
    durations = [(2.0, 1.0), (3.0, 1.0), (0.1, 14.8), (0.1, 0.1), (0.1, 0.0)]

    assert steps_of(durations, 12) == [LAST, 12, 12, 12, LAST]


def test_where_it_starves_again_it_is_nicer_for_longer() -> None:
    durations = [(2.0, 21.0), (2.0, 39.0), (0.1, 1.0), (0.1, 0.0), (2.0, 19.0), (0.1, 0.0)]

    assert steps_of(durations, 12) == [LAST, LAST, 12, LAST, LAST, 12]


def test_who_was_not_sent_behind_works_itself() -> None:
    assert behind(lambda steps: steps) == 0

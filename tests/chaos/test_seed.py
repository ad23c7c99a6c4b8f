"""The seed decides which faults come and what is asked."""

from __future__ import annotations

from itertools import islice

import pytest

from tests.chaos.schedule import KILL_PRIMARY, KINDS, QUIET_S, schedule
from tests.chaos.workload import CONTENTS_OF_AN_ITEM, contents_of, workload


def test_the_same_seed_gives_the_same_faults() -> None:
    assert schedule(7, 300) == schedule(7, 300)
    assert schedule(7, 300) != schedule(8, 300)


def test_a_longer_run_begins_as_a_shorter_one() -> None:
    shorter = schedule(7, 30)

    assert schedule(7, 300)[: len(shorter)] == shorter


@pytest.mark.parametrize("seed", range(20))
def test_all_kinds_of_faults_come_in_a_short_run(seed: int) -> None:
    faults = schedule(seed, 30)

    assert {fault.kind for fault in faults} == {*KINDS}
    assert all(fault.at_s <= 30 - QUIET_S for fault in faults)


def test_only_the_faults_that_are_asked_for_come() -> None:
    assert {fault.kind for fault in schedule(7, 30, [KILL_PRIMARY])} == {KILL_PRIMARY}


def test_the_same_seed_gives_each_client_the_same_requests() -> None:
    first = [*islice(workload(7, 0, 4), 500)]

    assert [*islice(workload(7, 0, 4), 500)] == first
    assert [*islice(workload(7, 1, 4), 500)] != first
    assert [*islice(workload(8, 0, 4), 500)] != first


def test_the_requests_are_of_all_kinds() -> None:
    plans = [*islice(workload(7, 0, 4), 2000)]

    assert {plan.call for plan in plans} == {"tokenize", "retire", "forward", "reverse", "lookup"}
    assert {plan.leave for plan in plans} == {None, "sending", "waiting"}
    assert {plan.arguments["on_change"] for plan in plans if plan.call == "tokenize"} == {"keep", "reassign"}


def test_an_item_has_few_contents_and_comes_once_in_a_request() -> None:
    seen: dict[str, set[int]] = {}
    for plan in islice(workload(7, 0, 4), 2000):
        items = [item for item, _ in plan.arguments.get("items", [])]
        assert len({*items}) == len(items)
        for item, content in plan.arguments.get("items", []):
            seen.setdefault(item, set()).add(content)

    assert all(contents <= {*contents_of(item)} for item, contents in seen.items())
    assert max(map(len, seen.values())) == CONTENTS_OF_AN_ITEM

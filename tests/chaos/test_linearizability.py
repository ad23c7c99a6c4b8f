"""What explains an answer about one item, and what does not."""

from __future__ import annotations

import pytest

from tests.chaos.linearizability import EFFECT_S, Step, explain


def step(kind: str, codes: str, start: float, end: float, *answer: object) -> Step:
    """A step; without an answer it is unknown."""
    return Step(kind, codes, start, end, answer or None)


ASSIGNED = step("keep", "1-2", 0, 1, "held", "1-2", True, False)

EXPLAINED = {
    "an item that nobody brought": [step("forward", "", 0, 1, "none"), step("retire", "", 2, 3, "none")],
    "known content": [ASSIGNED, step("keep", "1-2", 2, 3, "held", "1-2", False, False)],
    "changed content keeps the ID": [
        ASSIGNED,
        step("keep", "3-4", 2, 3, "held", "1-2", False, True),
        step("forward", "", 4, 5, "live", "1-2", True),
    ],
    "a reassignment, and one back": [
        ASSIGNED,
        step("reassign", "3-4", 2, 3, "held", "3-4", True, False),
        step("reverse", "1-2", 4, 5, "live", "1-2", False, "3-4"),
        step("reassign", "1-2", 6, 7, "held", "1-2", False, False),
        step("reverse", "3-4", 8, 9, "live", "3-4", False, "1-2"),
    ],
    "a retired item, and its return": [
        ASSIGNED,
        step("retire", "", 2, 3, "retired", "1-2"),
        step("forward", "", 4, 5, "retired", "1-2"),
        step("reverse", "1-2", 4, 5, "retired", "1-2"),
        step("keep", "1-2", 6, 7, "held", "1-2", False, False),
        step("forward", "", 8, 9, "live", "1-2", False),
    ],
    "an assignment whose answer was lost": [
        step("keep", "1-2", 0, 1),
        step("keep", "3-4", 2, 3, "held", "1-2", False, True),
    ],
    "a lost retirement that came late": [
        ASSIGNED,
        step("retire", "", 2, 3),
        step("forward", "", 4, 5, "live", "1-2", False),
        step("forward", "", 6, 7, "retired", "1-2"),
    ],
    "two at once, whichever came first": [
        step("keep", "1-2", 0, 5, "held", "1-2", False, False),
        step("reassign", "1-2", 1, 4, "held", "1-2", True, False),
        step("forward", "", 2, 3, "none"),
    ],
    "a request repeated inside the service, the item retired meanwhile": [
        step("keep", "1-2", 0, 9, "held", "1-2", False, False),
        step("retire", "", 2, 3, "retired", "1-2"),
        step("forward", "", 10, 11, "live", "1-2", False),
    ],
}

UNEXPLAINED = {
    "an assignment that was lost": [ASSIGNED, step("forward", "", 2, 3, "none")],
    "created a second time": [ASSIGNED, step("keep", "1-2", 2, 3, "held", "1-2", True, False)],
    "another ID though nobody asked": [ASSIGNED, step("keep", "3-4", 2, 3, "held", "3-4", True, False)],
    "renamed by another's lost request to keep": [
        ASSIGNED,
        step("keep", "3-4", 2, 3),
        step("forward", "", 4, 5, "live", "3-4", False),
    ],
    "a retirement that was lost": [
        ASSIGNED,
        step("retire", "", 2, 3, "retired", "1-2"),
        step("forward", "", 4, 5, "live", "1-2", False),
    ],
    "retired by nobody": [ASSIGNED, step("forward", "", 2, 3, "retired", "1-2")],
    "a reassignment that was lost": [
        ASSIGNED,
        step("reassign", "3-4", 2, 3, "held", "3-4", True, False),
        step("forward", "", 4, 5, "live", "1-2", False),
    ],
    "an old ID that names no successor": [
        ASSIGNED,
        step("reassign", "3-4", 2, 3, "held", "3-4", True, False),
        step("reverse", "1-2", 4, 5, "live", "1-2", False, None),
    ],
    "an answer from before the one before": [
        ASSIGNED,
        step("forward", "", 2, 3, "live", "1-2", False),
        step("reverse", "1-2", 4, 5, "none"),
    ],
    "an answer from the future": [step("forward", "", 0, 1, "live", "1-2", False), step("keep", "1-2", 2, 3)],
    "content that was changed by nobody": [ASSIGNED, step("forward", "", 2, 3, "live", "1-2", True)],
    "a lost request that came much too late": [
        ASSIGNED,
        step("retire", "", 2, 3),
        step("forward", "", 3 + EFFECT_S + 1, 3 + EFFECT_S + 2, "live", "1-2", False),
        step("forward", "", 3 + EFFECT_S + 3, 3 + EFFECT_S + 4, "retired", "1-2"),
    ],
    "a request repeated after its answer": [
        step("keep", "1-2", 0, 1, "held", "1-2", True, False),
        step("retire", "", 2, 3, "retired", "1-2"),
        step("forward", "", 4, 5, "retired", "1-2"),
        step("forward", "", 6, 7, "live", "1-2", False),
    ],
}


@pytest.mark.parametrize("name", EXPLAINED)
def test_what_can_have_happened_is_explained(name: str) -> None:
    assert explain(EXPLAINED[name]) is None


@pytest.mark.parametrize("name", UNEXPLAINED)
def test_what_cannot_have_happened_is_not(name: str) -> None:
    assert explain(UNEXPLAINED[name]) is not None


def test_what_is_not_explained_comes_with_what_could_have_been_answered() -> None:
    steps = [ASSIGNED, step("retire", "", 2, 3), step("forward", "", 4, 5, "none")]

    found = explain(steps)

    assert found is not None
    assert found.step == steps[2]
    assert found.possible == [("live", "1-2", False), ("retired", "1-2")]
    assert found.before == steps


def test_many_at_once_are_explained_in_bearable_time() -> None:
    lost = [
        step(kind, codes, i, i + 1) for i in range(40) for kind, codes in (("reassign", f"{i % 3}"), ("retire", ""))
    ]
    asked = [step("forward", "", i, i + 6, "live", f"{i % 3}", False) for i in range(40)]

    assert explain([*lost, *asked]) is None

"""Histories made by hand, each broken in one way: the checker finds just that."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.checker import check
from tests.chaos.history import History, Operation, read_history
from tests.chaos.observation import Final, ids_to_look_up

CODES = ["1-2", "1-2", "3-0"]
"""Of three contents, two of which collide."""

MISSING = {"type": "urn:semid:problem:not_assigned"}


class World:
    """A sound history with what it led to; tests break it."""

    def __init__(self) -> None:
        self.clock = 0.0
        self.operations: list[Operation] = []
        self.tokenize("a", 0, "1-2-0", created=True)
        self.tokenize("b", 1, "1-2-1", created=True)
        self.tokenize("c", 2, "3-0-0", created=True)
        self.tokenize("d", 0, None)
        self.tokenize("b", 2, "3-0-1", created=True, on_change="reassign")
        self.ask("retire", {"item": "c"}, 200, {**held("c", "3-0-0"), "retired_at": "now"})
        self.ask("forward", {"item": "e"}, 404, MISSING)
        self.final = Final(
            feed=[
                change(1, "assigned", "a", "1-2-0"),
                change(2, "assigned", "b", "1-2-1"),
                change(3, "assigned", "c", "3-0-0"),
                change(4, "assigned", "d", "1-2-2"),
                change(5, "assigned", "b", "3-0-1"),
                change(6, "replaced", "b", "1-2-1", "3-0-1"),
                change(7, "retired", "c", "3-0-0"),
            ],
            views={"/prefix": ["1-2-0", "1-2-2", "3-0-1"], "the follower's trie": ["1-2-0", "1-2-2", "3-0-1"]},
            revision=7,
        )
        self.told = copy.deepcopy(self.final.feed)
        for item, semantic_id in (("a", "1-2-0"), ("b", "3-0-1"), ("d", "1-2-2")):
            self.ask("forward", {"item": item}, 200, held(item, semantic_id))
        self.ask("forward", {"item": "c"}, 410, {"item_id": "c", "semantic_id": "3-0-0", "retired_at": "now"})
        asked = ids_to_look_up(self.final.feed, [])
        found = {
            "1-2-0": held("a", "1-2-0"),
            "1-2-1": held("b", "1-2-1", replaced_by="3-0-1"),
            "1-2-2": held("d", "1-2-2"),
            "3-0-0": {"semantic_id": "3-0-0", "error": {"item_id": "c", "semantic_id": "3-0-0", "retired_at": "now"}},
            "3-0-1": held("b", "3-0-1"),
        }
        bodies = [found.get(one, {"semantic_id": one, "error": MISSING}) for one in asked]
        self.lookup = self.ask("lookup", {"semantic_ids": asked}, 200, bodies)
        self.tokenize("a", 0, "1-2-0")

    def ask(self, call: str, arguments: dict[str, Any], status: int | None, body: Any) -> Operation:
        """A request and its answer, after all others."""
        self.clock += 1
        why = None if status else "timeout"
        operation = Operation(
            "client", len(self.operations), call, arguments, self.clock, self.clock + 0.5, status, body, why
        )
        self.operations.append(operation)
        return operation

    def tokenize(
        self, item: str, content: int, semantic_id: str | None, *, created: bool = False, on_change: str = "keep"
    ) -> Operation:
        """A request for one item; no answer where there is no ID."""
        arguments = {"items": [[item, content]], "on_change": on_change}
        entry = {"item_id": item, "semantic_id": semantic_id, "created": created, "content_changed": False}
        return self.ask("tokenize", arguments, 200 if semantic_id else None, [entry] if semantic_id else None)

    def found(self, semantic_id: str) -> dict[str, Any]:
        """The final reverse look-up of an ID."""
        return next(entry for entry in self.lookup.body if entry["semantic_id"] == semantic_id)

    def forward(self, item: str) -> Operation:
        """The final forward look-up of an item."""
        return next(op for op in self.operations if op.call == "forward" and op.arguments["item"] == item)

    def broken(self, **options: Any) -> set[str]:
        """Which promises the checker finds broken."""
        found = check(self.operations, self.final, CODES, followed=[self.told], **options)
        assert all(str(violation) for violation in found)
        return {violation.promise for violation in found}


def held(item: str, semantic_id: str, replaced_by: str | None = None) -> dict[str, Any]:
    return {"item_id": item, "semantic_id": semantic_id, "content_changed": False, "replaced_by": replaced_by}


def change(revision: int, kind: str, item: str, semantic_id: str, replaced_by: str | None = None) -> dict[str, Any]:
    return {
        "revision": revision,
        "change": kind,
        "item_id": item,
        "semantic_id": semantic_id,
        "replaced_by": replaced_by,
    }


def lose_an_assignment(world: World) -> None:
    operation = world.forward("a")
    operation.status, operation.body = 404, MISSING


def lose_an_id(world: World) -> None:
    world.found("1-2-1").clear()
    world.lookup.body[1] |= {"semantic_id": "1-2-1", "error": MISSING}


def name_two_items(world: World) -> None:
    world.tokenize("f", 0, "1-2-2")


def name_two_items_among_the_changes(world: World) -> None:
    world.final.feed[3]["semantic_id"] = "1-2-0"
    world.told = []


def rename_unasked(world: World) -> None:
    world.tokenize("a", 2, "3-0-2")


def rename_under_the_same_codes(world: World) -> None:
    world.tokenize("a", 0, "1-2-3")


def issue_twice(world: World) -> None:
    world.tokenize("a", 0, "1-2-0", created=True)


def issue_twice_among_the_changes(world: World) -> None:
    world.final.feed.append(change(8, "assigned", "c", "3-0-0"))
    world.final.revision = 8


def leave_a_gap(world: World) -> None:
    world.final.feed[4]["semantic_id"] = "3-0-2"


def keep_a_retired_one_live(world: World) -> None:
    operation = world.forward("c")
    operation.status, operation.body = 200, held("c", "3-0-0")


def list_too_little(world: World) -> None:
    world.final.views["/prefix"].remove("1-2-2")


def list_a_retired_one(world: World) -> None:
    world.final.views["/prefix"].append("3-0-0")


def list_out_of_order(world: World) -> None:
    world.final.views["/prefix"].reverse()


def follow_something_else(world: World) -> None:
    world.final.views["the follower's trie"].pop()


def count_wrongly(world: World) -> None:
    world.final.counts.append(("1", 3, 2))


def forget_a_change(world: World) -> None:
    del world.final.feed[2]


def forget_the_last_change(world: World) -> None:
    world.final.feed.pop()


def tell_otherwise(world: World) -> None:
    world.told[3] = change(4, "assigned", "z", "1-2-2")


def tell_what_is_gone(world: World) -> None:
    world.told.append(change(8, "retired", "a", "1-2-0"))


def forget_to_replace(world: World) -> None:
    world.final.feed[5] |= {"change": "retired", "semantic_id": "1-2-2", "item_id": "d", "replaced_by": None}


def replace_by_nothing(world: World) -> None:
    world.final.feed[5]["replaced_by"] = "3-0-5"


def retire_twice(world: World) -> None:
    world.final.feed.append(change(8, "retired", "c", "3-0-0"))
    world.final.revision = 8


def answer_with_a_failure(world: World) -> None:
    world.ask("forward", {"item": "a"}, 500, {"type": "urn:semid:problem:internal_error"})


def answer_about_another_item(world: World) -> None:
    world.operations[0].body[0]["item_id"] = "z"


def answer_with_an_items_error(world: World) -> None:
    world.tokenize("g", 0, "1-2-3").body[0] = {"item_id": "g", "error": {"type": "urn:semid:problem:encoding_failed"}}


def acknowledge_what_is_not_told(world: World) -> None:
    world.final.feed[3] |= {"item_id": "d", "semantic_id": "1-2-3"}
    world.tokenize("d", 0, "1-2-2", created=True)


BREAKS: list[tuple[Callable[[World], None], str]] = [
    (lose_an_assignment, "lost"),
    (lose_an_assignment, "unexplained"),
    (lose_an_id, "lost"),
    (name_two_items, "one ID for two items"),
    (name_two_items_among_the_changes, "one ID for two items"),
    (rename_unasked, "unexplained"),
    (rename_under_the_same_codes, "renamed"),
    (issue_twice, "issued twice"),
    (issue_twice_among_the_changes, "issued twice"),
    (leave_a_gap, "suffixes with a gap"),
    (keep_a_retired_one_live, "unexplained"),
    (list_too_little, "views differ"),
    (list_a_retired_one, "views differ"),
    (list_out_of_order, "views differ"),
    (follow_something_else, "views differ"),
    (count_wrongly, "views differ"),
    (forget_a_change, "changes with a hole"),
    (forget_the_last_change, "changes with a hole"),
    (tell_otherwise, "changes told otherwise"),
    (tell_what_is_gone, "changes told otherwise"),
    (retire_twice, "a change that cannot be"),
    (replace_by_nothing, "a change that cannot be"),
    (forget_to_replace, "two live IDs"),
    (answer_with_a_failure, "unexpected answer"),
    (answer_about_another_item, "unexpected answer"),
    (answer_with_an_items_error, "unexpected answer"),
    (acknowledge_what_is_not_told, "not among the changes"),
]


def test_a_sound_history_breaks_nothing() -> None:
    assert World().broken() == set()


@pytest.mark.parametrize(("break_it", "promise"), BREAKS, ids=[f"{one.__name__}: {name}" for one, name in BREAKS])
def test_what_is_broken_is_found(break_it: Callable[[World], None], promise: str) -> None:
    world = World()

    break_it(world)

    assert promise in world.broken()


def test_gaps_are_no_fault_where_they_may_be() -> None:
    world = World()

    leave_a_gap(world)

    assert "suffixes with a gap" not in world.broken(atomic=False)


def test_what_replaces_an_id_may_come_after_it_has_gone_where_changes_are_made_one_by_one() -> None:
    world = World()
    came, went = world.final.feed[4], world.final.feed[5]

    world.final.feed[4:6] = {**went, "revision": 5}, {**came, "revision": 6}
    world.told = []

    assert world.broken() == {"a change that cannot be"}
    assert world.broken(atomic=False) == set()


def test_what_was_answered_with_503_promises_nothing() -> None:
    world = World()

    world.ask("tokenize", {"items": [["a", 2]], "on_change": "keep"}, 503, {"type": "registry_unavailable"})

    assert world.broken() == set()


def test_a_history_is_read_as_it_was_written_and_a_request_without_outcome_is_unknown(tmp_path: Path) -> None:
    path = tmp_path / "client-0.jsonl"
    with History(path) as history:
        first = history.request("forward", {"item": "a"})
        history.answer(first, 404, MISSING)
        second = history.request("retire", {"item": "a"})
        history.unknown(second, "TimeoutError")
        history.request("retire", {"item": "b"})

    answered, given_up, unfinished = read_history(path)

    assert (answered.client, answered.call, answered.status, answered.body) == ("client-0", "forward", 404, MISSING)
    assert answered.start <= answered.end <= given_up.start
    assert (given_up.status, given_up.why, given_up.acknowledged) == (None, "TimeoutError", False)
    assert (unfinished.end, unfinished.status, unfinished.acknowledged) == (None, None, False)

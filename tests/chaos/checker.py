"""Reads what was answered against what the record holds, and lists every promise that was broken."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from tests.chaos.history import Operation
from tests.chaos.linearizability import Step, explain
from tests.chaos.observation import Final
from tests.chaos.steps import EXPECTED, entries, steps_of

COMING = {"assigned", "returned"}
"""The changes that bring an ID; the others take it away."""
SHOWN_STEPS = 12
SHOWN_IDS = 5


class Violation(NamedTuple):
    """A broken promise: which, and what shows it."""

    promise: str
    words: str

    def __str__(self) -> str:
        return f"{self.promise}: {self.words}"


class Naming(NamedTuple):
    """An answer that says that an ID names an item."""

    item: str
    semantic_id: str
    created: bool
    operation: Operation


def check(
    operations: Sequence[Operation],
    final: Final,
    codes: Sequence[str],
    *,
    followed: Sequence[Sequence[dict[str, Any]]] = (),
    atomic: bool = True,
) -> list[Violation]:
    """All violations.

    Args:
        operations: Of all clients, and the last look-ups of everything.
        final: What the record holds.
        codes: Of each content.
        followed: The changes that each follower was told.
        atomic: Whether a request's changes are made at once: then the suffixes of equal codes are 0 to n - 1, without a
            hole, and what replaces an ID comes before it goes.
    """
    namings = [naming for operation in operations for naming in named(operation)]
    return [
        *_unexpected(operations),
        *_uniqueness(namings, final.feed),
        *_issued_twice(namings, final.feed),
        *(_gaps(final.feed) if atomic else ()),
        *_loss(namings, operations),
        *_feed(final, followed, atomic=atomic),
        *_created_are_told(namings, final.feed),
        *_views(final, operations),
        *_explained(operations, namings, final.feed, codes),
    ]


def named(operation: Operation) -> Iterator[Naming]:
    """Every ID that an acknowledged answer gives to an item."""
    if not operation.acknowledged or operation.status == 404:
        return
    for entry in entries(operation):
        told = entry.get("error", entry)
        if "item_id" in told and "semantic_id" in told:
            yield Naming(told["item_id"], told["semantic_id"], bool(entry.get("created")), operation)
            if entry.get("replaced_by"):
                yield Naming(told["item_id"], entry["replaced_by"], False, operation)


def _unexpected(operations: Iterable[Operation]) -> Iterator[Violation]:
    """P6: an answer is what is documented, or 429 or 503."""
    for operation in operations:
        if operation.status is None or operation.status in {429, 503}:
            continue
        if operation.status not in EXPECTED[operation.call]:
            yield Violation("unexpected answer", str(operation))
        elif operation.call == "tokenize":
            asked = [item for item, _ in operation.arguments["items"]]
            if [entry.get("item_id") for entry in operation.body] != asked or any("error" in e for e in operation.body):
                yield Violation("unexpected answer", str(operation))


def _uniqueness(namings: Iterable[Naming], feed: Iterable[dict[str, Any]]) -> Iterator[Violation]:
    """P1: an ID names one item, ever. P3: an item has one ID under the same codes."""
    holder: dict[str, tuple[str, object]] = {}
    under_codes: dict[tuple[str, str], tuple[str, object]] = {}
    told = [(change["item_id"], change["semantic_id"], change) for change in feed]
    told += [(change["item_id"], change["replaced_by"], change) for change in feed if change["replaced_by"]]
    for item, semantic_id, source in [*((n.item, n.semantic_id, n.operation.name) for n in namings), *told]:
        other, first = holder.setdefault(semantic_id, (item, source))
        if other != item:
            yield Violation("one ID for two items", f"{semantic_id} names {other} in {first}, and {item} in {source}")
        codes = semantic_id.rpartition("-")[0]
        earlier, first = under_codes.setdefault((item, codes), (semantic_id, source))
        if earlier != semantic_id:
            yield Violation("renamed", f"{item} has {earlier} in {first}, and {semantic_id} in {source}")


def _issued_twice(namings: Iterable[Naming], feed: Iterable[dict[str, Any]]) -> Iterator[Violation]:
    """P1: a suffix is issued once."""
    issued: dict[str, Operation] = {}
    for naming in namings:
        if naming.created:
            first = issued.setdefault(naming.semantic_id, naming.operation)
            if first is not naming.operation:
                yield Violation("issued twice", f"{naming.semantic_id} in {first.name}, and in {naming.operation.name}")
    entered: dict[str, dict[str, Any]] = {}
    for change in feed:
        if change["change"] == "assigned":
            first_change = entered.setdefault(change["semantic_id"], change)
            if first_change is not change:
                yield Violation("issued twice", f"among the changes: {first_change}, and {change}")


def _gaps(feed: Iterable[dict[str, Any]]) -> Iterator[Violation]:
    """Under each codes every suffix below the highest was issued."""
    groups: dict[str, set[int]] = defaultdict(set)
    for change in feed:
        codes, _, suffix = change["semantic_id"].rpartition("-")
        groups[codes].add(int(suffix))
    for codes, suffixes in groups.items():
        if missing := sorted(set(range(max(suffixes) + 1)) - suffixes):
            yield Violation("suffixes with a gap", f"under {codes} nothing was ever assigned {missing[:SHOWN_IDS]}")


def _loss(namings: Iterable[Naming], operations: Sequence[Operation]) -> Iterator[Violation]:
    """P3: what was acknowledged is found, forward and reverse, after everything."""
    last_forward = {op.arguments["item"]: op for op in operations if op.call == "forward" and op.acknowledged}
    last_reverse: dict[str, tuple[str | None, Operation]] = {}
    for operation in operations:
        if operation.call in {"reverse", "lookup"} and operation.acknowledged:
            last_reverse |= {asked: (item, operation) for asked, item in _found(operation)}
    seen: set[tuple[str, str]] = set()
    for naming in namings:
        if (naming.item, naming.semantic_id) in seen:
            continue
        seen.add((naming.item, naming.semantic_id))
        forward = last_forward.get(naming.item)
        if forward is None or forward.status == 404:
            yield Violation(
                "lost", f"{naming.item} held {naming.semantic_id} in {naming.operation.name}; now: {forward}"
            )
        item, lookup = last_reverse.get(naming.semantic_id, (None, None))
        if item is None:
            where = lookup.name if lookup else "nowhere"
            words = (
                f"{naming.semantic_id} was {naming.item}'s in {naming.operation.name}; looked up in {where}: nobody's"
            )
            yield Violation("lost", words)


def _found(operation: Operation) -> Iterator[tuple[str, str | None]]:
    """Each ID that a reverse look-up asked for, and its item."""
    if operation.call == "reverse":
        answered = [(operation.arguments["semantic_id"], operation.body)] if operation.status != 404 else []
        yield from ((asked, body["item_id"]) for asked, body in answered)
        return
    for asked, entry in zip(operation.arguments["semantic_ids"], operation.body, strict=True):
        yield asked, entry.get("error", entry).get("item_id")


def _feed(final: Final, followed: Iterable[Sequence[dict[str, Any]]], *, atomic: bool) -> Iterator[Violation]:
    """The changes have no hole, each can follow what was before it, and none was told otherwise on the way."""
    for place, change in enumerate(final.feed, 1):
        if change["revision"] != place:
            yield Violation("changes with a hole", f"in place {place} stands {change}")
            return
    if final.revision != len(final.feed):
        yield Violation("changes with a hole", f"the record is at {final.revision}, its changes at {len(final.feed)}")
    yield from _illegal_changes(final.feed, atomic=atomic)
    for told in followed:
        for change in told:
            now = final.feed[change["revision"] - 1] if change["revision"] <= len(final.feed) else None
            if change != now:
                yield Violation("changes told otherwise", f"a follower was told {change}, the record has {now}")
                break


def _illegal_changes(feed: Sequence[dict[str, Any]], *, atomic: bool) -> Iterator[Violation]:
    """Each change follows from those before it, and at the end no item has two live IDs."""
    holder: dict[str, str] = {}
    live: set[str] = set()
    successors = live if atomic else {change["semantic_id"] for change in feed}
    for change in feed:
        item, semantic_id = change["item_id"], change["semantic_id"]
        legal = {
            "assigned": semantic_id not in holder,
            "returned": holder.get(semantic_id) == item and semantic_id not in live,
            "retired": holder.get(semantic_id) == item and semantic_id in live,
            "replaced": holder.get(semantic_id) == item and change["replaced_by"] in successors,
        }[change["change"]]
        if not legal:
            yield Violation(
                "a change that cannot be", f"{change}, where it was {_told_before(semantic_id, holder, live)}"
            )
        holder[semantic_id] = item
        (live.add if change["change"] in COMING else live.discard)(semantic_id)
    held: dict[str, str] = {}
    for semantic_id in live:
        item = holder[semantic_id]
        other = held.setdefault(item, semantic_id)
        if other != semantic_id:
            yield Violation("two live IDs", f"{item} holds {other} and {semantic_id}")


def _told_before(semantic_id: str, holder: dict[str, str], live: set[str]) -> str:
    return f"{holder.get(semantic_id, 'nobody')}'s and {'live' if semantic_id in live else 'not live'}"


def replay(feed: Iterable[dict[str, Any]]) -> list[str]:
    """The live IDs after all changes."""
    live: set[str] = set()
    for change in feed:
        (live.add if change["change"] in COMING else live.discard)(change["semantic_id"])
    return sorted(live, key=_numbers)


def _created_are_told(namings: Iterable[Naming], feed: Iterable[dict[str, Any]]) -> Iterator[Violation]:
    """P5: what was acknowledged is among the changes."""
    told = {change["semantic_id"] for change in feed}
    for naming in namings:
        if naming.created and naming.semantic_id not in told:
            yield Violation("not among the changes", f"{naming.semantic_id} of {naming.operation.name}")


def _views(final: Final, operations: Iterable[Operation]) -> Iterator[Violation]:
    """P5: all ways to list what is live list the same."""
    forward = {op.arguments["item"]: op for op in operations if op.call == "forward" and op.acknowledged}
    live = {op.body["semantic_id"] for op in forward.values() if op.status == 200}
    reverse = {
        entry["semantic_id"]: entry.get("replaced_by") is None and "error" not in entry
        for op in operations
        if op.call == "lookup" and op.acknowledged
        for entry in op.body
    }
    views = {
        "reverse": sorted((semantic_id for semantic_id, held in reverse.items() if held), key=_numbers),
        "/changes": replay(final.feed),
        **final.views,
    }
    expected = sorted(live, key=_numbers)
    for name, found in views.items():
        if found == expected:
            continue
        missing, extra = sorted(live - {*found}, key=_numbers), sorted({*found} - live, key=_numbers)
        words = f"{len(missing)} missing {missing[:SHOWN_IDS]}, {len(extra)} too many {extra[:SHOWN_IDS]}"
        yield Violation(
            "views differ", f"{name} against forward: {words}{'' if missing or extra else ', not in order'}"
        )
    for prefix, count, items in final.counts:
        yield Violation("views differ", f"/prefix/{prefix} counts {count}, {items} items are listed under it")


def _explained(
    operations: Iterable[Operation], namings: Iterable[Naming], feed: Iterable[dict[str, Any]], codes: Sequence[str]
) -> Iterator[Violation]:
    """P2, P3: each answer about an item follows from what was asked before."""
    holders = {naming.semantic_id: naming.item for naming in namings}
    for change in feed:
        holders |= {named: change["item_id"] for named in (change["semantic_id"], change["replaced_by"]) if named}
    by_item: dict[str, list[Step]] = defaultdict(list)
    for operation in operations:
        for item, step in steps_of(operation, codes, holders):
            by_item[item].append(step)
    for item, steps in by_item.items():
        if unexplained := explain(steps):
            before = "".join(f"\n      {step}" for step in unexplained.before[-SHOWN_STEPS:])
            possible = " or ".join(map(str, unexplained.possible))
            words = f"{item}: {unexplained.step}; possible was {possible}; up to it:{before}"
            yield Violation("unexplained", words)


def _numbers(semantic_id: str) -> list[int]:
    return [*map(int, semantic_id.split("-"))]

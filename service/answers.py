"""The entries of an answer: an item and what it holds, or what is wrong with it, in its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import orjson

from service.batching.jobs import EncodedRow
from service.content import Item, read_item_id
from service.errors import InvalidItemId, ItemError, NotAssigned, Retired, SemidError
from service.registry.assignment import Assignment, ClaimResult
from service.semantic_id import SemanticId

Answer = dict[str, Any]

Entry = Answer | orjson.Fragment
"""An answer, or JSON of it."""


def require_not_retired(assignment: Assignment) -> None:
    """Raise Retired where the item was."""
    if assignment.retired_at is not None:
        raise _retired(assignment, assignment.retired_at)


def _retired(assignment: Assignment, retired_at: datetime) -> Retired:
    semantic_id = str(assignment.semantic_id)
    detail = f"the item of {semantic_id} was retired; the ID stays its own"
    return Retired(detail, item_id=assignment.item_id, semantic_id=semantic_id, retired_at=retired_at)


def unknown_item(namespace: str) -> NotAssigned:
    """The error of an item that has no assignment."""
    return NotAssigned(f"the item has no Semantic ID in the namespace {namespace}")


def looked_up(text: object, semantic_id: SemanticId, assignment: Assignment | None) -> Answer:
    """The answer to one look-up."""
    if assignment is None:
        return unanswered(text, NotAssigned(f"no item holds {semantic_id}"))
    if assignment.retired_at is not None:
        return unanswered(text, _retired(assignment, assignment.retired_at))
    return holder(assignment)


def assignment_of(item_id: str, assignment: Assignment | None, namespace: str, *, retired: bool = False) -> Answer:
    """What one of many items holds; of one that was retired what it held, where that is what was asked for."""
    if assignment is None:
        return unassigned(item_id, unknown_item(namespace))
    if assignment.retired_at is None:
        return holder(assignment)
    if retired:
        return {**holder(assignment), "retired_at": assignment.retired_at}
    return unassigned(item_id, _retired(assignment, assignment.retired_at))


def assigned(
    items: Mapping[int, Item],
    known: Mapping[int, Assignment],
    encoded: Mapping[int, EncodedRow],
    claimed: Mapping[int, ClaimResult],
) -> dict[int, Answer]:
    """Each item's answer from what was claimed, or from what was known and unchanged."""
    answers = {}
    for i, item in items.items():
        assignment, created, _ = claimed[i] if i in claimed else ClaimResult(known[i], created=False)
        answers[i] = {
            "item_id": item.item_id,
            **_semantic_id(assignment.semantic_id),
            "created": created,
            "content_changed": assignment.content_changed,
            **_measures(encoded.get(i)),
            **({"overflow": True} if created and assignment.semantic_id.codes != encoded[i].codes else {}),
        }
    return answers


def preview(item: Item, codes: Sequence[int], known: Assignment | None, row: EncodedRow | None) -> Answer:
    """What an item would get; where it holds a Semantic ID already, that one stands."""
    nothing = {"semantic_id": None, "suffix": None, "tokens": None}
    changed = known is not None and (known.semantic_id.codes != tuple(codes) if row else known.content_changed)
    return {
        "item_id": item.item_id,
        **(_semantic_id(known.semantic_id) if known else nothing),
        "codes": list(codes),
        "created": False,
        "content_changed": changed,
        **_measures(row),
    }


def _semantic_id(semantic_id: SemanticId) -> Answer:
    return {
        "semantic_id": str(semantic_id),
        "codes": list(semantic_id.codes),
        "suffix": semantic_id.suffix,
        "tokens": list(semantic_id.tokens),
    }


def _measures(row: EncodedRow | None) -> Answer:
    return {
        "quantization_error": row.quantization_error if row else None,
        "margin": row.margin if row else None,
    }


def holder(assignment: Assignment) -> Answer:
    """An assignment as it is answered."""
    return {
        "item_id": assignment.item_id,
        **_semantic_id(assignment.semantic_id),
        "assigned_at": assignment.assigned_at,
        "content_changed": assignment.content_changed,
        "replaced_by": str(assignment.replaced_by) if assignment.replaced_by else None,
    }


def unanswered(text: object, error: SemidError) -> Answer:
    """A Semantic ID's own error beside what was asked for, where that can be said: a lone surrogate cannot."""
    return {"semantic_id": _sayable(text), "error": error.as_error()}


def unassigned(item_id: object, error: SemidError) -> Answer:
    """An item's own error beside its id as it was given, where that can be said."""
    return {"item_id": _sayable(item_id), "error": error.as_error()}


def unprefixed(text: object, error: SemidError) -> Answer:
    """A prefix's own error beside what was asked for, where that can be said."""
    return {"prefix": _sayable(text), "error": error.as_error()}


def _sayable(text: object) -> str | None:
    """The text, unless a lone surrogate is in it."""
    sayable = isinstance(text, str) and not any("\ud800" <= character <= "\udfff" for character in text)
    return text if isinstance(text, str) and sayable else None


def in_order(
    entries: Sequence[object], answers: Mapping[int, Answer], failures: Mapping[int, ItemError]
) -> list[Answer]:
    """An entry for each of the request's: its answer, or its own error."""
    return [answers[i] if i in answers else failed(entry, failures[i]) for i, entry in enumerate(entries)]


def failed(entry: object, error: ItemError) -> Answer:
    """An item's own error beside its id, where that can be said."""
    try:
        item_id = read_item_id(entry.get("item_id")) if isinstance(entry, dict) else None
    except InvalidItemId:
        item_id = None
    return {"item_id": item_id, "error": error.as_error()}

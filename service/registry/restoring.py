"""The request to put an ID back, and what the script says of it (see `restore.lua`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from service.registry.assignment import (
    Assignment,
    read_semantic_id,
    write_assignment,
    write_semantic_id,
    write_time,
)
from service.registry.request_queue import Reply, Request

if TYPE_CHECKING:
    from service.semantic_id import CodeLayout


class Restored(NamedTuple):
    """What became of an ID that was to be put back.

    Attributes:
        created: Whether it is in the record only since now; else it was there already, or was refused.
        refusal: Why it was refused; None where it was not.
    """

    created: bool
    refusal: str | None = None


def restoring(assignment: Assignment, layout: CodeLayout) -> Request:
    """What the script is asked.

    Raises:
        ValueError: Codes that the tokenizer does not have, a digest that has not 8 bytes, or a time out of range.
    """
    item_id = assignment.item_id.encode()
    if assignment.replaced_by is None:
        return Request(item_id, b"C" + write_assignment(assignment, layout))
    ids = (assignment.semantic_id, assignment.replaced_by)
    packed = b",".join(write_semantic_id(semantic_id, layout) for semantic_id in ids)
    return Request(item_id, b"F" + write_time(assignment.assigned_at) + packed)


def restored(assignment: Assignment, reply: Reply, layout: CodeLayout) -> Restored:
    """What the script's reply says."""
    if isinstance(reply.value, int):
        return Restored(bool(reply.value))
    assert isinstance(reply.value, bytes)
    kind, what = reply.value[:1], reply.value[1:]
    if kind == b"I":
        return Restored(False, f"{assignment.semantic_id} is held by the item {what.decode()!r}")
    if kind == b"N":
        return Restored(False, "the ID that the item holds now is not in the record")
    other = read_semantic_id(what, layout)
    why = "the item holds {} instead" if kind == b"O" else "the item has {} under the same codes"
    return Restored(False, why.format(other))

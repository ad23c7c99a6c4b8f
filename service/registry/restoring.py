"""The request to put an ID back, and what the script says of it (see `restore.lua`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from service.registry.assignment import (
    Assignment,
    held_id,
    read_semantic_id,
    split_former,
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


def refused(request: Request, value: bytes | None, former: bytes, holder: bytes | None, width: int) -> int | bytes:
    """What `restore.lua` answers where it puts nothing back, from what stands.

    Args:
        request: What it was asked.
        value: The item's assignment.
        former: The IDs that it held before.
        holder: The item that the ID names.
        width: Bytes of packed codes.
    """
    semantic_id, successor = asked(request.request, width)
    ids = [held_id(value), *(id_ for id_, _ in split_former(former, width))] if value else []
    if holder is not None and holder != request.item_id:
        return b"I" + holder
    if semantic_id in ids:
        return 0
    if not ids:
        return b"N"
    alike = next((id_ for id_ in ids if id_[:width] == semantic_id[:width]), b"")
    return b"S" + alike if successor in ids and alike else b"O" + ids[0]


def asked(request: bytes, width: int) -> tuple[bytes, bytes]:
    """The packed ID that is to be put back, and the one by which it was replaced, empty where it was not."""
    if request[:1] == b"C":
        return held_id(request[1:]), b""
    comma = request.index(b",", 5 + width)
    return request[5:comma], request[comma + 1 :]

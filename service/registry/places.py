"""Where Semantic IDs may stand in the nodes of a record (see `lib.lua`), asked with plain commands, as on a cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from service.registry.keys import RecordKeys

Command = tuple[Any, ...]


def asking_holders(semantic_ids: Sequence[bytes], keys: RecordKeys) -> list[Command]:
    """The commands that ask what stands for packed IDs."""
    return [("HGET", *place) for semantic_id in semantic_ids for place in keys.places(semantic_id)]


def read_holders(answers: Sequence[bytes | None], keys: RecordKeys) -> list[bytes | None]:
    """The answers: what stands for each, None for one never issued."""
    return [next((holder for holder in of_one if holder), None) for of_one in _by_one(answers, keys)]


def asking_sizes(codes: Sequence[bytes], keys: RecordKeys) -> list[Command]:
    """The commands that ask how many suffixes were issued to packed codes."""
    return [("HMGET", key, field, field + b"0") for one in codes for key, field in keys.places(one)]


def read_sizes(answers: Sequence[Sequence[bytes | None]], keys: RecordKeys) -> list[int]:
    """The answers: a number for each."""
    return [max(map(_size, of_one)) for of_one in _by_one(answers, keys)]


def _size(there: Sequence[bytes | None]) -> int:
    """By the highest suffix in a node, and whether it has the first."""
    highest, first = there
    return int(highest) + 1 if highest else int(first is not None)


def _by_one(answers: Sequence[Any], keys: RecordKeys) -> Iterator[Sequence[Any]]:
    depth = len(keys.node_depths)
    return (answers[start : start + depth] for start in range(0, len(answers), depth))

"""Interactions on disk: what each user chose, oldest first, and the field's leave-one-out split of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

BATCH_USERS = 4096


class UserSequence(NamedTuple):
    """One user's interactions.

    Attributes:
        user_id: The source's own key.
        item_ids: Oldest first; an item may come again.
    """

    user_id: str
    item_ids: tuple[str, ...]


class Split(NamedTuple):
    """Leave one out: with a user's sequence s, test is s[-1] after s[:-1], validation s[-2] after s[:-2].

    Rows are positions in a catalogue, not item ids.

    Attributes:
        training: s[:-2] of each user, at least one row.
        validation: s[-2] of each user.
        test: s[-1] of each user.
    """

    training: Sequence[tuple[int, ...]]
    validation: Sequence[int]
    test: Sequence[int]


def read_interactions(path: Path) -> Iterator[UserSequence]:
    """The users' sequences of a file, in its order; memory holds a batch, never the file.

    Args:
        path: Parquet with `user_id` (string or integer) and `item_ids` (list of strings or integers), a row a user.

    Raises:
        ValueError: The file cannot be read, a column is missing or of another type, or a value is null.
    """
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            if "user_id" not in schema.names or "item_ids" not in schema.names:
                raise ValueError(f"{path} needs the columns user_id and item_ids; it has {', '.join(schema.names)}")
            kind = schema.field("item_ids").type
            if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
                raise ValueError(f"{path}: item_ids is {kind}, expected lists of item ids")
            for batch in file.iter_batches(BATCH_USERS, columns=["user_id", "item_ids"]):
                users, items = batch.column("user_id").to_pylist(), batch.column("item_ids").to_pylist()
                for user, sequence in zip(users, items, strict=True):
                    if user is None or sequence is None or None in sequence:
                        raise ValueError(f"{path}: user {user!r} has a null among its interactions")
                    yield UserSequence(str(user), tuple(map(str, sequence)))
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path} cannot be read as interactions: {error}") from error


def in_rows(sequences: Iterator[UserSequence], rows: Mapping[str, int]) -> tuple[list[tuple[int, ...]], int]:
    """Sequences by row of a catalogue, without the items that it does not have.

    Args:
        sequences: As read.
        rows: Item id -> row.

    Returns:
        A sequence for each user, empty ones included; and how many interactions named an unknown item.
    """
    known: list[tuple[int, ...]] = []
    unknown = 0
    for sequence in sequences:
        known.append(tuple(rows[item] for item in sequence.item_ids if item in rows))
        unknown += len(sequence.item_ids) - len(known[-1])
    return known, unknown


def leave_one_out(sequences: Sequence[tuple[int, ...]]) -> Split:
    """Split sequences of at least three interactions; shorter ones are left out."""
    long = [sequence for sequence in sequences if len(sequence) >= 3]
    return Split([s[:-2] for s in long], [s[-2] for s in long], [s[-1] for s in long])

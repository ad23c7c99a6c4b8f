"""A record's table -> the files that generators read. They hold the live items alone, and are written as they are read.

The tokens of a generator are numbered level by level, the suffixes last: token = base + the sizes of the levels before
+ the number. So more suffixes later move no token.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from service.backup.formats import Format
from service.backup.record_table import LIVE, Origin, read_groups
from service.semantic_id import SemanticId


def write_format(table: Path, path: Path, kind: Format, origin: Origin, *, token_base: int = 0) -> int:
    """Writes the live items of a record's table in a generator's format.

    Args:
        table: As `semid export` writes it.
        path: The new file.
        kind: Which format; not `Format.PARQUET`.
        origin: Of what record the table is.
        token_base: The number of the first token, `<a_0>`, for `Format.JSONL`.

    Returns:
        How many suffixes the generator's vocabulary has: up to the tokenizer's `max_suffix`, or where it has none up
        to the highest that a live item has.
    """
    suffixes = _suffixes(table, origin)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        if kind is Format.INDEX_JSON:
            file.writelines(_object((item, semantic_id.tokens) for item, semantic_id in _live(table)))
        elif kind is Format.SID2VID:
            file.writelines(_object((_key(semantic_id), [{"pid": item}]) for item, semantic_id in _live(table)))
        elif kind is Format.JSONL:
            offsets = list(accumulate(origin.codebook_sizes, initial=token_base))
            file.writelines(_line(item, semantic_id, offsets) for item, semantic_id in _live(table))
        else:
            file.writelines(f"{token}\n" for token in vocabulary(origin, suffixes))
    return suffixes


def vocabulary(origin: Origin, suffixes: int) -> Iterator[str]:
    """All tokens of Semantic IDs, in the order in which they are numbered."""
    for level, size in enumerate((*origin.codebook_sizes, suffixes)):
        for number in range(size):
            yield SemanticId((0,) * level, number).tokens[-1]


def _live(table: Path) -> Iterator[tuple[str, SemanticId]]:
    """The live items and their IDs."""
    for rows in read_groups(table, ["item_id", "codes", "suffix", "state"]):
        live = rows.filter(pc.equal(rows["state"], LIVE))
        for item_id, codes, suffix in zip(*(live[name].to_pylist() for name in live.column_names[:3]), strict=True):
            yield item_id, SemanticId(tuple(codes), suffix)


def _suffixes(table: Path, origin: Origin) -> int:
    if origin.max_suffix is not None:
        return origin.max_suffix + 1
    highest = -1
    for rows in read_groups(table, ["suffix", "state"]):
        found = pc.max(rows.filter(pc.equal(rows["state"], LIVE))["suffix"]).as_py()
        highest = max(highest, -1 if found is None else found)
    return highest + 1


def _object(members: Iterable[tuple[str, Any]]) -> Iterator[str]:
    """One JSON object, a member a line, however many there are."""
    between = "{\n"
    for name, value in members:
        yield f"{between}{_json(name)}: {_json(value)}"
        between = ",\n"
    yield "{}\n" if between == "{\n" else "\n}\n"


def _key(semantic_id: SemanticId) -> str:
    return ",".join(map(str, (*semantic_id.codes, semantic_id.suffix)))


def _line(item_id: str, semantic_id: SemanticId, offsets: list[int]) -> str:
    numbers = (*semantic_id.codes, semantic_id.suffix)
    token_ids = [offset + number for offset, number in zip(offsets, numbers, strict=True)]
    return _json({"item_id": item_id, "token_ids": token_ids, "metadata": {"semantic_id": str(semantic_id)}}) + "\n"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)

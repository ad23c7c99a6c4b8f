"""Answers as columns -> the JSON of each, by arrays: no object for an item but its bytes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from string import ascii_lowercase

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from service.bulk.columns import AnswerColumns

_ESCAPED = re.compile(rb'[\x00-\x1f"\\]')


def write_rows(item_ids: Sequence[bytes], answers: AnswerColumns) -> list[bytes]:
    """The JSON object of each answer, to the byte what `orjson` makes of `answers.assigned` and `answers.preview`."""
    codes = [_numbers(level) for level in answers.codes.T]
    suffix = _numbers(answers.suffixes)  # null where there is none; so is what is joined with it
    held = (
        [*(_numbers(level) for level in _held_codes(answers).T), suffix] if answers.semantic_ids else [*codes, suffix]
    )
    tokens = [
        part for letter, number in zip(ascii_lowercase, held, strict=False) for part in (f'>","<{letter}_', number)
    ]
    members = {
        "item_id": _strings(item_ids),
        "semantic_id": _or_null(_joined('"', pc.binary_join_element_wise(*held, "-"), '"')),
        "codes": _joined("[", pc.binary_join_element_wise(*codes, ","), "]"),
        "suffix": _or_null(suffix),
        "tokens": _or_null(_joined('["<a_', *tokens[1:], '>"]')),
        "created": _booleans(answers.created),
        "content_changed": _booleans(answers.content_changed),
        "quantization_error": _floats(answers.quantization_errors),
        "margin": _floats(answers.margins),
    }
    parts = [part for name, column in members.items() for part in (f',"{name}":', column)]
    if answers.overflow.any():
        parts.append(pc.if_else(pa.array(answers.overflow), ',"overflow":true', ""))
    if (answers.group_sizes >= 0).any():
        parts.append(pc.fill_null(_joined(',"group_size":', _numbers(answers.group_sizes)), ""))
    rows: list[bytes] = _joined('{"item_id":', *parts[1:], "}").cast(pa.binary()).to_pylist()
    return rows


def _held_codes(answers: AnswerColumns) -> NDArray[np.int32]:
    """The codes (B, L) of the IDs that items hold."""
    codes = answers.codes.copy()
    for place, semantic_id in answers.semantic_ids.items():
        if semantic_id is not None:
            codes[place] = [int(number) for number in semantic_id.split("-")[:-1]]
    return codes


def _joined(*parts: str | pa.Array) -> pa.Array:
    return pc.binary_join_element_wise(*parts, "")


def _or_null(column: pa.Array) -> pa.Array:
    return pc.fill_null(column, "null")


def _numbers(values: NDArray[np.int32] | NDArray[np.int64]) -> pa.Array:
    """In decimal; null where they are negative."""
    return pa.array(values, mask=values < 0).cast(pa.string())


def _booleans(values: NDArray[np.bool_]) -> pa.Array:
    return pa.array(values).cast(pa.string())


def _floats(values: NDArray[np.float64]) -> pa.Array:
    """As `orjson` writes them: the shortest that reads back as the same; NaN as null."""
    return pa.array(orjson.dumps(values, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1].split(b","), pa.string())


def _strings(values: Sequence[bytes]) -> pa.Array:
    """UTF-8 as JSON's strings; few have something to be escaped."""
    if _ESCAPED.search(b"".join(values)):
        return pa.array([orjson.dumps(value.decode()) for value in values], pa.string())
    return _joined('"', pa.array(values, pa.binary()).cast(pa.string()), '"')

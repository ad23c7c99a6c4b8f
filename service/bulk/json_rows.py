"""Answers as columns -> the JSON of each: one piece of bytes, no object for a part of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from string import ascii_lowercase

import numpy as np
import orjson
from numpy.typing import NDArray

from service.bulk.columns import AnswerColumns

_ESCAPED = re.compile(rb'[\x00-\x1f"\\]')
_BOOLEANS = (b"false", b"true")


def write_rows(item_ids: Sequence[bytes], answers: AnswerColumns) -> list[bytes]:
    """The JSON object of each answer, to the byte what `orjson` makes of `answers.assigned` and `answers.preview`."""
    with_id, without = _templates(answers.codes.shape[1])
    codes = answers.codes.tolist()
    rows = zip(
        _strings(item_ids),
        codes,
        _held_codes(answers, codes),
        answers.suffixes.tolist(),
        _booleans(answers.created),
        _booleans(answers.content_changed),
        _floats(answers.quantization_errors),
        _floats(answers.margins),
        _ends(answers),
        strict=True,
    )
    return [
        with_id % (item_id, *held, suffix, *own, suffix, *held, suffix, *others)
        if suffix >= 0
        else without % (item_id, *own, *others)
        for item_id, own, held, suffix, *others in rows
    ]


def _templates(levels: int) -> tuple[bytes, bytes]:
    """Of an answer with a Semantic ID, and of one without."""
    numbers = ["%d"] * (levels + 1)
    semantic_id, codes = "-".join(numbers), ",".join(numbers[:-1])
    tokens = ",".join([f'"<{letter}_%d>"' for letter in ascii_lowercase[: levels + 1]])
    row = '{"item_id":%%b,"semantic_id":%s,"codes":[%s],"suffix":%s,"tokens":%s'
    rest = b',"created":%b,"content_changed":%b,"quantization_error":%b,"margin":%b%b'
    with_id = row % (f'"{semantic_id}"', codes, "%d", f"[{tokens}]")
    return with_id.encode() + rest, (row % ("null", codes, "null", "null")).encode() + rest


def _held_codes(answers: AnswerColumns, codes: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
    """The codes of the IDs that items hold."""
    if not answers.semantic_ids:
        return codes
    held = list(codes)
    for place, semantic_id in answers.semantic_ids.items():
        if semantic_id is not None:
            held[place] = [int(number) for number in semantic_id.split("-")[:-1]]
    return held


def _ends(answers: AnswerColumns) -> list[bytes]:
    """What stands behind the members that all answers have."""
    ends = [b"}"] * len(answers.codes)
    for place in np.flatnonzero(answers.overflow).tolist():
        ends[place] = b',"overflow":true}'
    places = np.flatnonzero(answers.group_sizes >= 0)
    for place, size in zip(places.tolist(), answers.group_sizes[places].tolist(), strict=True):
        ends[place] = b',"group_size":%d}' % size
    return ends


def _booleans(values: NDArray[np.bool_]) -> list[bytes]:
    return [_BOOLEANS[value] for value in values.tolist()]


def _floats(values: NDArray[np.float64]) -> list[bytes]:
    """As `orjson` writes them: the shortest that reads back as the same; NaN as null."""
    return orjson.dumps(values, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1].split(b",")


def _strings(values: Sequence[bytes]) -> list[bytes]:
    """UTF-8 as JSON's strings; few have something to be escaped."""
    if _ESCAPED.search(b"".join(values)):
        return [orjson.dumps(value.decode()) for value in values]
    return [b'"%b"' % value for value in values]

"""The JSON of answers in columns is that of answers one by one, to the byte."""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.bulk.columns import AnswerColumns
from service.bulk.json_rows import write_rows
from service.semantic_id import MAX_LEVELS, SemanticId

LEVELS = 3
codes = st.tuples(*[st.integers(0, 65_535)] * LEVELS)
measure = st.none() | st.floats(0, allow_infinity=False, allow_nan=False)


@st.composite
def answers(draw: st.DrawFn) -> dict[str, Any]:
    own, suffix = draw(codes), draw(st.none() | st.integers(0, 2**31 - 1))
    dry_run, overflow = draw(st.booleans()), draw(st.booleans())
    held = None if suffix is None else SemanticId(draw(st.just(own) | codes) if dry_run else own, suffix)
    return {
        "item_id": draw(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)),
        "semantic_id": None if held is None else str(held),
        "codes": list(own),
        "suffix": suffix,
        "tokens": None if held is None else list(held.tokens),
        "created": draw(st.booleans()),
        "content_changed": draw(st.booleans()),
        "quantization_error": draw(measure),
        "margin": draw(measure),
        **({"overflow": True} if overflow and not dry_run else {}),
        **({"group_size": draw(st.integers(0, 2**40))} if dry_run else {}),
    }


@given(st.lists(answers(), min_size=1, max_size=6))
def test_rows_are_what_answers_are_one_by_one(expected: list[dict[str, Any]]) -> None:
    columns = AnswerColumns.empty(len(expected), LEVELS)
    for place, answer in enumerate(expected):
        columns.put(place, answer)

    rows = write_rows([answer["item_id"].encode() for answer in expected], columns)

    assert rows == [orjson.dumps(answer) for answer in expected]


@pytest.mark.parametrize("levels", [1, MAX_LEVELS])
def test_rows_have_the_letters_of_all_levels(levels: int) -> None:
    columns = AnswerColumns.empty(1, levels)
    columns.suffixes[0] = 7

    (row,) = write_rows([b"a"], columns)

    answer = orjson.loads(row)
    assert answer["tokens"] == list(SemanticId((0,) * levels, 7).tokens)
    assert answer["codes"] == np.zeros(levels).tolist()

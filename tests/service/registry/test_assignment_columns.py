"""Assignments and claims as columns are those of `assignment`, item by item."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.registry.assignment import Assignment, Claim, write_assignment
from service.registry.assignment_columns import pack, read_held, row_bytes, write_contents
from service.semantic_id import MAX_SUFFIX, CodeLayout, SemanticId

TIME = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
LAYOUTS = [CodeLayout((256, 16, 256)), CodeLayout((1000, 3)), CodeLayout((7,))]


@st.composite
def assignments(draw: st.DrawFn, layout: CodeLayout) -> Assignment | None:
    if not draw(st.integers(0, 4)):
        return None
    codes = tuple(draw(st.integers(0, size - 1)) for size in layout.codebook_sizes)
    suffix = draw(st.integers(0, MAX_SUFFIX) | st.sampled_from([0, 9, 10, 99, MAX_SUFFIX]))
    digest = draw(st.binary(min_size=8, max_size=8))
    return Assignment(
        *("item", SemanticId(codes, suffix), TIME, digest, draw(st.booleans())),
        retired_at=draw(st.sampled_from([None, None, TIME])),
    )


@given(st.data(), st.sampled_from(LAYOUTS))
def test_what_items_hold_is_read_as_one_by_one(data: st.DataObject, layout: CodeLayout) -> None:
    held = data.draw(st.lists(assignments(layout), max_size=8))

    columns = read_held([write_assignment(one, layout) if one else None for one in held], layout)

    assert columns.codes.shape == (len(held), len(layout.codebook_sizes))
    for i, one in enumerate(held):
        assert columns.known[i] == (one is not None)
        assert columns.live[i] == (one is not None and one.live)
        if one is not None and one.live:
            assert SemanticId(tuple(columns.codes[i].tolist()), int(columns.suffixes[i])) == one.semantic_id
            assert columns.digests[i].tobytes() == one.digest
            assert columns.content_changed[i] == one.content_changed


@given(st.data(), st.sampled_from(LAYOUTS))
def test_contents_are_written_as_one_by_one(data: st.DataObject, layout: CodeLayout) -> None:
    held = [one for one in data.draw(st.lists(assignments(layout), max_size=8)) if one]
    digests = np.frombuffer(b"".join(one.digest for one in held), np.uint64)
    codes = np.array([one.semantic_id.codes for one in held], np.int32).reshape(-1, len(layout.codebook_sizes))

    contents = write_contents(digests, codes, layout)

    claims = [Claim("item", one.semantic_id.codes, one.digest) for one in held]
    assert [b"K" + content for content in contents] == [claim.request(layout) for claim in claims]


@pytest.mark.parametrize("codes", [[[0, 16, 0]], [[-1, 0, 0]], [[0, 0]]])
def test_codes_that_no_codebook_has_are_not_written(codes: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="not codes of codebooks"):
        write_contents(np.zeros(1, np.uint64), np.array(codes, np.int32), LAYOUTS[0])


@given(st.data(), st.sampled_from(LAYOUTS))
def test_many_codes_are_packed_as_one_by_one(data: st.DataObject, layout: CodeLayout) -> None:
    one = st.tuples(*[st.integers(0, size - 1) for size in layout.codebook_sizes])
    groups = data.draw(st.lists(one, min_size=1, max_size=8))

    assert row_bytes(pack(np.array(groups, np.int32), layout)) == [layout.pack(codes) for codes in groups]

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import MalformedSemanticId
from service.semantic_id import MAX_SUFFIX, CodeLayout, SemanticId, parse_prefix, write_prefix

SIZES = (256, 256, 16)


@st.composite
def sizes_and_ids(draw: st.DrawFn) -> tuple[tuple[int, ...], SemanticId]:
    sizes = tuple(draw(st.lists(st.integers(1, 65_536), min_size=1, max_size=25)))
    codes = tuple(draw(st.integers(0, size - 1)) for size in sizes)
    return sizes, SemanticId(codes, draw(st.integers(0, MAX_SUFFIX)))


@given(sizes_and_ids())
def test_both_written_forms_read_back(case: tuple[tuple[int, ...], SemanticId]) -> None:
    sizes, semantic_id = case

    assert SemanticId.parse(str(semantic_id), sizes) == semantic_id
    assert SemanticId.parse("".join(semantic_id.tokens), sizes) == semantic_id


@given(sizes_and_ids(), st.integers(0, 25))
def test_both_forms_of_a_prefix_read_back_and_lead_the_packed_codes(
    case: tuple[tuple[int, ...], SemanticId], length: int
) -> None:
    sizes, semantic_id = case
    prefix = semantic_id.codes[:length]

    assert parse_prefix(write_prefix(prefix), sizes) == prefix
    assert parse_prefix("".join(semantic_id.tokens[: len(prefix)]), sizes) == prefix
    layout = CodeLayout(sizes)
    assert layout.pack(semantic_id.codes).startswith(layout.pack_prefix(prefix))


@given(sizes_and_ids())
def test_packed_codes_read_back_at_a_fixed_width(case: tuple[tuple[int, ...], SemanticId]) -> None:
    sizes, semantic_id = case
    layout = CodeLayout(sizes)

    packed = layout.pack(semantic_id.codes)

    assert len(packed) == layout.width == len(sizes) * (1 if max(sizes) <= 256 else 2)
    assert layout.unpack(packed) == semantic_id.codes


@given(st.text(alphabet="0123456789-<>_abcd ", max_size=30))
def test_whatever_is_read_is_written_the_same(text: str) -> None:
    try:
        semantic_id = SemanticId.parse(text, SIZES)
    except MalformedSemanticId:
        return

    assert text in {str(semantic_id), "".join(semantic_id.tokens)}


def test_the_written_forms_are_those_of_the_contract() -> None:
    semantic_id = SemanticId((12, 200, 7), 0)

    assert str(semantic_id) == "12-200-7-0"
    assert semantic_id.tokens == ("<a_12>", "<b_200>", "<c_7>", "<d_0>")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "has 1 parts"),
        ("1-2-3", "has 3 parts"),
        ("1-2-3-4-5", "has 5 parts"),
        ("1-2--3", "not a number"),
        ("-1-2-3", "not a number"),
        ("1-2-3-+4", "not a number"),
        ("1-2-03-4", "not a number"),
        (" 1-2-3-4", "not a number"),
        ("1-2-3-4\n", "not a number"),
        ("1-2-3-\u0664", "not a number"),
        ("1-2-3-" + "9" * 5000, "not a number"),
        ("1-2-3-x", "not a number"),
        ("1-2-3-\ud800", "not a number"),
        ("256-2-3-4", "code 256 of level 1"),
        ("1-2-16-4", "code 16 of level 3"),
        ("1-2-3-2147483648", "the suffix"),
        ("<a_1><b_2><c_3>", "has 3 parts"),
        ("<a_1><b_2><c_3><d_4><e_5>", "has 5 parts"),
        ("<a_1><c_2><b_3><d_4>", "letter 'c'"),
        ("<A_1><b_2><c_3><d_4>", "not a sequence of tokens"),
        ("<a_1> <b_2><c_3><d_4>", "not a sequence of tokens"),
        ("<a_1><b_2><c_3><d_4>x", "not a sequence of tokens"),
        ("<a_01><b_2><c_3><d_4>", "not a number"),
        ("<a_1><b_2><c_99><d_4>", "code 99 of level 3"),
    ],
)
def test_malformed_text_is_refused_and_says_why(text: str, complaint: str) -> None:
    with pytest.raises(MalformedSemanticId, match=complaint) as refusal:
        SemanticId.parse(text, SIZES)

    assert str(refusal.value).isascii()
    assert len(str(refusal.value)) < 300


def test_semantic_ids_sort_by_codes_then_suffix_and_cannot_change() -> None:
    ids = [SemanticId((1, 2), 10), SemanticId((1, 2), 9), SemanticId((0, 9), 11)]

    assert sorted(ids) == [ids[2], ids[1], ids[0]]
    assert len({*ids, SemanticId((1, 2), 9)}) == 3
    with pytest.raises(FrozenInstanceError):
        ids[0].suffix = 3  # type: ignore[misc]


@pytest.mark.parametrize("codes", [(1, 2), (1, 2, 3, 4), (256, 0, 0), (0, 0, 16), (-1, 0, 0), (1.5, 0, 0)])
def test_codes_a_tokenizer_does_not_have_are_not_packed(codes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="not codes of"):
        CodeLayout(SIZES).pack(codes)


@pytest.mark.parametrize("sizes", [(), (0,), (65_537,), (2,) * 26])
def test_impossible_codebooks_have_no_layout(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="1 to"):
        CodeLayout(sizes)

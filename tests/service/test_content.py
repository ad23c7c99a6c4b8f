"""One entry of a request becomes a valid item, or the error that says what is wrong with it."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models import TextTemplate
from service.content import Item, ItemReader, bytes_of_base64, read_item_id, rows_of_base64
from service.errors import InvalidContent, InvalidEmbedding, InvalidItem, InvalidItemId, InvalidText, ItemError


@dataclass(frozen=True)
class Shape:
    """A tokenizer of three-number embeddings."""

    template: TextTemplate = field(default_factory=TextTemplate)
    dimension: int = 3
    takes_text: bool = True


READER = ItemReader(Shape(), max_text_bytes=100)


def base64_of(numbers: list[float], dtype: str = "<f4") -> str:
    return base64.b64encode(np.array(numbers, dtype=dtype).tobytes()).decode()


def test_text_is_taken_as_it_is() -> None:
    item = READER.read({"item_id": "a", "text": " Kettle, 1.7 l "})

    assert (item.item_id, item.content) == ("a", " Kettle, 1.7 l ")


def test_fields_become_the_text_of_the_template() -> None:
    fields = {"title": "Kettle", "brand": "", "categories": ["Home", "Kitchen"], "description": None, "price": 12}

    item = READER.read({"item_id": "a", "fields": fields})

    assert item.content == "Kettle. Home > Kitchen"


def test_fields_and_the_text_they_make_have_one_digest() -> None:
    as_fields = READER.read({"item_id": "a", "fields": {"title": "Kettle", "brand": "Acme"}})
    as_text = READER.read({"item_id": "a", "text": "Kettle. Acme"})

    assert as_fields.digest == as_text.digest


@given(text=st.text("AQgw/+=-_ \né", max_size=12))
def test_base64_is_read_or_refused_as_by_the_standard_library(text: str) -> None:
    def told(read: Callable[[str], bytes]) -> bytes | str:
        try:
            return read(text)
        except ValueError as fault:
            return str(fault)

    assert told(bytes_of_base64) == told(lambda value: base64.b64decode(value, validate=True))


@given(data=st.data(), width=st.integers(1, 7))
def test_base64_is_decoded_together_as_one_by_one(data: st.DataObject, width: int) -> None:
    def alone(value: str) -> bytes | None:
        try:
            return bytes_of_base64(value)
        except ValueError:
            return None

    length = len(base64.b64encode(bytes(width)))
    sound = st.binary(min_size=width, max_size=width).map(lambda raw: base64.b64encode(raw).decode())
    values = data.draw(st.lists(sound | sound | st.text("AQgw/+=-é", min_size=length, max_size=length), max_size=4))
    each = [alone(value) for value in values]

    together = rows_of_base64(values, width)

    assert together == (each if all(raw is not None and len(raw) == width for raw in each) else None)


@pytest.mark.parametrize("form", [[0.5, -1, 2.25], base64_of([0.5, -1.0, 2.25])], ids=["list", "base64"])
def test_both_forms_of_an_embedding_are_read_alike(form: object) -> None:
    item = READER.read({"item_id": "a", "embedding": form})

    assert isinstance(item.content, np.ndarray)
    assert item.content.dtype == np.float32
    assert item.content.tolist() == [0.5, -1.0, 2.25]
    assert item.digest == READER.read({"item_id": "b", "embedding": [0.5, -1.0, 2.25]}).digest


def test_a_member_that_is_null_counts_as_absent() -> None:
    item = READER.read({"item_id": "a", "text": "x", "fields": None, "embedding": None})

    assert item.content == "x"


def test_different_contents_have_different_digests() -> None:
    vector = np.frombuffer(b"twelve bytes", dtype="<f4")
    contents = [
        {"text": "twelve bytes"},
        {"text": "twelve byte"},
        {"embedding": vector.tolist()},
        {"embedding": [1, 2, 3]},
    ]

    digests = {READER.read({"item_id": "a", **content}).digest for content in contents}

    assert len(digests) == 4
    assert {len(digest) for digest in digests} == {8}


@pytest.mark.parametrize("item_id", ["a", "é" * 128, "x" * 256, "😀" * 64, "a/b?c#d%41", "..", " ", "\n", "\ufffd"])
def test_an_item_id_is_1_to_256_bytes_of_utf8(item_id: str) -> None:
    assert read_item_id(item_id) == item_id


@pytest.mark.parametrize(
    ("item_id", "detail"),
    [
        (None, "missing"),
        ("", "0 bytes"),
        ("x" * 257, "257 bytes"),
        ("é" * 128 + "x", "257 bytes"),
        ("😀" * 65, "260 bytes"),
        (7, "a number"),
        (1.5, "a number"),
        (True, "a boolean"),
        (["a"], "a list"),
        ({"a": 1}, "an object"),
        ("a\0b", "NUL"),
        ("a\ud800b", "lone surrogate at position 1"),
        ("\udfff", "lone surrogate at position 0"),
    ],
)
def test_anything_else_is_no_item_id(item_id: object, detail: str) -> None:
    with pytest.raises(InvalidItemId, match=detail):
        read_item_id(item_id)


@pytest.mark.parametrize(
    ("entry", "error", "detail"),
    [
        (None, InvalidItem, "null"),
        ("kettle", InvalidItem, "a string"),
        (7, InvalidItem, "a number"),
        (False, InvalidItem, "a boolean"),
        ([], InvalidItem, "a list"),
        ({"item_id": "a", "text": "x", "price": 3}, InvalidItem, "'price'"),
        ({"item_id": "a", "text": "x", "\ud800": 3}, InvalidItem, r"'\\ud800'"),
        ({"item_id": "a", "text": "x", "k" * 99: 3}, InvalidItem, "k{40}[.]{3}'"),
        ({"text": "x"}, InvalidItemId, "missing"),
        ({"item_id": "a"}, InvalidContent, "none is given"),
        ({"item_id": "a", "text": None}, InvalidContent, "none is given"),
        ({"item_id": "a", "text": "x", "embedding": [1, 2, 3]}, InvalidContent, "text and embedding"),
        ({"item_id": "a", "text": "x", "fields": {}}, InvalidContent, "text and fields"),
        ({"item_id": "a", "text": ""}, InvalidText, "it is empty"),
        ({"item_id": "a", "text": " \n\t\u00a0"}, InvalidText, "it is empty"),
        ({"item_id": "a", "text": 5}, InvalidText, "a number"),
        ({"item_id": "a", "text": ["x"]}, InvalidText, "a list"),
        ({"item_id": "a", "text": "x" * 101}, InvalidText, "101 bytes"),
        ({"item_id": "a", "text": "é" * 51}, InvalidText, "102 bytes"),
        ({"item_id": "a", "text": "x\0"}, InvalidText, "NUL"),
        ({"item_id": "a", "text": "x\udc00"}, InvalidText, "lone surrogate at position 1"),
        ({"item_id": "a", "fields": "x"}, InvalidText, "a string"),
        ({"item_id": "a", "fields": []}, InvalidText, "a list"),
        ({"item_id": "a", "fields": {}}, InvalidText, "none of the fields title, brand"),
        ({"item_id": "a", "fields": {"price": "3"}}, InvalidText, "none of the fields"),
        ({"item_id": "a", "fields": {"title": "  ", "categories": []}}, InvalidText, "none of the fields"),
        ({"item_id": "a", "fields": {"title": 3}}, InvalidText, "title is a number"),
        ({"item_id": "a", "fields": {"categories": ["a", 3]}}, InvalidText, "categories is a list"),
        ({"item_id": "a", "fields": {"title": "x\0"}}, InvalidText, "NUL"),
        ({"item_id": "a", "fields": {"title": "\ud800"}}, InvalidText, "lone surrogate"),
        ({"item_id": "a", "fields": {"title": "x" * 101}}, InvalidText, "101 bytes"),
        ({"item_id": "a", "embedding": []}, InvalidEmbedding, "0 numbers"),
        ({"item_id": "a", "embedding": [1, 2]}, InvalidEmbedding, "2 numbers"),
        ({"item_id": "a", "embedding": [1, 2, 3, 4]}, InvalidEmbedding, "4 numbers"),
        ({"item_id": "a", "embedding": [[1, 2, 3]]}, InvalidEmbedding, "not numbers"),
        ({"item_id": "a", "embedding": [1, 2, "3"]}, InvalidEmbedding, "not numbers"),
        ({"item_id": "a", "embedding": [1, 2, None]}, InvalidEmbedding, "not numbers"),
        ({"item_id": "a", "embedding": [1, 2, True]}, InvalidEmbedding, "not numbers"),
        ({"item_id": "a", "embedding": {"0": 1}}, InvalidEmbedding, "an object"),
        ({"item_id": "a", "embedding": 3}, InvalidEmbedding, "a number"),
        ({"item_id": "a", "embedding": [1, 2, math.nan]}, InvalidEmbedding, "NaN"),
        ({"item_id": "a", "embedding": [1, 2, math.inf]}, InvalidEmbedding, "infinity"),
        ({"item_id": "a", "embedding": [1, 2, 1e39]}, InvalidEmbedding, "beyond float32"),
        ({"item_id": "a", "embedding": [1, 2, 10**400]}, InvalidEmbedding, "beyond float32"),
        ({"item_id": "a", "embedding": [0, 0.0, -0.0]}, InvalidEmbedding, "zero vector"),
        ({"item_id": "a", "embedding": [1e-50, 0, 0]}, InvalidEmbedding, "zero vector"),
        ({"item_id": "a", "embedding": ""}, InvalidEmbedding, "0 numbers"),
        ({"item_id": "a", "embedding": "AAAA"}, InvalidEmbedding, "3 bytes, not a multiple of 4"),
        ({"item_id": "a", "embedding": "AAAAAA="}, InvalidEmbedding, "not base64"),
        ({"item_id": "a", "embedding": "not base64!"}, InvalidEmbedding, "not base64"),
        ({"item_id": "a", "embedding": "é\ud800"}, InvalidEmbedding, "not base64"),
        ({"item_id": "a", "embedding": base64_of([1.0, 2.0])}, InvalidEmbedding, "2 numbers"),
        ({"item_id": "a", "embedding": base64_of([1.0, 2.0, 3.0], "<f8")}, InvalidEmbedding, "6 numbers"),
        ({"item_id": "a", "embedding": base64_of([1.0, 2.0, math.nan])}, InvalidEmbedding, "NaN"),
        ({"item_id": "a", "embedding": base64_of([0.0, 0.0, 0.0])}, InvalidEmbedding, "zero vector"),
    ],
)
def test_a_faulty_entry_gets_the_error_that_says_what_is_wrong(
    entry: object, error: type[ItemError], detail: str
) -> None:
    with pytest.raises(error, match=detail):
        READER.read(entry)


def test_a_tokenizer_of_embeddings_only_takes_no_text() -> None:
    reader = ItemReader(Shape(takes_text=False), max_text_bytes=100)

    with pytest.raises(InvalidText, match="embeddings only"):
        reader.read({"item_id": "a", "text": "x"})
    assert reader.read({"item_id": "a", "embedding": [1, 2, 3]}).item_id == "a"


ANY_TEXT = st.text(st.characters(), max_size=20)
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ANY_TEXT, inner, max_size=4),
)


@given(st.fixed_dictionaries({}, optional=dict.fromkeys(("item_id", "text", "fields", "embedding"), ANY_JSON)))
def test_whatever_stands_in_an_entry_is_an_item_or_an_item_error(entry: dict[str, object]) -> None:
    try:
        item = READER.read(entry)
    except ItemError as error:
        error.as_error()["detail"].encode()  # fit to be answered
    else:
        assert isinstance(item, Item)

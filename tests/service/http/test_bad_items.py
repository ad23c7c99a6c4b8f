"""A bad item gets an error in its place, and its neighbours their Semantic IDs."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.service.http.refusals import TYPE

pytestmark = pytest.mark.usefixtures("well_afterwards")

JSON = {"content-type": "application/json"}
DIMENSION = 384
UNIT = [1.0] + [0.0] * (DIMENSION - 1)


class Raw(str):
    """An entry's own JSON, which no serializer would write."""

    __slots__ = ()


def base64_of(numbers: list[float]) -> str:
    return base64.b64encode(np.array(numbers, dtype="<f4").tobytes()).decode()


def embedding_with(number: str) -> Raw:
    return Raw(f'{{"item_id": "bad", "embedding": [{number}{", 0.0" * (DIMENSION - 1)}]}}')


def as_json(entry: object) -> str:
    return entry if isinstance(entry, Raw) else json.dumps(entry)


BAD_ITEMS: dict[str, tuple[object, str]] = {
    "not an object": ("kettle", "invalid_item"),
    "null": (None, "invalid_item"),
    "a list": ([], "invalid_item"),
    "an unknown member": ({"item_id": "bad", "text": "x", "price": 3}, "invalid_item"),
    "an unknown member that is no text": (Raw(r'{"item_id": "bad", "text": "x", "\ud800": 3}'), "invalid_item"),
    "no item id": ({"text": "x"}, "invalid_item_id"),
    "a null item id": ({"item_id": None, "text": "x"}, "invalid_item_id"),
    "an empty item id": ({"item_id": "", "text": "x"}, "invalid_item_id"),
    "an item id of 257 bytes": ({"item_id": "x" * 257, "text": "x"}, "invalid_item_id"),
    "an item id of 257 bytes in 129 characters": ({"item_id": "é" * 128 + "x", "text": "x"}, "invalid_item_id"),
    "an item id that is a number": ({"item_id": 7, "text": "x"}, "invalid_item_id"),
    "an item id that is a list": ({"item_id": ["bad"], "text": "x"}, "invalid_item_id"),
    "an item id with a NUL": ({"item_id": "bad\0", "text": "x"}, "invalid_item_id"),
    "an item id with a lone surrogate": (Raw(r'{"item_id": "bad\ud800", "text": "x"}'), "invalid_item_id"),
    "an item id with raw bytes of a surrogate": (Raw('{"item_id": "bad\udead", "text": "x"}'), "invalid_item_id"),
    "no content": ({"item_id": "bad"}, "invalid_content"),
    "a null content": ({"item_id": "bad", "text": None, "embedding": None}, "invalid_content"),
    "two kinds of content": ({"item_id": "bad", "text": "x", "embedding": UNIT}, "invalid_content"),
    "three kinds of content": (
        {"item_id": "bad", "text": "x", "fields": {"title": "x"}, "embedding": UNIT},
        "invalid_content",
    ),
    "an empty text": ({"item_id": "bad", "text": ""}, "invalid_text"),
    "a blank text": ({"item_id": "bad", "text": " \t\n\u3000"}, "invalid_text"),
    "a text that is a number": ({"item_id": "bad", "text": 5}, "invalid_text"),
    "a very long text": ({"item_id": "bad", "text": "x" * 4097}, "invalid_text"),
    "a very long text in few characters": ({"item_id": "bad", "text": "😀" * 1025}, "invalid_text"),
    "a text with a NUL": ({"item_id": "bad", "text": "a\0b"}, "invalid_text"),
    "a text with a lone surrogate": (Raw(r'{"item_id": "bad", "text": "a\udc00"}'), "invalid_text"),
    "fields that are no object": ({"item_id": "bad", "fields": "x"}, "invalid_text"),
    "fields without content": ({"item_id": "bad", "fields": {"title": ""}}, "invalid_text"),
    "a field that is a number": ({"item_id": "bad", "fields": {"title": 7}}, "invalid_text"),
    "a field with a lone surrogate": (Raw(r'{"item_id": "bad", "fields": {"title": "\ud800"}}'), "invalid_text"),
    "an embedding of a wrong dimension": ({"item_id": "bad", "embedding": UNIT[:-1]}, "invalid_embedding"),
    "an empty embedding": ({"item_id": "bad", "embedding": []}, "invalid_embedding"),
    "a nested embedding": ({"item_id": "bad", "embedding": [UNIT]}, "invalid_embedding"),
    "an embedding with a string": ({"item_id": "bad", "embedding": [*UNIT[:-1], "0"]}, "invalid_embedding"),
    "an embedding with NaN": (embedding_with("NaN"), "invalid_embedding"),
    "an embedding with infinity": (embedding_with("-Infinity"), "invalid_embedding"),
    "an embedding with a number beyond float64": (embedding_with("1e400"), "invalid_embedding"),
    "an embedding with a number beyond float32": (embedding_with("1e39"), "invalid_embedding"),
    "an embedding with an integer of 400 digits": (embedding_with("9" * 400), "invalid_embedding"),
    "an embedding with an integer of 5000 digits": (embedding_with("-" + "9" * 5000), "invalid_embedding"),
    "the zero vector": ({"item_id": "bad", "embedding": [0] * DIMENSION}, "invalid_embedding"),
    "a vector that float32 makes zero": (embedding_with("1e-60"), "invalid_embedding"),
    "base64 of no multiple of 4 bytes": ({"item_id": "bad", "embedding": "AAAA"}, "invalid_embedding"),
    "base64 of a wrong dimension": ({"item_id": "bad", "embedding": base64_of(UNIT[:-1])}, "invalid_embedding"),
    "base64 with NaN": ({"item_id": "bad", "embedding": base64_of([float("nan")] * DIMENSION)}, "invalid_embedding"),
    "no base64": ({"item_id": "bad", "embedding": "###"}, "invalid_embedding"),
    "base64 without its padding": ({"item_id": "bad", "embedding": "AAAAAA"}, "invalid_embedding"),
}


@pytest.mark.parametrize(("entry", "slug"), BAD_ITEMS.values(), ids=BAD_ITEMS.keys())
def test_a_bad_item_fails_alone(
    service: Any, namespace: str, make_embedding: Callable[[int], list[float]], entry: object, slug: str
) -> None:
    good = {"item_id": "before", "embedding": make_embedding(1)}
    text = {"item_id": "after", "text": "kettle"}
    body = f'{{"namespace": "{namespace}", "items": [{as_json(good)}, {as_json(entry)}, {as_json(text)}]}}'

    response = service.http.post("/tokenize", content=body.encode("utf-8", "surrogatepass"), headers=JSON)

    assert response.status_code == 200, response.text
    before, bad, after = response.json()["items"]
    assert bad["error"]["type"] == TYPE + slug
    assert bad["error"]["title"]
    assert bad["error"]["detail"]
    assert set(bad) == {"item_id", "error"}
    assert (before["created"], after["created"]) == (True, True)
    assert set(service.assigned(namespace)) == {"before", "after"}


@pytest.mark.parametrize(("entry", "slug"), BAD_ITEMS.values(), ids=BAD_ITEMS.keys())
def test_a_bad_item_fails_alone_in_a_dry_run(service: Any, namespace: str, entry: object, slug: str) -> None:
    good = as_json({"item_id": "good", "embedding": UNIT})
    body = f'{{"namespace": "{namespace}", "assign": false, "items": [{as_json(entry)}, {good}]}}'

    response = service.http.post("/tokenize", content=body.encode("utf-8", "surrogatepass"), headers=JSON)

    assert response.status_code == 200, response.text
    assert response.json()["items"][0]["error"]["type"] == TYPE + slug
    assert "codes" in response.json()["items"][1]
    assert service.assigned(namespace) == {}


def test_an_error_names_the_item_where_its_id_can_be_said(service: Any, namespace: str) -> None:
    named, unnamed = service.tokenize({"item_id": "é", "text": ""}, {"item_id": 7, "text": "x"}, namespace=namespace)

    assert (named["item_id"], unnamed["item_id"]) == ("é", None)


def test_nothing_but_bad_items_is_still_an_answer_for_each(service: Any, namespace: str) -> None:
    entries = service.tokenize({}, 1, {"item_id": "a"}, namespace=namespace)

    assert all("error" in entry for entry in entries)
    assert service.assigned(namespace) == {}


def test_the_same_item_twice_with_equal_content_is_one_assignment(service: Any, namespace: str) -> None:
    item = {"item_id": "twice", "text": "kettle"}

    first, second = service.tokenize(item, {"item_id": "twice", "fields": {"title": "kettle"}}, namespace=namespace)

    assert first["semantic_id"] == second["semantic_id"]
    assert [first["created"], second["created"]] == [True, False]
    assert len(service.assigned(namespace)) == 1


def test_the_same_item_twice_with_different_contents_fails_at_each_place(service: Any, namespace: str) -> None:
    entries = service.tokenize(
        {"item_id": "twice", "text": "kettle"},
        {"item_id": "good", "text": "kettle"},
        {"item_id": "twice", "embedding": UNIT},
        {"item_id": "twice", "text": "kettle"},
        namespace=namespace,
    )

    slugs = [entry.get("error", {}).get("type") for entry in entries]
    assert slugs == [
        TYPE + "conflicting_duplicate",
        None,
        TYPE + "conflicting_duplicate",
        TYPE + "conflicting_duplicate",
    ]
    assert set(service.assigned(namespace)) == {"good"}


def test_a_bad_item_does_not_spoil_a_good_one_of_the_same_id(service: Any, namespace: str) -> None:
    good, bad = service.tokenize({"item_id": "a", "text": "kettle"}, {"item_id": "a", "text": ""}, namespace=namespace)

    assert good["created"]
    assert bad["error"]["type"] == TYPE + "invalid_text"

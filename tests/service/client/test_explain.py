"""How a content comes to its codes, through both clients; and what a first user gets wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from service.client import Explanation, FailedItem, Refused
from tests.conftest import DIMENSION

Connect = Callable[..., Any]


@pytest.fixture
def client(connect: Connect, service: Any, namespace: str) -> Any:
    return connect(str(service.http.base_url), namespace=namespace, patience_s=5)


def test_a_content_is_explained_as_the_service_explains_it(client: Any, service: Any, namespace: str) -> None:
    vector = np.random.default_rng(3).standard_normal(DIMENSION).astype(np.float32)
    (held,) = client.tokenize([{"item_id": "near", "embedding": vector}])

    found = client.explain({"embedding": vector}, neighbours=3)

    asked = {"item": {"embedding": vector.tolist()}, "namespace": namespace, "neighbours": 3}
    told = service.http.post("/explain", json=asked).json()
    assert isinstance(found, Explanation)
    assert (found.item_id, found.held, found.group_size) == (None, False, 1)
    assert found.codes == held.codes == tuple(told["codes"])
    assert found.semantic_id == told["semantic_id"] == "-".join(map(str, [*held.codes, 1]))
    assert [(level.prefix, level.margin) for level in found.levels] == [
        (level["prefix"], level["margin"]) for level in told["levels"]
    ]
    assert found.levels[-1].count == 1
    assert [(near.shared_levels, near.assignment.item_id) for near in found.nearest] == [(3, "near")]
    assert client.explain({"item_id": "near", "embedding": vector}).held
    assert client.assignment("near").semantic_id == held.semantic_id


def test_a_content_that_is_none_is_refused_with_its_own_words(client: Any) -> None:
    with pytest.raises(Refused) as refused:
        client.explain({"text": " "})
    assert refused.value.fault.slug in {"invalid_text", "invalid_content"}


def test_one_thing_in_place_of_many_is_refused_before_anything_is_sent(client: Any) -> None:
    with pytest.raises(TypeError, match="not one dict: put it into a list"):
        list(client.tokenize({"item_id": "a", "text": "kettle"}))
    with pytest.raises(TypeError, match="not one str"):
        client.lookup("1-2-3-0")
    with pytest.raises(TypeError, match=r"an item is a mapping .* not str: 'kettle'"):
        list(client.tokenize(["kettle"]))


def test_values_of_numpy_are_taken_and_an_item_id_that_is_a_number_fails_alone(client: Any) -> None:
    vector = np.random.default_rng(4).standard_normal(DIMENSION).astype(np.float32)

    listed, numbered = client.tokenize(
        [{"item_id": "list", "embedding": list(vector)}, {"item_id": np.int64(7), "embedding": vector}]
    )

    assert len(listed.codes) == 3
    assert isinstance(numbered, FailedItem)
    assert numbered.error.slug == "invalid_item_id"


@pytest.mark.parametrize("key", ["", " ", "semid_sécrét", "semid_a b", "semid_a\nx: y"])
def test_a_key_that_is_none_is_refused_without_being_shown(connect: Connect, service: Any, key: str) -> None:
    with pytest.raises(ValueError, match="api_key is no key") as refused:
        connect(str(service.http.base_url), api_key=key)
    assert "semid_" not in str(refused.value)


def test_a_key_read_from_a_file_may_end_with_a_line(connect: Connect, service: Any) -> None:
    assert connect(str(service.http.base_url), api_key="semid_key\n").ready()

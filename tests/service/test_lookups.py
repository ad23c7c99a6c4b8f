"""Looking up over HTTP: forward and reverse agree, any item id is found, and nobody else's."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

MakeEmbedding = Callable[[int], list[float]]
TYPE = "urn:semid:problem:"


def test_forward_and_reverse_agree_in_both_forms(service: Any, namespace: str, make_embedding: MakeEmbedding) -> None:
    items = [{"item_id": f"item {i}", "embedding": make_embedding(i % 3)} for i in range(9)]
    entries = service.tokenize(*items, namespace=namespace)

    for entry in entries:
        forward = service.http.get(f"/assignment/{entry['item_id']}", params={"namespace": namespace})
        written = service.http.get(f"/item/{entry['semantic_id']}", params={"namespace": namespace})
        tokens = service.http.get(f"/item/{''.join(entry['tokens'])}", params={"namespace": namespace})
        assert forward.status_code == 200
        assert forward.json() == written.json() == tokens.json()
        assert forward.json()["item_id"] == entry["item_id"]
        assert forward.json()["semantic_id"] == entry["semantic_id"]
        assert forward.json()["tokenizer"] == service.http.get("/tokenizers").json()["default"]
        assert forward.json()["assigned_at"].endswith("Z")


def test_many_ids_are_looked_up_in_their_order(service: Any, namespace: str, make_embedding: MakeEmbedding) -> None:
    items = [{"item_id": f"{i}", "embedding": make_embedding(i % 2)} for i in range(6)]
    entries = service.tokenize(*items, namespace=namespace)
    asked = [entries[4]["semantic_id"], "15-15-15-99", "".join(entries[0]["tokens"]), entries[4]["semantic_id"]]

    response = service.http.post("/lookup", json={"semantic_ids": asked, "namespace": namespace})

    found = response.json()["items"]
    assert [entry.get("item_id") for entry in found] == ["4", None, "0", "4"]
    assert found[1]["semantic_id"] == "15-15-15-99"
    assert found[1]["error"]["type"] == TYPE + "not_assigned"
    assert found[2]["semantic_id"] == entries[0]["semantic_id"]


def test_many_items_are_looked_up_and_retired_in_their_order_and_each_fails_alone(
    service: Any, namespace: str, make_embedding: MakeEmbedding
) -> None:
    entries = service.tokenize(
        *({"item_id": f"{i}", "embedding": make_embedding(i % 2)} for i in range(5)), namespace=namespace
    )
    service.http.delete("/assignment/3", params={"namespace": namespace})
    asked = ["4", "never", 7, "3", "0", "x" * 257, "4"]

    def post(path: str) -> tuple[list[Any], list[str | None]]:
        answer = service.http.post(path, json={"item_ids": asked, "namespace": namespace}).json()
        assert (answer["namespace"], len(answer["items"])) == (namespace, len(asked))
        slugs = [entry.get("error", {}).get("type", "").removeprefix(TYPE) or None for entry in answer["items"]]
        return answer["items"], slugs

    found, slugs = post("/assignments")
    alone = service.http.get("/assignment/4", params={"namespace": namespace}).json()
    retired, retired_slugs = post("/retire")
    again, _ = post("/retire")
    after, after_slugs = post("/assignments")

    wrong = [None, "not_assigned", "invalid_item_id", "retired", None, "invalid_item_id", None]
    assert slugs == wrong
    assert retired_slugs == [None if slug == "retired" else slug for slug in wrong]
    assert after_slugs == [slug or "retired" for slug in wrong]
    assert [entry["item_id"] for entry in found] == ["4", "never", None, "3", "0", "x" * 257, "4"]
    assert found[0] == found[6] == {name: alone[name] for name in alone if name not in {"tokenizer", "namespace"}}
    for answer in (retired, again):
        assert [answer[i]["semantic_id"] for i in (0, 3, 4)] == [entries[i]["semantic_id"] for i in (4, 3, 0)]
        assert all(answer[i]["retired_at"] for i in (0, 3, 4))
    assert after[0]["error"]["semantic_id"] == entries[4]["semantic_id"]
    listed = service.http.get("/prefix/", params={"namespace": namespace}).json()["items"]
    assert {entry["item_id"] for entry in listed} == {"1", "2"}


@pytest.mark.parametrize("path", ["/assignments", "/retire"])
def test_more_item_ids_than_a_request_may_have_are_one_problem(service: Any, path: str) -> None:
    refused = service.http.post(path, json={"item_ids": ["a"] * 65})

    assert (refused.status_code, refused.json()["type"]) == (413, TYPE + "too_many_items")


@pytest.mark.parametrize("item_id", [".", "..", "a/../b", "a b+c%2B", "日本語", "\n"])
def test_an_item_id_that_no_path_has_is_looked_up_and_retired_by_the_query(
    service: Any, namespace: str, make_embedding: MakeEmbedding, item_id: str
) -> None:
    (entry,) = service.tokenize({"item_id": item_id, "embedding": make_embedding(1)}, namespace=namespace)
    asked = {"item_id": item_id, "namespace": namespace}

    assert service.http.get("/assignment", params=asked).json()["semantic_id"] == entry["semantic_id"]
    assert service.http.delete("/assignment", params=asked).json()["item_id"] == item_id
    assert service.http.get("/assignment", params=asked).status_code == 410


@pytest.mark.parametrize("query", ["", "?item_id=", "?item_id=%ff", "?item_id=a&item_id=b", "?item=a", "?item_id=a%00"])
def test_a_query_without_one_item_id_is_malformed(service: Any, query: str) -> None:
    assert service.http.get(f"/assignment{query}").status_code == 422


def test_what_nobody_holds_is_not_found(service: Any, namespace: str, make_embedding: MakeEmbedding) -> None:
    (entry,) = service.tokenize({"item_id": "a", "embedding": make_embedding(1)}, namespace=namespace)
    next_suffix = "-".join(map(str, [*entry["codes"], 1]))

    for path in (f"/item/{next_suffix}", "/assignment/b"):
        response = service.http.get(path, params={"namespace": namespace})
        assert response.status_code == 404
        assert response.headers["content-type"] == "application/problem+json"
        assert response.json()["type"] == TYPE + "not_assigned"


def test_namespaces_know_nothing_of_each_other(service: Any, namespace: str, make_embedding: MakeEmbedding) -> None:
    mine, other = f"{namespace}.a", f"{namespace}.b"

    service.tokenize({"item_id": "filler", "embedding": make_embedding(1)}, namespace=mine)
    (in_mine,) = service.tokenize({"item_id": "x", "embedding": make_embedding(1)}, namespace=mine)
    (in_other,) = service.tokenize({"item_id": "x", "embedding": make_embedding(1)}, namespace=other)

    assert (in_mine["suffix"], in_other["suffix"]) == (1, 0)
    assert in_other["created"]
    assert service.http.get(f"/item/{in_mine['semantic_id']}", params={"namespace": other}).status_code == 404
    assert service.http.get("/assignment/filler", params={"namespace": other}).status_code == 404
    assert service.http.get(f"/item/{in_mine['semantic_id']}").status_code == 404


@pytest.mark.parametrize(
    "item_id",
    [
        *(
            "a/b",
            "/a",
            "a/",
            "//",
            ".",
            "..",
            "a/../b",
            "%41",
            "100%",
            "a?b=c",
            "a#b",
            "a b",
            "a+b",
            "\n",
            "a\n",
            "a\nb",
            "a\tb",
            "a\\b",
        ),
        *("é" * 128, "x" * 256, "😀", "\ufffd", "\u202e", "e\u0301", "<script>", '"', "'", "null", "0", "a;b", "a&b"),
    ],
)
def test_any_item_id_is_found_by_its_path(service: Any, namespace: str, item_id: str) -> None:
    (entry,) = service.tokenize({"item_id": item_id, "text": "kettle"}, namespace=namespace)
    quoted = "".join(f"%{byte:02X}" for byte in item_id.encode())

    # By hand: clients take dots out of paths.
    answer = service.raw(
        f"GET /assignment/{quoted}?namespace={namespace} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode()
    )

    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), answer
    assert json.loads(body)["item_id"] == item_id
    assert json.loads(body)["semantic_id"] == entry["semantic_id"]


def test_a_path_with_a_line_end_finds_no_other_item(service: Any, namespace: str) -> None:
    (entry,) = service.tokenize({"item_id": "a", "text": "kettle"}, namespace=namespace)

    assert service.http.get("/assignment/a%0A", params={"namespace": namespace}).status_code == 404
    assert service.http.get(f"/item/{entry['semantic_id']}%0A", params={"namespace": namespace}).status_code == 422


def test_ids_that_look_alike_are_different_items(service: Any, namespace: str) -> None:
    ids = ["e\u0301", "\u00e9", "a", "A", "a ", "1", "1.0", "01"]

    entries = service.tokenize(*[{"item_id": item_id, "text": "kettle"} for item_id in ids], namespace=namespace)

    assert [entry["suffix"] for entry in entries] == list(range(8))

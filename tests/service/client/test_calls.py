"""What a service answers, through both clients: every call, typed."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from service.client import (
    Assignment,
    ChangesGone,
    FailedItem,
    MalformedSemanticId,
    NextCodes,
    NotAssigned,
    Refused,
    Retired,
    TokenizedItem,
    UnknownPrefix,
    UnknownSemanticId,
    UnknownTokenizer,
)
from tests.conftest import DIMENSION

Connect = Callable[..., Any]


@pytest.fixture
def client(connect: Connect, service: Any, namespace: str) -> Any:
    return connect(str(service.http.base_url), namespace=namespace, batch_items=8, batch_rows=16)


def items(count: int) -> list[dict[str, Any]]:
    vectors = np.random.default_rng(0).standard_normal((count, DIMENSION)).astype(np.float32)
    return [{"item_id": f"i{number}", "embedding": vectors[number]} for number in range(count)]


def table(count: int) -> pa.Table:
    rows = items(count)
    matrix = np.stack([row["embedding"] for row in rows])
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(matrix.reshape(-1)), DIMENSION)
    return pa.table({"item_id": [row["item_id"] for row in rows], "embedding": embedding})


def test_items_of_every_kind_are_tokenized_in_order_and_a_faulty_one_fails_alone(client: Any) -> None:
    vector = np.random.default_rng(1).standard_normal(DIMENSION).astype(np.float32)
    mixed = [
        {"item_id": "text", "text": "a kettle"},
        {"item_id": "fields", "fields": {"title": "a kettle", "categories": ["Home", "Kitchen"]}},
        {"item_id": "array", "embedding": vector},
        {"item_id": "list", "embedding": vector.tolist()},
        {"item_id": "surrogate", "text": "\ud800"},
        {"item_id": "nothing"},
        {"text": "nobody's"},
    ]

    answers = list(client.tokenize(mixed))

    assert [answer.item_id for answer in answers] == [*(item["item_id"] for item in mixed[:-1]), None]
    assert [type(answer) for answer in answers] == [TokenizedItem] * 4 + [FailedItem] * 3
    assert answers[0].tokens == tuple(
        f"<{level}_{n}>" for level, n in zip("abcd", (*answers[0].codes, answers[0].suffix), strict=True)
    )
    assert answers[2].codes == answers[3].codes
    assert [answer.error.slug for answer in answers[4:]] == ["invalid_text", "invalid_content", "invalid_item_id"]


def test_a_table_and_items_get_the_same_ids_whatever_they_are_sent_as(client: Any) -> None:
    answered = client.tokenize_table(table(50))
    again = list(client.tokenize(items(50)))

    assert answered["item_id"].to_pylist() == [item.item_id for item in again] == [f"i{n}" for n in range(50)]
    assert answered["semantic_id"].to_pylist() == [item.semantic_id for item in again]
    assert all(answered["created"].to_pylist())
    assert not any(item.created for item in again)
    assert answered.schema.metadata[b"tokenizer"].startswith(b"small@")


def test_a_dry_run_assigns_nothing_and_a_changed_item_is_reassigned_where_asked(client: Any) -> None:
    (previewed,) = client.tokenize([{"item_id": "a", "text": "a kettle"}], assign=False)
    assert (previewed.semantic_id, previewed.suffix, previewed.group_size) == (None, None, 0)
    with pytest.raises(NotAssigned):
        client.assignment("a")

    (first,) = client.tokenize([{"item_id": "a", "text": "a kettle"}])
    changed = [{"item_id": "a", "text": "nail polish remover, 200 ml"}]
    (kept,) = client.tokenize(changed)
    (given,) = client.tokenize(changed, on_change="reassign")

    assert (kept.semantic_id, kept.content_changed) == (first.semantic_id, True)
    assert given.created
    assert client.item(first.semantic_id).replaced_by == given.semantic_id


def test_an_id_is_looked_up_both_ways_until_its_item_is_retired(client: Any, service: Any) -> None:
    odd = "a/b ?&%ü"  # has to be quoted in a path
    first, second = client.tokenize([{"item_id": odd, "text": "a kettle"}, {"item_id": "..", "text": "a lamp"}])

    assert client.assignment(odd).semantic_id == first.semantic_id
    assert client.assignment("..").semantic_id == second.semantic_id
    assert client.item("".join(first.tokens)).item_id == odd
    assert isinstance(client.item(first.semantic_id).assigned_at, datetime)
    retired = client.retire(odd)
    assert retired.retired_at is not None
    with pytest.raises(Retired) as refused:
        client.item(first.semantic_id)
    assert (refused.value.status, refused.value.item_id, refused.value.retired_at) == (410, odd, retired.retired_at)
    # more than the service takes in one request
    found = client.lookup([second.semantic_id] * 70 + [first.semantic_id, "nonsense"])
    assert [entry.item_id for entry in found[:70]] == [".."] * 70
    assert [type(entry) for entry in found[69:]] == [Assignment, UnknownSemanticId, UnknownSemanticId]
    assert [entry.error.slug for entry in found[70:]] == ["retired", "malformed_semantic_id"]
    assert found[70].error.members["item_id"] == odd
    held, *failed = client.assignments(["..", odd, "never"])
    assert held.semantic_id == second.semantic_id
    assert [(entry.item_id, entry.error.slug) for entry in failed] == [(odd, "retired"), ("never", "not_assigned")]
    again, never = client.retire_all([odd, "never"])
    assert (again.retired_at, never.error.slug) == (retired.retired_at, "not_assigned")


def test_the_live_tree_is_listed_page_by_page_and_masks_agree_with_it(client: Any) -> None:
    answers = list(client.tokenize(items(30)))
    root = client.prefix(limit=7)

    assert root.count == 30 == sum(child.count for child in root.children)
    assert len(root.items) == 7
    assert root.next_cursor
    listed = list(client.items_under(page_items=7))
    assert sorted(item.item_id for item in listed) == sorted(item.item_id for item in answers)
    allowed, dead, unknown = client.next(["", "15-15-15", "x"])
    assert allowed == NextCodes("", tuple(child.code for child in root.children))
    assert isinstance(dead, NextCodes)
    assert isinstance(unknown, UnknownPrefix)


def test_the_trie_and_the_changes_after_it_are_the_record(client: Any) -> None:
    before = list(client.tokenize(items(20)))
    snapshot = client.trie()
    assert client.trie_unless(snapshot) is None
    client.retire(before[0].item_id)

    changes = list(client.changes(snapshot.revision, epoch=snapshot.epoch, follow=False))

    assert [(change.change, change.semantic_id) for change in changes] == [("retired", before[0].semantic_id)]
    assert changes[0].epoch == snapshot.epoch
    assert snapshot.read().revision == snapshot.revision == 20
    assert client.trie_unless(snapshot).revision == 21
    assert [change.change for change in client.changes(follow=False)] == ["assigned"] * 20 + ["retired"]
    with pytest.raises(ChangesGone):
        list(client.changes(21, epoch="another", follow=False))


def test_what_is_loaded_and_whether_it_is_ready(client: Any, connect: Connect, service: Any) -> None:
    loaded = client.tokenizers()

    assert loaded.named(None) == loaded.named("small") == loaded.default
    assert loaded.manifests[0]["name"] == "small"
    assert client.stats(codewords=True)["tokenizer"] == loaded.default
    assert client.ready() is True
    client.wait_until_ready()
    assert connect("http://127.0.0.1:1").ready() is False


def test_a_refusal_is_an_error_of_its_own_class_with_the_problems_words(connect: Connect, service: Any) -> None:
    url = str(service.http.base_url)
    with pytest.raises(UnknownTokenizer, match="422 That tokenizer is not loaded: ") as refused:
        list(connect(url, tokenizer="other").tokenize([{"item_id": "a", "text": "kettle"}]))
    assert refused.value.fault.type == "urn:semid:problem:unknown_tokenizer"
    with pytest.raises(MalformedSemanticId):
        connect(url).item("nonsense")
    with pytest.raises(Refused, match=r"422 .*the columns are item_id, and text or embedding"):
        connect(url).tokenize_table(pa.table({"sku": ["a"], "item_id": ["b"]}))
    with pytest.raises(Refused, match=r"422 .*namespace"):
        connect(url, namespace="no spaces").assignment("a")

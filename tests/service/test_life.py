"""Retirement, return, reassignment, and a suffix vocabulary that ends."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest

from service.errors import SuffixExhausted
from service.registry import Record, Registry
from service.registry.assignment import Assignment, Claim, ClaimResult
from service.semantic_id import SemanticId
from service.tokenizers import TokenizerSet
from tests.valkey import Valkey

Connect = Callable[..., Awaitable[Registry]]
MakeEmbedding = Callable[[int], list[float]]
TYPE = "urn:semid:problem:"
FINGERPRINT = "0123456789abcdef"
SIZES = (256, 256, 256)
CODES = (1, 2, 3)
OTHER_CODES = (1, 2, 4)
FAR_CODES = (44, 44, 44)  # commas, once packed


def claim(item_id: str, codes: tuple[int, ...] = CODES, content: str = "content", *, reassign: bool = False) -> Claim:
    return Claim(item_id, codes, f"{content:>8}".encode()[:8], reassign)


async def claim_one(record: Record, *args: Any, **options: Any) -> Assignment:
    (result,) = await record.claim([claim(*args, **options)])
    assert isinstance(result, ClaimResult)
    return result.assignment


async def retire_one(record: Record, item_id: str) -> Assignment:
    (assignment,) = await record.retire([item_id])
    assert assignment is not None
    return assignment


@pytest.fixture
async def record(shared_valkey: Valkey, connect: Connect, namespace: str) -> Record:
    return await (await connect(shared_valkey.url)).record(namespace, FINGERPRINT, SIZES)


@pytest.fixture
async def small_record(shared_valkey: Valkey, connect: Connect, namespace: str) -> Record:
    return await (await connect(shared_valkey.url)).record(namespace, FINGERPRINT, SIZES, max_suffix=1)


# Retirement ----------------------------------------------------------------------------------------------------------


async def test_a_retired_item_says_when_and_is_no_longer_live(record: Record) -> None:
    held = await claim_one(record, "item")

    retired = await retire_one(record, "item")

    assert held.live
    assert not retired.live
    assert retired.retired_at is not None
    assert abs(datetime.now(UTC) - retired.retired_at) < timedelta(seconds=10)
    assert (retired.semantic_id, retired.assigned_at) == (held.semantic_id, held.assigned_at)
    assert await record.by_item_ids(["item"]) == await record.by_semantic_ids([held.semantic_id]) == [retired]
    assert await record.count() == 0


async def test_retiring_again_changes_nothing(record: Record) -> None:
    await claim_one(record, "item")
    await claim_one(record, "other")

    twice = await record.retire(["item", "item"])
    later = await retire_one(record, "item")

    assert twice == [later, later]
    assert await record.count() == 1


async def test_retiring_what_was_never_assigned_leaves_nothing_behind(
    record: Record, shared_valkey: Valkey, namespace: str
) -> None:
    before = shared_valkey.client().keys(f"sid:*{namespace}:*")

    assert await record.retire(["nobody"]) == [None]
    assert await record.retire([]) == []
    assert shared_valkey.client().keys(f"sid:*{namespace}:*") == before


async def test_the_suffix_of_a_retired_item_is_never_issued_again(record: Record) -> None:
    await record.claim([claim("a"), claim("b")])
    await record.retire(["a", "b"])

    third = await claim_one(record, "c")

    assert third.semantic_id == SemanticId(CODES, 2)
    assert await record.group_sizes([CODES]) == [3]


@pytest.mark.parametrize(("codes", "changed"), [(CODES, False), (OTHER_CODES, True)])
async def test_a_retired_item_that_returns_gets_its_own_id_back(
    record: Record,
    codes: tuple[int, ...],
    changed: bool,  # noqa: FBT001
) -> None:
    held = await claim_one(record, "item", CODES, "old")
    await retire_one(record, "item")

    (result,) = await record.claim([claim("item", codes, "new")])

    assert isinstance(result, ClaimResult)
    assert not result.created
    assert result.assignment.live
    assert result.assignment.semantic_id == held.semantic_id
    assert result.assignment.assigned_at == held.assigned_at
    assert result.assignment.content_changed is changed
    assert await record.by_semantic_ids([held.semantic_id]) == [result.assignment]
    assert await record.count() == 1


# Reassignment --------------------------------------------------------------------------------------------------------


async def test_a_reassigned_item_gets_a_new_id_and_the_old_one_says_which(record: Record) -> None:
    old = await claim_one(record, "item", CODES, "old")

    (result,) = await record.claim([claim("item", OTHER_CODES, "new", reassign=True)])

    assert isinstance(result, ClaimResult)
    new = result.assignment
    assert result.created
    assert (new.semantic_id, new.content_changed, new.live) == (SemanticId(OTHER_CODES, 0), False, True)
    was, now = await record.by_semantic_ids([old.semantic_id, new.semantic_id])
    assert now == new == (await record.by_item_ids(["item"]))[0]
    assert was is not None
    assert (was.item_id, was.semantic_id, was.replaced_by) == ("item", old.semantic_id, new.semantic_id)
    assert was.assigned_at == old.assigned_at
    assert not was.live
    assert await record.count() == 1


async def test_a_replaced_id_is_never_given_to_another_item(record: Record) -> None:
    await claim_one(record, "item", CODES)
    await claim_one(record, "item", OTHER_CODES, "new", reassign=True)

    assert (await claim_one(record, "other", CODES)).semantic_id == SemanticId(CODES, 1)


async def test_reassignment_to_earlier_codes_gives_the_earlier_id_back(record: Record) -> None:
    route = [CODES, FAR_CODES, OTHER_CODES, CODES, FAR_CODES, CODES, OTHER_CODES]
    for codes in (CODES, FAR_CODES, OTHER_CODES):
        await claim_one(record, "filler", codes, str(codes), reassign=True)

    held = [await claim_one(record, "item", codes, f"visit {n}", reassign=True) for n, codes in enumerate(route)]

    assert [assignment.semantic_id for assignment in held] == [SemanticId(codes, 1) for codes in route]
    groups = [CODES, FAR_CODES, OTHER_CODES, (*CODES[:-1], 0)]
    assert await record.group_sizes(groups) == [2, 2, 2, 0]
    assert (await record.group_size_columns(np.array(groups))).tolist() == [2, 2, 2, 0]
    found = await record.by_semantic_ids([SemanticId(codes, 1) for codes in (CODES, FAR_CODES, OTHER_CODES)])
    assert [assignment and assignment.replaced_by for assignment in found] == [held[-1].semantic_id] * 2 + [None]
    assert await record.count() == 2


async def test_equal_codes_are_no_reason_to_reassign(record: Record) -> None:
    held = await claim_one(record, "item", CODES, "old")

    (result,) = await record.claim([claim("item", CODES, "reworded", reassign=True)])

    assert isinstance(result, ClaimResult)
    assert (result.assignment.semantic_id, result.created) == (held.semantic_id, False)


async def test_a_retired_item_may_return_to_another_id(record: Record) -> None:
    old = await claim_one(record, "item", CODES)
    await retire_one(record, "item")

    new = await claim_one(record, "item", OTHER_CODES, "new", reassign=True)

    (was,) = await record.by_semantic_ids([old.semantic_id])
    assert was is not None
    assert (was.replaced_by, was.retired_at) == (new.semantic_id, None)
    assert await record.count() == 1


async def test_all_ids_of_a_retired_item_say_that_it_is_retired(record: Record) -> None:
    old = await claim_one(record, "item", CODES)
    new = await claim_one(record, "item", OTHER_CODES, "new", reassign=True)

    retired = await retire_one(record, "item")

    found = await record.by_semantic_ids([old.semantic_id, new.semantic_id])
    assert [assignment and assignment.retired_at for assignment in found] == [retired.retired_at] * 2


@pytest.mark.usefixtures("believed")
async def test_an_id_that_came_back_is_told_only_once_it_is_synced(
    start_valkey: Callable[..., Valkey], connect: Connect
) -> None:
    server = start_valkey(appendfsync="everysec")
    writer, reader = [await (await connect(server.url)).record("default", FINGERPRINT, SIZES) for _ in range(2)]

    def waits() -> int:
        return int(server.client().info("commandstats")["cmdstat_waitaof"]["calls"])

    await claim_one(writer, "item")
    await claim_one(writer, "item", OTHER_CODES, "new", reassign=True)
    for change in (claim("item", CODES, "old", reassign=True), None, claim("item", CODES, "old")):
        await asyncio.sleep(1.1)
        await reader.claim([claim("other")])  # all before this second is synced now
        await reader.by_item_ids(["item"])
        await (writer.claim([change]) if change else writer.retire(["item"]))
        before = waits()

        await reader.by_item_ids(["item"])

        assert waits() == before + 1


# The suffix vocabulary -----------------------------------------------------------------------------------------------


async def test_beyond_the_highest_suffix_an_item_fails_alone(small_record: Record) -> None:
    results = await small_record.claim([claim("a"), claim("b"), claim("c"), claim("d", OTHER_CODES)])

    assert [isinstance(result, SuffixExhausted) for result in results] == [False, False, True, False]
    assert await small_record.by_item_ids(["c"]) == [None]
    assert await small_record.group_sizes([CODES, OTHER_CODES]) == [2, 1]
    assert await small_record.count() == 3


async def test_a_retired_item_leaves_no_suffix_free(small_record: Record) -> None:
    await small_record.claim([claim("a"), claim("b")])
    await retire_one(small_record, "a")

    (refused,) = await small_record.claim([claim("c")])

    assert isinstance(refused, SuffixExhausted)
    assert (await claim_one(small_record, "a")).semantic_id.suffix == 0


async def test_what_an_item_holds_stands_where_it_cannot_be_reassigned(small_record: Record) -> None:
    await small_record.claim([claim("a"), claim("b")])
    held = await claim_one(small_record, "c", OTHER_CODES)

    (refused,) = await small_record.claim([claim("c", CODES, "new", reassign=True)])

    assert isinstance(refused, SuffixExhausted)
    assert await small_record.by_item_ids(["c"]) == [held]


# Over HTTP -----------------------------------------------------------------------------------------------------------


def test_a_retired_item_is_gone_and_comes_back_as_itself(
    service: Any, namespace: str, make_embedding: MakeEmbedding
) -> None:
    item = {"item_id": "a/b", "embedding": make_embedding(1)}
    where = {"namespace": namespace}
    (held,) = service.tokenize(item, namespace=namespace)

    retired = service.http.delete("/assignment/a/b", params=where)
    again = service.http.delete("/assignment/a/b", params=where)
    by_id = service.http.get(f"/item/{held['semantic_id']}", params=where)
    by_item = service.http.get("/assignment/a/b", params=where)
    found = service.http.post("/lookup", json={"semantic_ids": [held["semantic_id"]], **where}).json()["items"]
    (returned,) = service.tokenize(item, namespace=namespace)

    assert retired.status_code == again.status_code == 200
    assert retired.json() == again.json()
    assert retired.json()["semantic_id"] == held["semantic_id"]
    assert (by_id.status_code, by_item.status_code) == (410, 410)
    assert by_id.json() | {"request_id": ""} == by_item.json() | {"request_id": ""}
    assert by_id.headers["content-type"] == "application/problem+json"
    assert by_id.json()["type"] == TYPE + "retired"
    assert by_id.json()["retired_at"] == retired.json()["retired_at"]
    assert by_id.json()["retired_at"].endswith("Z")
    assert found[0]["error"]["type"] == TYPE + "retired"
    assert found[0]["error"]["retired_at"] == retired.json()["retired_at"]
    assert (returned["semantic_id"], returned["created"]) == (held["semantic_id"], False)
    assert service.http.get(f"/item/{held['semantic_id']}", params=where).json()["item_id"] == "a/b"


def test_a_dry_run_gives_a_retired_item_nothing_back(
    service: Any, namespace: str, make_embedding: MakeEmbedding
) -> None:
    item = {"item_id": "a", "embedding": make_embedding(1)}
    (held,) = service.tokenize(item, namespace=namespace)
    service.http.delete("/assignment/a", params={"namespace": namespace})

    (preview,) = service.tokenize(item, namespace=namespace, assign=False)

    assert (preview["semantic_id"], preview["codes"], preview["group_size"]) == (None, held["codes"], 1)
    assert service.http.get("/assignment/a", params={"namespace": namespace}).status_code == 410


@pytest.mark.parametrize(("path", "status"), [("nobody", 404), ("", 422), ("x" * 257, 422)])
def test_what_cannot_be_retired_is_said_so(service: Any, namespace: str, path: str, status: int) -> None:
    answer = service.http.delete(f"/assignment/{path}", params={"namespace": namespace})

    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    assert service.assigned(namespace) == {}


def test_a_wrong_method_is_told_all_right_ones(service: Any) -> None:
    answer = service.http.put("/assignment/a")

    assert (answer.status_code, answer.headers["allow"]) == (405, "DELETE, GET, HEAD")


def test_a_reassigned_item_gets_a_new_id_and_the_old_one_answers_with_it(
    service: Any, namespace: str, make_embedding: MakeEmbedding
) -> None:
    old, new = ({"item_id": "a", "embedding": make_embedding(seed)} for seed in (1, 2))
    where = {"namespace": namespace}
    (first,) = service.tokenize(old, namespace=namespace)
    (kept,) = service.tokenize(new, namespace=namespace)

    (second,) = service.tokenize(new, namespace=namespace, on_change="reassign")
    (repeated,) = service.tokenize(new, namespace=namespace, on_change="reassign")
    was = service.http.get(f"/item/{first['semantic_id']}", params=where).json()
    found = service.http.post("/lookup", json={"semantic_ids": [first["semantic_id"]], **where}).json()["items"]
    (back,) = service.tokenize(old, namespace=namespace, on_change="reassign")

    assert (kept["semantic_id"], kept["content_changed"]) == (first["semantic_id"], True)
    assert second["codes"] != first["codes"]
    assert (second["created"], second["content_changed"]) == (True, False)
    assert (repeated["semantic_id"], repeated["created"]) == (second["semantic_id"], False)
    assert (was["item_id"], was["semantic_id"]) == ("a", first["semantic_id"])
    assert was["replaced_by"] == found[0]["replaced_by"] == second["semantic_id"]
    assert service.http.get("/assignment/a", params=where).json()["replaced_by"] is None
    assert (back["semantic_id"], back["created"]) == (first["semantic_id"], False)
    assert service.http.get(f"/item/{second['semantic_id']}", params=where).json()["replaced_by"] == back["semantic_id"]


def test_an_item_without_a_suffix_left_fails_alone(
    service: Any, namespace: str, make_embedding: MakeEmbedding, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = service.state.tokenizers.current.default
    small = replace(loaded, manifest=replace(loaded.manifest, max_suffix=1))
    monkeypatch.setattr(service.state.tokenizers, "current", TokenizerSet((small,)))
    failed = service.metric("semid_items_total", outcome="failed")

    entries = service.tokenize(
        *[{"item_id": f"{i}", "embedding": make_embedding(1)} for i in range(3)],
        {"item_id": "other", "embedding": make_embedding(2)},
        namespace=namespace,
    )

    assert [entry.get("suffix") for entry in entries] == [0, 1, None, 0]
    assert entries[2]["item_id"] == "2"
    assert entries[2]["error"]["type"] == TYPE + "suffix_exhausted"
    assert service.metric("semid_items_total", outcome="failed") == failed + 1

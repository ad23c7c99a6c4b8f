"""The live tree: which codes lead to a live item, and the items under a prefix."""

from __future__ import annotations

import base64
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from service.registry import Registry
from service.registry.assignment import Claim
from service.registry.record import Record
from service.semantic_id import SemanticId
from tests.valkey import Valkey

Connect = Callable[..., Awaitable[Registry]]
MakeEmbedding = Callable[[int], list[float]]
TYPE = "urn:semid:problem:"
FINGERPRINT = "0123456789abcdef"
SIZES = (256, 256, 256)
PATTERN_CODES = tuple(b"*?[]\\^-0a\xff\x00")  # bytes that mean something in a pattern


def claim(item_id: str, codes: tuple[int, ...], *, reassign: bool = False) -> Claim:
    return Claim(item_id, codes, bytes(code % 256 for code in (*codes, *[0] * 8))[:8], reassign)


def claims_of(count: int, sizes: tuple[int, ...], seed: int = 0) -> list[Claim]:
    draw = random.Random(seed)
    return [claim(f"item {i}", tuple(int(size * draw.random() ** 3) for size in sizes)) for i in range(count)]


async def assert_tree_is_of(record: Record, live: list[SemanticId], prefixes: set[tuple[int, ...]]) -> None:
    """Children, counts and pages agree with what is live, under each of the prefixes."""
    wanted = {prefix: Counter[int]() for prefix in prefixes}
    for semantic_id in live:
        numbers = (*semantic_id.codes, semantic_id.suffix)
        for depth in range(len(numbers)):
            if numbers[:depth] in wanted:
                wanted[numbers[:depth]][numbers[depth]] += 1

    children = await record.tree.children(list(wanted))

    assert children == [dict(counts) for counts in wanted.values()]
    assert [list(found) for found in children] == [sorted(counts) for counts in wanted.values()]


@pytest.fixture
async def record(shared_valkey: Valkey, connect: Connect, namespace: str) -> Record:
    return await (await connect(shared_valkey.url)).record(namespace, FINGERPRINT, SIZES)


@pytest.mark.parametrize("sizes", [(4, 4, 4), (256, 256, 256, 256), (300, 2, 7), (5,), (1000,), (2,) * 9])
async def test_the_tree_is_that_of_the_live_ids(
    shared_valkey: Valkey, connect: Connect, namespace: str, sizes: tuple[int, ...]
) -> None:
    record = await (await connect(shared_valkey.url, buckets=13)).record(namespace, FINGERPRINT, sizes)
    claims = claims_of(400, sizes)
    await record.claim(claims)
    await record.retire([wanted.item_id for wanted in claims[::3]])
    await record.claim([claim(moved.item_id, claims[0].codes, reassign=True) for moved in claims[1::7]])
    await record.retire([wanted.item_id for wanted in claims[1::14]])

    found = await record.by_item_ids([wanted.item_id for wanted in claims])
    live = sorted(assignment.semantic_id for assignment in found if assignment and assignment.live)
    prefixes = {wanted.codes[:depth] for wanted in claims for depth in range(len(sizes) + 1)}

    await assert_tree_is_of(record, live, prefixes)
    for prefix in sorted(prefixes)[:: max(1, len(prefixes) // 20)]:
        under = [semantic_id for semantic_id in live if semantic_id.codes[: len(prefix)] == prefix]
        for limit in (1, 7, 1000):
            assert await pages(record, prefix, limit) == under


async def pages(record: Record, prefix: tuple[int, ...], limit: int) -> list[SemanticId]:
    """All pages together; each but the last is full."""
    found: list[SemanticId] = []
    more = True
    while more and len(found) < 60:
        page = await record.tree.page(prefix, limit, found[-1] if found else None)
        assert len(page.semantic_ids) == limit or not page.more
        found += page.semantic_ids
        more = page.more
    return found + (await record.tree.page(prefix, 10_000, found[-1])).semantic_ids if more else found


async def test_codes_that_look_like_patterns_are_taken_as_they_are(record: Record) -> None:
    codes = [(a, b, c) for a in PATTERN_CODES for b in PATTERN_CODES for c in PATTERN_CODES]
    results = await record.claim([claim(f"{number}", wanted) for number, wanted in enumerate(codes)])

    live = [result.assignment.semantic_id for result in results]  # type: ignore[union-attr]
    await assert_tree_is_of(record, live, {wanted[:depth] for wanted in codes for depth in range(4)})


async def test_a_prefix_dies_with_its_last_item_and_lives_again_with_it(record: Record) -> None:
    await record.claim([claim("a", (1, 2, 3))])

    await record.retire(["a"])
    dead = await record.tree.children([(), (1,), (1, 2), (1, 2, 3), (9, 9)])
    await record.claim([claim("a", (1, 2, 3))])

    assert dead == [{}, {}, {}, {}, {}]
    assert await record.tree.children([(), (1,), (1, 2), (1, 2, 3)]) == [{1: 1}, {2: 1}, {3: 1}, {0: 1}]


@pytest.mark.parametrize("sizes", [(5,), (300,), (5, 5)])
async def test_codes_whose_items_have_all_gone_lead_to_none(
    shared_valkey: Valkey, connect: Connect, namespace: str, sizes: tuple[int, ...]
) -> None:
    record = await (await connect(shared_valkey.url)).record(namespace, FINGERPRINT, sizes)
    dead, live = [(code,) * len(sizes) for code in (2, 3)]
    await record.claim([claim("a", dead), claim("b", dead), claim("c", live)])

    await record.retire(["a", "b"])

    assert await record.tree.following([(), live[:-1], dead[:-1]]) == [[3], [3], [3] if len(sizes) == 1 else []]
    assert await record.tree.children([()]) == [{3: 1}]


async def test_nothing_is_kept_of_a_dead_prefix(record: Record, shared_valkey: Valkey, namespace: str) -> None:
    await record.claim([claim(f"{i}", (i, i, i)) for i in range(100)])
    await record.retire([f"{i}" for i in range(100)])

    client = shared_valkey.client()
    fields = [field for key in client.scan_iter(f"sid:{{{namespace}:*:r:*") for field in client.hkeys(key)]
    assert len(fields) == 100  # the IDs, for good


async def test_a_bucket_too_large_for_a_listpack_is_read_in_parts(
    shared_valkey: Valkey, connect: Connect, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.registry.tree.FIELDS_PER_SCAN", 10)
    record = await (await connect(shared_valkey.url, buckets=1)).record(namespace, FINGERPRINT, SIZES)
    claims = claims_of(3000, SIZES)
    results = await record.claim(claims)

    live = [result.assignment.semantic_id for result in results]  # type: ignore[union-attr]
    await assert_tree_is_of(record, live, {wanted.codes[:depth] for wanted in claims[:20] for depth in range(4)})


async def test_a_step_costs_the_same_in_a_large_catalogue(
    start_valkey: Callable[..., Valkey], connect: Connect
) -> None:
    server = start_valkey(hash_max_listpack_entries="512")
    record = await (await connect(server.url)).record("default", FINGERPRINT, (8, 8, 8, 256))

    async def scanned() -> int:
        before = server.client().info("commandstats").get("cmdstat_hscan", {"calls": 0})["calls"]
        await record.tree.page((1,), 10)
        return int(server.client().info("commandstats")["cmdstat_hscan"]["calls"]) - before

    await record.claim(claims_of(200, (8, 8, 8, 256)))
    small = await scanned()
    await record.claim(claims_of(20_000, (8, 8, 8, 256), seed=1))

    assert await scanned() <= max(small, 1 + 2 * 12)


# Over HTTP -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def catalogue(service: Any, namespace: str, make_embedding: MakeEmbedding) -> list[dict[str, Any]]:
    """Twenty items on a few codes, one of them retired."""
    items = [{"item_id": f"{i}", "embedding": make_embedding(i % 7)} for i in range(20)]
    entries: list[dict[str, Any]] = service.tokenize(*items, namespace=namespace)
    service.http.delete("/assignment/19", params={"namespace": namespace})
    return entries[:19]


def listing(service: Any, namespace: str, prefix: str, **query: Any) -> dict[str, Any]:
    response = service.http.get(f"/prefix/{prefix}", params={"namespace": namespace, **query})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_the_listing_of_the_root_has_everything(service: Any, namespace: str, catalogue: list[dict[str, Any]]) -> None:
    answer = listing(service, namespace, "")

    counts = Counter(entry["codes"][0] for entry in catalogue)
    assert (answer["prefix"], answer["count"]) == ("", 19)
    assert answer["children"] == [
        {"code": code, "prefix": f"{code}", "count": count} for code, count in sorted(counts.items())
    ]
    assert sorted(item["item_id"] for item in answer["items"]) == sorted(entry["item_id"] for entry in catalogue)
    assert answer["next_cursor"] is None
    assert set(answer["items"][0]) == {
        *("item_id", "semantic_id", "codes", "suffix", "tokens", "assigned_at", "content_changed", "replaced_by")
    }


def test_every_prefix_lists_what_is_under_it(service: Any, namespace: str, catalogue: list[dict[str, Any]]) -> None:
    for entry in catalogue:
        for depth in range(1, 4):
            written = "-".join(map(str, entry["codes"][:depth]))
            answer = listing(service, namespace, written)

            under = [other for other in catalogue if other["codes"][:depth] == entry["codes"][:depth]]
            assert listing(service, namespace, "".join(entry["tokens"][:depth])) == answer
            assert {item["semantic_id"] for item in answer["items"]} == {other["semantic_id"] for other in under}
            assert answer["count"] == len(under)
            assert sum(child["count"] for child in answer["children"]) == (len(under) if depth < 3 else 0)


def test_items_are_paged_by_cursor(service: Any, namespace: str, catalogue: list[dict[str, Any]]) -> None:
    whole = listing(service, namespace, "")["items"]
    found: list[dict[str, Any]] = []
    query: dict[str, Any] = {"limit": 4}
    while True:
        page = listing(service, namespace, "", **query)
        found += page["items"]
        if page["next_cursor"] is None:
            break
        assert len(page["items"]) == 4
        query["cursor"] = page["next_cursor"]

    assert found == whole


def test_a_dead_prefix_is_an_empty_listing(service: Any, namespace: str, catalogue: list[dict[str, Any]]) -> None:
    answer = listing(service, namespace, "15-15-15")

    assert (answer["count"], answer["children"], answer["items"], answer["next_cursor"]) == (0, [], [], None)


@pytest.mark.parametrize(
    "question",
    [
        *("1-2-3-4", "16", "01", "x", "%3Cb_1%3E", "1/2", "1%0A", "1?limit=0", "1?limit=1001"),
        *("1?cursor=x", "1?cursor=AgAAMA", "?cursor=!!"),
    ],
)
def test_a_question_that_makes_no_sense_is_refused(service: Any, namespace: str, question: str) -> None:
    answer = service.http.get(f"/prefix/{question}")

    assert answer.status_code == 422
    assert answer.headers["content-type"] == "application/problem+json"


def test_next_says_which_codes_lead_to_a_live_item(
    service: Any, namespace: str, catalogue: list[dict[str, Any]]
) -> None:
    first = catalogue[0]
    asked = ["", *("".join(first["tokens"][:depth]) for depth in (1, 2, 3)), "15-15-15", "99", 7]

    answer = service.http.post("/next", json={"prefixes": asked, "namespace": namespace}).json()

    for depth, entry in enumerate(answer["next"][:4]):
        wanted = {
            (*other["codes"], other["suffix"])[depth]
            for other in catalogue
            if other["codes"][:depth] == first["codes"][:depth]
        }
        assert entry["prefix"] == asked[depth]
        assert entry["allowed"] == sorted(wanted)
        mask = base64.b64decode(entry["mask"])
        assert {bit for bit in range(8 * len(mask)) if mask[bit // 8] >> bit % 8 & 1} == wanted
        assert depth == 3 or len(mask) == 2
    assert (answer["next"][4]["allowed"], answer["next"][4]["mask"]) == ([], "")
    assert [entry["error"]["type"] for entry in answer["next"][5:]] == [TYPE + "malformed_semantic_id"] * 2


def test_more_codes_than_one_answer_takes_are_refused(
    service: Any, namespace: str, catalogue: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = "".join(catalogue[0]["tokens"][:1])
    one = service.http.post("/next", json={"prefixes": [prefix], "namespace": namespace}).json()["next"][0]
    monkeypatch.setattr("service.decoding.queries.MAX_CODES_ANSWERED", 3 * len(one["allowed"]))

    three = service.http.post("/next", json={"prefixes": [prefix] * 3, "namespace": namespace})
    four = service.http.post("/next", json={"prefixes": [prefix] * 4, "namespace": namespace})

    assert three.json()["next"] == [one] * 3
    assert four.status_code == 413


def test_too_many_prefixes_are_refused(service: Any) -> None:
    assert service.http.post("/next", json={"prefixes": [""] * 65}).status_code == 413
    assert service.http.post("/next", json={"prefixes": []}).status_code == 422


def test_forward_reverse_listing_and_next_agree(
    service: Any, namespace: str, catalogue: list[dict[str, Any]], make_embedding: MakeEmbedding
) -> None:
    where = {"namespace": namespace}
    service.tokenize({"item_id": "3", "embedding": make_embedding(50)}, namespace=namespace, on_change="reassign")
    service.http.delete("/assignment/5", params=where)

    items = listing(service, namespace, "")["items"]
    assert len(items) == 18
    for item in items:
        written = "-".join(map(str, item["codes"]))
        (entry,) = service.http.post("/next", json={"prefixes": [written], **where}).json()["next"]
        assert item["suffix"] in entry["allowed"]
        assert service.http.get(f"/assignment/{item['item_id']}", params=where).json().items() >= item.items()
        assert service.http.get(f"/item/{item['semantic_id']}", params=where).json().items() >= item.items()

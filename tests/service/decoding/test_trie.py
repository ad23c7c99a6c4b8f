"""The whole live trie at one revision, taken while writes go on; and one that follows the changes."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import torch

from models import Trie
from service.decoding.snapshot import Snapshots, follow, take
from service.errors import RegistryUnavailable
from service.registry import Registry
from service.registry.assignment import Claim
from service.registry.record import Record
from service.semantic_id import SemanticId
from tests.service.conftest import Valkey

Connect = Callable[..., Awaitable[Registry]]
MakeEmbedding = Callable[[int], list[float]]
FINGERPRINT = "0123456789abcdef"
SIZES = (256, 300, 4)


def claim(item_id: str, codes: tuple[int, ...], *, reassign: bool = False) -> Claim:
    return Claim(item_id, codes, bytes(code % 256 for code in (*codes, *[0] * 8))[:8], reassign)


@pytest.fixture
async def record(shared_valkey: Valkey, connect: Connect, namespace: str) -> Record:
    return await (await connect(shared_valkey.url, buckets=500)).record(namespace, FINGERPRINT, SIZES)


async def told(record: Record, revision: int) -> list[SemanticId]:
    """What is live at a revision, by all the changes up to there."""
    live: set[SemanticId] = set()
    for change in (await record.changes.after(0, revision)).changes:
        (live.add if change.live else live.discard)(change.semantic_id)
    return sorted(live)


def ids_of(trie: Trie) -> list[SemanticId]:
    return [SemanticId(tuple(codes), suffix) for *codes, suffix in trie.semantic_ids().tolist()]


async def churn(record: Record, seed: int, turns: int) -> None:
    """Claims, retirements, returns and reassignments at random."""
    draw = random.Random(seed)
    for _ in range(turns):
        items = [f"item {draw.randrange(500)}" for _ in range(draw.randrange(1, 30))]
        codes = [(draw.randrange(256), draw.randrange(300), draw.randrange(4)) for _ in items]
        if draw.random() < 0.3:
            await record.retire(items)
        else:
            await record.claim([claim(item, c, reassign=True) for item, c in zip(items, codes, strict=True)])


async def test_a_trie_taken_while_writes_go_on_is_that_of_its_revision(record: Record) -> None:
    await churn(record, 0, 40)
    writing = asyncio.create_task(churn(record, 1, 60))

    tries = [await take(record) for _ in range(4)]
    begun = await record.changes.revision()
    tries.append(await take(record))
    await writing

    assert tries[-1].revision >= begun
    for trie in tries:
        assert ids_of(trie) == await told(record, trie.revision)


async def test_a_trie_that_follows_is_the_one_of_a_fresh_snapshot(record: Record) -> None:
    await churn(record, 0, 10)
    trie = await take(record)

    for turn in range(5):
        await churn(record, turn + 1, 10)
        trie = await follow(record, trie)

    assert trie.to_bytes() == (await take(record)).to_bytes()


async def test_a_record_without_assignments_has_an_empty_trie_and_stays_absent(
    shared_valkey: Valkey, connect: Connect, namespace: str
) -> None:
    absent = await (await connect(shared_valkey.url)).record(namespace, FINGERPRINT, SIZES, create=False)

    trie = await take(absent)

    assert (trie.revision, ids_of(trie)) == (0, [])
    assert shared_valkey.client().keys(f"sid:*{namespace}:*") == []


async def test_a_record_that_changes_faster_than_it_is_read_says_so(
    shared_valkey: Valkey, connect: Connect, namespace: str
) -> None:
    record = await (await connect(shared_valkey.url, changes_kept=0)).record(namespace, FINGERPRINT, SIZES)
    await record.claim([claim("a", (0, 0, 0))])

    async def write() -> None:
        for item in range(10_000):
            await record.claim([claim(f"{item}-{part}", (item % 256, part, 0)) for part in range(200)])

    async def take_until_it_fails() -> None:
        for _ in range(50):
            await take(record)

    writing = asyncio.create_task(write())
    with pytest.raises(RegistryUnavailable, match="SID_CHANGES_KEPT"):
        await take_until_it_fails()
    writing.cancel()
    await asyncio.wait([writing])


async def test_the_same_revision_is_scanned_once(start_valkey: Callable[..., Valkey], connect: Connect) -> None:
    server = start_valkey()
    record = await (await connect(server.url, buckets=10)).record("default", FINGERPRINT, SIZES)
    await churn(record, 0, 3)
    snapshots = Snapshots()

    taken = await asyncio.gather(*[snapshots.of(record) for _ in range(5)])

    assert len({snapshot.data for snapshot in taken}) == 1
    assert server.client().info("commandstats")["cmdstat_hscan"]["calls"] == SIZES[0]


# Over HTTP -----------------------------------------------------------------------------------------------------------


def test_a_decoder_takes_the_trie_and_follows_the_changes(
    service: Any, namespace: str, make_embedding: MakeEmbedding
) -> None:
    where = {"namespace": namespace}
    service.tokenize(*[{"item_id": f"{i}", "embedding": make_embedding(i)} for i in range(20)], namespace=namespace)
    taken = service.http.get("/trie", params=where)
    trie = Trie.from_bytes(taken.content)
    service.http.delete("/assignment/3", params=where)
    service.tokenize({"item_id": "4", "embedding": make_embedding(99)}, namespace=namespace, on_change="reassign")
    service.tokenize({"item_id": "new", "embedding": make_embedding(7)}, namespace=namespace)

    answer = service.http.get("/changes", params={"after": trie.revision, **where}).json()
    rows: list[list[int]] = []
    live: list[bool] = []
    for change in answer["changes"]:
        rows.append([int(number) for number in change["semantic_id"].split("-")])
        live.append(change["change"] in {"assigned", "returned"})
    followed = trie.updated(torch.tensor(rows), torch.tensor(live), answer["next_after"])
    fresh = service.http.get("/trie", params=where)

    assert taken.headers["content-type"] == "application/octet-stream"
    fingerprint = service.state.tokenizers.current.default.manifest.fingerprint
    assert taken.headers["etag"] == f'"{fingerprint}-{answer["epoch"]}-{trie.revision}"'
    assert trie.revision == 20
    assert followed.to_bytes() == fresh.content
    listed = service.http.get("/prefix/", params={"limit": 1000, **where}).json()["items"]
    assert ["-".join(map(str, row)) for row in followed.semantic_ids().tolist()] == [i["semantic_id"] for i in listed]
    (root,) = service.http.post("/next", json={"prefixes": [""], **where}).json()["next"]
    assert followed.allowed(torch.empty((1, 0), dtype=torch.int64))[0].nonzero().flatten().tolist() == root["allowed"]


def test_a_trie_that_is_known_is_not_sent_again(service: Any, namespace: str, make_embedding: MakeEmbedding) -> None:
    where = {"namespace": namespace}
    service.tokenize({"item_id": "a", "embedding": make_embedding(1)}, namespace=namespace)
    etag = service.http.get("/trie", params=where).headers["etag"]

    same = service.http.get("/trie", params=where, headers={"if-none-match": f'"7", W/{etag}'})
    service.http.delete("/assignment/a", params=where)
    other = service.http.get("/trie", params=where, headers={"if-none-match": etag})

    assert (same.status_code, same.headers["etag"], same.content) == (304, etag, b"")
    assert other.status_code == 200
    assert len(Trie.from_bytes(other.content).semantic_ids()) == 0

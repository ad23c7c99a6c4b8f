"""The promises of the registry, the same over every way to lay out its servers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from service.decoding.snapshot import take
from service.errors import RegistryUnavailable
from service.registry import Claim, Record, Registry
from service.semantic_id import SemanticId
from tests.topologies import Clustered, Embedded, Sentinels, SentinelsOverTls, Single, Tls, Topology, until

Connect = Callable[..., Awaitable[Registry]]

TOPOLOGIES = {
    "embedded": Embedded,
    "single": Single,
    "tls": Tls,
    "sentinel": Sentinels,
    "sentinel-tls": SentinelsOverTls,
    "cluster": Clustered,
}
SIZES = (4, 8, 16)
CODES = (1, 2, 3)
OTHER_CODES = (1, 2, 4)


@pytest.fixture(params=TOPOLOGIES)
async def topology(request: pytest.FixtureRequest, short_path: Path) -> AsyncIterator[Topology]:
    servers = TOPOLOGIES[request.param](short_path)
    try:
        await servers.start()
        yield servers
    finally:
        await servers.stop()


@pytest.fixture
async def records(topology: Topology, connect: Connect) -> list[Record]:
    """One record, by two registries."""
    options = {"retry_ms": 5000, "display_bytes": 32, **topology.options}
    registries = [await connect(topology.url, **options) for _ in range(2)]
    return [await registry.record("default", "0123456789abcdef", SIZES) for registry in registries]


def claim(item_id: str, codes: tuple[int, ...] = CODES, *, reassign: bool = False) -> Claim:
    return Claim(item_id, codes, f"{codes[-1]:>8}".encode(), reassign)


def title_of(item_id: str) -> str:
    return f"the title of {item_id}"


async def claimed(record: Record, *claims: Claim) -> dict[str, SemanticId]:
    results = [result.assignment for result in await record.claim(claims)]  # type: ignore[union-attr]
    return {assignment.item_id: assignment.semantic_id for assignment in results}


async def assert_all_agree(record: Record, held: dict[str, SemanticId]) -> None:
    """Forward, reverse, the tree, the trie and the changes tell of exactly these live assignments."""
    forward = await record.by_item_ids(list(held))
    assert [found and found.semantic_id for found in forward] == list(held.values())
    assert await record.by_semantic_ids(list(held.values())) == forward
    page = await record.tree.page((), len(held) + 1)
    assert page.semantic_ids == sorted(held.values())
    assert await record.count() == len(held)
    rows = sorted((*semantic_id.codes, semantic_id.suffix) for semantic_id in held.values())
    trie = await take(record)
    live: set[SemanticId] = set()
    for change in (await record.changes.after(0, 100_000)).changes:
        (live.add if change.live else live.remove)(change.semantic_id)
    assert live == set(held.values())
    assert trie.semantic_ids().tolist() == [list(row) for row in rows]


async def test_two_registries_claim_at_once_and_every_item_gets_one_id(records: list[Record]) -> None:
    item_ids = [f"item {number}" for number in range(120)]

    async def client(number: int) -> dict[str, SemanticId]:
        mine = item_ids[number * 10 : number * 10 + 40]  # overlaps its neighbours' items
        answers: dict[str, SemanticId] = {}
        for start in range(0, 40, 8):
            answers |= await claimed(records[number % 2], *map(claim, mine[start : start + 8]))
        return answers

    answers = await asyncio.gather(*map(client, range(9)))

    held = await claimed(records[0], *map(claim, item_ids))
    for answer in answers:
        assert answer.items() <= held.items()
    assert sorted(semantic_id.suffix for semantic_id in held.values()) == list(range(120))
    for record in records:
        assert await record.group_sizes([CODES]) == [120]
        await assert_all_agree(record, held)


async def test_ids_outlive_retirement_return_and_reassignment(records: list[Record]) -> None:
    one, other = records
    held = await claimed(one, *map(claim, "abc"))

    (gone,) = await other.retire(["a"])
    assert gone is not None
    assert gone.retired_at is not None
    moved = await claimed(other, claim("b", OTHER_CODES, reassign=True))
    assert moved == {"b": SemanticId(OTHER_CODES, 0)}
    await assert_all_agree(one, {"b": moved["b"], "c": held["c"]})
    (replaced,) = await one.by_semantic_ids([held["b"]])
    assert replaced is not None
    assert replaced.replaced_by == moved["b"]

    assert await claimed(one, claim("a"), claim("d")) == {"a": held["a"], "d": SemanticId(CODES, 3)}
    assert await claimed(one, claim("b", CODES, reassign=True)) == {"b": held["b"]}
    await assert_all_agree(other, {**held, "d": SemanticId(CODES, 3)})


async def test_flushed_scripts_and_a_killed_primary_lose_nothing_acknowledged(
    topology: Topology, records: list[Record]
) -> None:
    acknowledged: dict[str, SemanticId] = {}
    stopping = asyncio.Event()

    async def client(number: int) -> None:
        turn = 0
        while not stopping.is_set():
            claims = [claim(f"{number}-{turn}-{item}", (item, 0, 0)) for item in range(4)]
            with contextlib.suppress(RegistryUnavailable):
                answer = await claimed(records[number % 2], *claims)
                titles = {each.item_id.encode(): title_of(each.item_id) for each in claims}
                await records[number % 2].displays.put(titles)
                acknowledged.update(answer)
                turn += 1
            await asyncio.sleep(0.005)

    async def grown() -> None:
        enough = len(acknowledged) + 100
        await until(lambda: len(acknowledged) >= enough, "nothing more is acknowledged")

    clients = asyncio.gather(*map(client, range(6)))
    await grown()
    topology.flush_scripts()
    await grown()
    await topology.disturb()
    await grown()
    stopping.set()
    await clients

    for record in records:
        found = await record.by_item_ids(list(acknowledged))
        assert [one and one.semantic_id for one in found] == list(acknowledged.values())
        titles = await record.displays.of([item_id.encode() for item_id in acknowledged])
        assert titles == [title_of(item_id) for item_id in acknowledged]
    sizes = await records[0].group_sizes([(item, 0, 0) for item in range(4)])
    issued = [SemanticId((item, 0, 0), suffix) for item, size in enumerate(sizes) for suffix in range(size)]
    holders = await records[1].by_semantic_ids(issued)
    held = {holder.item_id: holder.semantic_id for holder in holders if holder is not None}
    assert len(held) == len(issued)  # no hole, and nobody holds two
    assert acknowledged.items() <= held.items()
    await assert_all_agree(records[1], held)

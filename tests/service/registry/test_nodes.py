"""The nodes in which Semantic IDs stand: full ones have others under them, and nothing shows it but the keys."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable

import numpy as np
import pytest
from redis.crc import key_slot

from benchmarks.occupancy import NODE_IDS
from service.errors import RegistryRefused
from service.registry import Claim, Record, Registry
from service.registry.assignment import ClaimResult
from service.registry.restoring import Restored
from service.semantic_id import SemanticId
from tests.agreement import agreed, forward
from tests.valkey import Valkey
from tests.valkey_cluster import ValkeyCluster

Connect = Callable[..., Awaitable[Registry]]
Codes = tuple[int, ...]
FINGERPRINT = "0123456789abcdef"
SIZES = (3, 4, 4, 2, 4)
PLACES = [(1, 2, 3, 1, 0), (1, 2, 3, 1, 1), (1, 2, 3, 0, 0), (1, 2, 0, 0, 0), (1, 3, 0, 1, 2), (2, 0, 0, 0, 0)]
WEIGHTS = [9, 9, 6, 3, 2, 1]  # of the first, more than their node at 2, 3 and 4 codes takes


def claim(item_id: str, codes: Codes, content: int = 0, *, reassign: bool = False) -> Claim:
    return Claim(item_id, codes, bytes([content, *codes, 0, 0]), reassign)


@pytest.fixture(params=["server", "cluster"])
def make(
    request: pytest.FixtureRequest, shared_valkey: Valkey, connect: Connect, namespace: str
) -> Callable[[str], Awaitable[Record]]:
    async def make_record(name: str) -> Record:
        url = request.getfixturevalue("shared_cluster").url if request.param == "cluster" else shared_valkey.url
        registry = await connect(url, buckets=9, retry_ms=5000)
        return await registry.record(f"{namespace}-{name}", FINGERPRINT, SIZES)

    return make_record


async def issue(record: Record, names: list[str], codes: list[Codes], *, in_bulk: bool) -> list[SemanticId]:
    """The IDs issued to new items."""
    if in_bulk:
        digests = np.zeros(len(names), np.uint64)
        suffixes = await record.claim_columns([name.encode() for name in names], digests, np.array(codes, np.int32))
        return [SemanticId(each, suffix) for each, suffix in zip(codes, suffixes.tolist(), strict=True)]
    results = await record.claim([claim(name, each) for name, each in zip(names, codes, strict=True)])
    return [result.assignment.semantic_id for result in results if isinstance(result, ClaimResult)]


async def test_suffixes_counts_and_listings_go_on_past_full_nodes(make: Callable[[str], Awaitable[Record]]) -> None:
    ours, theirs = await make("ours"), await make("theirs")
    draw = random.Random(0)
    names = [f"item {n}" for n in range(12 * NODE_IDS // 2)]
    issued: dict[Codes, list[int]] = defaultdict(list)
    for start in range(0, len(names), 96):
        some = names[start : start + 96]
        for one in await issue(ours, some, draw.choices(PLACES, WEIGHTS, k=len(some)), in_bulk=start % 192 == 0):
            issued[one.codes].append(one.suffix)
    assert {codes: sorted(found) for codes, found in issued.items()} == {
        codes: list(range(len(found))) for codes, found in issued.items()
    }
    assert len(await agreed(ours)) == len(names)

    # some go, some move to another place, some of those come back
    gone, moved = names[::5], names[1::7]
    await ours.retire(gone)
    for content, place in enumerate((PLACES[-1], PLACES[0]), start=1):
        await ours.claim([claim(name, place, content, reassign=True) for name in moved])
    await ours.claim([claim(name, PLACES[2], 3) for name in gone[::3]])
    live = await agreed(ours)
    assert len(live) == len(names) - len(gone) + len(set(gone[::3]) | (set(gone) & set(moved)))

    # put back elsewhere, in another order
    past = list((await forward(ours)).values())
    draw.shuffle(past)
    assert await theirs.restore(past) == [Restored(True)] * len(past)
    assert await agreed(theirs) == live
    sizes = Counter({one.semantic_id.codes: 0 for one in past})
    for one in past:
        sizes[one.semantic_id.codes] = max(sizes[one.semantic_id.codes], one.semantic_id.suffix + 1)
    assert await theirs.group_sizes(list(sizes)) == list(sizes.values())


async def test_those_that_went_take_room_in_a_node(shared_valkey: Valkey, connect: Connect, namespace: str) -> None:
    record = await (await connect(shared_valkey.url, buckets=1)).record(namespace, FINGERPRINT, SIZES)
    for turn in range(4):
        names = [f"{turn} {n}" for n in range(NODE_IDS // 2 + 1)]
        await record.claim([claim(name, PLACES[n % 2]) for n, name in enumerate(names)])
        await record.retire(names)

    client = shared_valkey.client()
    fields = [field for key in client.scan_iter(f"sid:{{{namespace}:*:r:*") for field in client.hkeys(key)]
    ids = Counter(field[0] for field in fields if len(field) > len(SIZES))

    assert ids == {2: NODE_IDS, 3: NODE_IDS, 4: 4}
    assert await record.tree.following([(1,), (1, 2), (1, 2, 3)]) == [[], [], []]


async def test_a_record_of_another_schema_is_refused(shared_valkey: Valkey, connect: Connect, namespace: str) -> None:
    record = await (await connect(shared_valkey.url)).record(namespace, FINGERPRINT, SIZES)
    shared_valkey.client().hset(record._keys.meta, "schema", "3")

    with pytest.raises(RegistryRefused, match=r"has schema 3 .* this service schema 4 .* version made it"):
        await (await connect(shared_valkey.url)).record(namespace, FINGERPRINT, SIZES)


async def test_a_record_of_another_schema_is_not_mended(
    shared_cluster: ValkeyCluster, connect: Connect, namespace: str
) -> None:
    registry = await connect(shared_cluster.url)
    record = await registry.record(namespace, FINGERPRINT, SIZES)
    shared_cluster.primary_of(key_slot(record._keys.meta)).client().hset(record._keys.meta, "schema", "3")
    (found,) = [one for one in await registry.compare() if one.name == record._keys.name]

    with pytest.raises(RegistryRefused, match="has schema 3, this service schema 4"):
        await registry.accept(found)

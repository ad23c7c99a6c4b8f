"""Servers of a cluster that come back older, each by itself: refused, and made whole of what is left."""

from __future__ import annotations

import random
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from redis.crc import key_slot

from service.errors import ChangesGone, RegistryOlder
from service.registry import Claim, Record, Registry
from service.registry.keys import RecordKeys
from service.semantic_id import CodeLayout
from tests.agreement import agreed
from tests.valkey_cluster import ValkeyCluster

Connect = Callable[..., Awaitable[Registry]]

FINGERPRINT = "0123456789abcdef"
SIZES = (4, 8, 16)
BUCKETS = 16


def claim(item_id: str, codes: tuple[int, ...], *, reassign: bool = False) -> Claim:
    return Claim(item_id, codes, bytes([*codes, *bytes(5)]), reassign)


def kept_of(cluster: ValkeyCluster, slots: set[int]) -> dict[bytes, tuple[Any, bytes]]:
    """A copy of what lies in these slots."""
    found = {}
    for slot in slots:
        client = cluster.primary_of(slot).client()
        for key in client.execute_command("CLUSTER", "GETKEYSINSLOT", slot, 10_000):
            found[key] = client, client.dump(key)
    return found


def put_back(cluster: ValkeyCluster, slots: set[int], copy: dict[bytes, tuple[Any, bytes]]) -> None:
    """Lets these slots be as they were, as after a failover to a replica that was late."""
    for key in kept_of(cluster, slots).keys() - copy.keys():
        slot = key_slot(key)
        cluster.primary_of(slot).client().delete(key)
    for key, (client, data) in copy.items():
        client.restore(key, 0, data, replace=True)


def namespace_where(*, items_beside_codes: bool) -> str:
    """One of whose record some items do or do not lie in a slot of the codes 0 and 2; its log lies in neither's."""
    while True:
        name = uuid.uuid4().hex
        keys = RecordKeys(f"{name}:{FINGERPRINT}", CodeLayout(SIZES), BUCKETS)
        codes = {key_slot(keys.outbox(bytes([code]))) for code in (0, 2)}
        items = {key_slot(keys.forward_bucket(bucket)) for bucket in range(BUCKETS)}
        if bool(items & codes) == items_beside_codes and key_slot(keys.meta) not in items | codes:
            return name


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("part", ["codes", "log", "items"])
async def test_a_cluster_of_which_a_part_is_older_is_made_whole(
    shared_cluster: ValkeyCluster, connect: Connect, part: str, seed: int
) -> None:
    rng, namespace = random.Random(seed), namespace_where(items_beside_codes=False)
    registries = [await connect(shared_cluster.url, buckets=BUCKETS) for _ in range(2)]
    record = await registries[0].record(namespace, FINGERPRINT, SIZES)

    async def live_on(turns: int) -> None:
        for _ in range(turns):
            items = rng.sample([f"{number}" for number in range(40)], 6)
            if rng.random() < 0.3:
                await record.retire(items)
                continue
            places = [(rng.randrange(4), rng.randrange(2), rng.randrange(2)) for _ in items]
            await record.claim(
                [claim(item, codes, reassign=rng.random() < 0.5) for item, codes in zip(items, places, strict=True)]
            )

    await live_on(10)
    keys = record._keys
    lost = {
        "codes": {key_slot(keys.outbox(bytes([code]))) for code in (0, 2)},
        "log": {key_slot(keys.meta)},
        "items": {key_slot(keys.forward_bucket(bucket)) for bucket in range(0, BUCKETS, 3)},
    }[part]
    copy = kept_of(shared_cluster, lost)
    await live_on(10)
    held = await agreed(record)
    put_back(shared_cluster, lost, copy)

    # Of its log the one that ran knows; of its codes each, also one that starts now; of items nobody.
    registry = registries[part == "codes"]
    again = await registry.record(namespace, FINGERPRINT, SIZES) if part == "codes" else record
    if part != "items":
        with pytest.raises(RegistryOlder):
            await again.claim([claim("new", (0, 0, 0))])
        with pytest.raises(RegistryOlder):
            await registry.ping()
    (found,) = [one for one in await registry.compare() if one.name == keys.name]
    assert found.older == (part != "items")
    assert await registry.accept(found)

    after = await (await connect(shared_cluster.url, buckets=BUCKETS)).record(namespace, FINGERPRINT, SIZES)
    whole = await agreed(after, whole_log=part == "codes")
    assert whole == held
    named = await after.by_semantic_ids(sorted(held.values()))
    assert [one and one.item_id for one in named] == sorted(held, key=lambda item: held[item])
    await after.claim([claim("new", (0, 0, 0))])
    assert (await agreed(after, whole_log=part == "codes")).keys() == whole.keys() | {"new"}


async def test_an_id_that_is_lost_with_its_item_is_not_issued_again_and_its_record_is_served(
    shared_cluster: ValkeyCluster, connect: Connect
) -> None:
    registry = await connect(shared_cluster.url, buckets=BUCKETS)
    record = await registry.record(namespace_where(items_beside_codes=True), FINGERPRINT, SIZES)
    lost = {key_slot(record._keys.outbox(bytes([code]))) for code in (0, 2)}
    copy = kept_of(shared_cluster, lost)
    places = [(code, code, 0) for code in range(4)]
    held = await record.claim([claim(f"{number}", places[number % 4]) for number in range(320)])
    put_back(shared_cluster, lost, copy)

    (found,) = [one for one in await registry.compare() if one.name == record._keys.name]
    assert found.older
    assert await registry.accept(found)

    after = await (await connect(shared_cluster.url, buckets=BUCKETS)).record(*_named(record), SIZES)
    left = await agreed(after, whole_log=False)
    assert 0 < len(left) < len(held)
    with pytest.raises(ChangesGone):
        await after.changes.after(0, 100)
    revision = await after.changes.revision()
    issued = {one.assignment.semantic_id for one in held}
    again = await after.claim([claim(f"new-{number}", places[number % 4]) for number in range(8)])
    assert not issued & {one.assignment.semantic_id for one in again}
    changes = (await after.changes.after(revision, 100)).changes
    assert {change.item_id for change in changes} == {f"new-{number}" for number in range(8)}


def _named(record: Record) -> tuple[str, str]:
    namespace, _, fingerprint = record._keys.name.partition(":")
    return namespace, fingerprint

"""Random lives of records whose nodes are full after a few IDs, beside a model of the promises."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest

from service.errors import RegistryUnavailable, SuffixExhausted
from service.registry import Claim, Record, Registry, atomic, steps
from service.registry.assignment import ClaimResult
from service.registry.primary import Script
from service.semantic_id import SemanticId
from tests.agreement import agreed, forward
from tests.service.registry.life import Codes, Model
from tests.valkey import Valkey
from tests.valkey_cluster import ValkeyCluster

Connect = Callable[..., Awaitable[Registry]]

FINGERPRINT = "0123456789abcdef"
LAYOUTS = [(3,), (2, 300), (2, 3, 2), (2, 2, 3, 2), (2, 2, 2, 300, 2), (1, 2, 2, 1, 2, 2)]
MAX_SUFFIX = 11
SEEDS = range(int(os.environ.get("SMALL_NODES_SEEDS", "1")))


@pytest.fixture(autouse=True, params=[1, 3])
def node_ids(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Lets nodes be full after so many IDs."""
    number: int = request.param
    for module in (atomic, steps):
        for name, script in list(vars(module).items()):
            if isinstance(script, Script) and b"NODE_IDS = 128" in script.source:
                small = script.source.replace(b"NODE_IDS = 128", b"NODE_IDS = %d" % number)
                monkeypatch.setattr(module, name, Script(small))
    return number


def digest(codes: Codes) -> bytes:
    return hashlib.sha256(repr(codes).encode()).digest()[:8]


class Life:
    """A record, its model, and chance."""

    def __init__(self, record: Record, sizes: Codes, seed: int, *, one_by_one: bool = False) -> None:
        self.record = record
        self.sizes = sizes
        self.draw = random.Random(seed)
        self.model = Model(MAX_SUFFIX)
        self.one_by_one = one_by_one
        self.items = [f"item {number}" for number in range(60)]

    def codes(self) -> Codes:
        """Few of them: the first codes are likely."""
        return tuple(min(int(self.draw.expovariate(1.2)), size - 1) for size in self.sizes)

    async def claim(self) -> None:
        claims = []
        for item in self.draw.choices(self.items, k=self.draw.choice([1, 3, 6 if self.one_by_one else 12])):
            codes = self.codes()
            others = self.draw.sample(range(min(self.sizes[-1], 4)), self.draw.choice([0, 0, 1, 2]))
            claims.append(Claim(item, codes, digest(codes), self.draw.random() < 0.5, tuple(others)))
        batches = [[one] for one in claims] if self.one_by_one else [claims]
        results = [result for batch in batches for result in await self.record.claim(batch)]
        for one, result in zip(claims, results, strict=True):
            places = list(dict.fromkeys([one.codes, *((*one.codes[:-1], last) for last in one.alternatives)]))
            semantic_id, created = self.model.claim(one.item_id, places, reassign=one.reassign)
            if isinstance(result, SuffixExhausted):
                assert semantic_id is None
            else:
                assert isinstance(result, ClaimResult)
                assert (result.assignment.semantic_id, result.created) == (semantic_id, created)
                assert result.assignment.content_changed == self.model.content_changed[one.item_id]

    async def claim_columns(self) -> None:
        number = 1 if self.one_by_one else self.draw.choice([1, 5, 40])
        items = self.draw.choices(self.items, k=number)
        rows = [self.codes() for _ in items]
        new = {item for item in items if item not in self.model.held}
        digests = np.frombuffer(b"".join(map(digest, rows)), np.uint64)
        found = await self.record.claim_columns([item.encode() for item in items], digests, np.array(rows, np.int32))
        for place in sorted(range(number), key=rows.__getitem__):
            suffix = -1
            if items[place] in new:
                issued, _ = self.model.claim(items[place], [rows[place]], reassign=False)
                if issued:
                    suffix = issued.suffix
                    new.remove(items[place])
            assert found[place] == suffix

    async def retire(self) -> None:
        items = self.draw.sample(self.items, self.draw.choice([1, 5, 12 if self.one_by_one else 30]))
        if self.draw.random() < 0.3:  # all that is live under a prefix
            prefix = self.codes()[: self.draw.randint(0, len(self.sizes))]
            items = [item for one, item in self.model.live.items() if one.codes[: len(prefix)] == prefix]
        for batch in [[item] for item in items] if self.one_by_one else [items]:
            await self.record.retire(batch)
        for item in items:
            self.model.retire(item)

    async def check(self) -> None:
        live = await agreed(self.record)
        assert live == {item: one for one, item in self.model.live.items()}
        known = list(self.model.holders)
        reverse = await self.record.by_semantic_ids(known)
        assert {one.semantic_id: one.item_id for one in reverse if one} == self.model.holders
        for one in reverse:
            current = self.model.held[one.item_id]
            assert one.replaced_by == (None if one.semantic_id == current else current)
            assert bool(one.retired_at) == (one.item_id in self.model.retired)
        beyond = [SemanticId(codes, size) for codes, size in Counter(one.codes for one in known).items()]
        assert await self.record.by_semantic_ids(beyond) == [None] * len(beyond)
        groups = list({one.codes for one in known} | {self.codes() for _ in range(5)})
        expected = [self.model.group_size(codes) for codes in groups]
        assert await self.record.group_sizes(groups) == expected
        assert (await self.record.group_size_columns(np.array(groups, np.int32))).tolist() == expected
        told = (await self.record.changes.after(0, 100_000)).changes
        assert [tuple(change)[1:] for change in told] == self.model.changes
        await self.check_tree(sorted(self.model.live))

    async def check_tree(self, ids: list[SemanticId]) -> None:
        rows = [(*one.codes, one.suffix) for one in ids]
        prefixes = {(*one.codes, 0)[:depth] for one in self.model.holders for depth in range(len(self.sizes) + 1)}
        prefixes |= {self.codes()[: self.draw.randint(0, len(self.sizes))] for _ in range(5)} | {()}
        ordered = list(prefixes)
        expected = [sorted({row[len(prefix)] for row in rows if row[: len(prefix)] == prefix}) for prefix in ordered]
        assert await self.record.tree.following(ordered) == expected
        children = await self.record.tree.children(ordered)
        assert [list(counts) for counts in children] == expected
        for prefix, counts in zip(ordered, children, strict=True):
            assert counts == Counter(row[len(prefix)] for row in rows if row[: len(prefix)] == prefix)
        for prefix in self.draw.sample(ordered, min(4, len(ordered))):
            under = [one for one in ids if one.codes[: len(prefix)] == prefix]
            limit = self.draw.choice([1, 2, 7])
            paged: list[SemanticId] = []
            more, after = True, None
            while more:
                page = await self.record.tree.page(prefix, limit, after)
                assert len(page.semantic_ids) <= limit
                assert page.semantic_ids or not page.more
                paged += page.semantic_ids
                more, after = page.more, page.semantic_ids[-1] if page.semantic_ids else None
            assert paged == under

    async def check_restored(self, other: Record) -> None:
        past = list((await forward(self.record)).values())
        former = [one for one in await self.record.by_semantic_ids(list(self.model.holders)) if one and one.replaced_by]
        self.draw.shuffle(past)
        self.draw.shuffle(former)
        for start in range(0, len(past), 9):
            assert all(one.created for one in await other.restore(past[start : start + 9]))
        restored = await other.restore(former)
        assert all(one.created for one in restored), restored
        assert not any(one.created for one in await other.restore([*past, *former]))
        self.record = other
        told = (await other.changes.after(0, 100_000)).changes
        self.model.changes = [tuple(change)[1:] for change in told]  # type: ignore[misc]
        await self.check()

    async def live(self, turns: int, checks: int) -> None:
        acts = [self.claim, self.claim, self.claim, self.claim_columns, self.retire]
        for turn in range(turns):
            await self.draw.choice(acts)()
            if turn % checks == checks - 1:
                await self.check()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("sizes", LAYOUTS, ids=str)
async def test_a_life_in_small_nodes_is_that_of_the_model(
    shared_valkey: Valkey, connect: Connect, namespace: str, sizes: Codes, seed: int
) -> None:
    registry = await connect(shared_valkey.url, buckets=random.Random(seed).choice([1, 3, 50]), timeout_ms=20_000)
    record, other = [
        await registry.record(f"{namespace}-{n}", FINGERPRINT, sizes, max_suffix=MAX_SUFFIX) for n in range(2)
    ]
    life = Life(record, sizes, seed)

    await life.live(20, 5)
    await life.check_restored(other)
    await life.live(6, 6)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("sizes", LAYOUTS[-1:], ids=str)
async def test_a_life_in_small_nodes_of_a_cluster_is_that_of_the_model(
    shared_cluster: ValkeyCluster, connect: Connect, namespace: str, sizes: Codes, seed: int
) -> None:
    registry = await connect(shared_cluster.url, buckets=9, timeout_ms=20_000)
    record, other = [
        await registry.record(f"{namespace}-{n}", FINGERPRINT, sizes, max_suffix=MAX_SUFFIX) for n in range(2)
    ]
    life = Life(record, sizes, seed, one_by_one=True)

    await life.live(12, 6)
    await life.check_restored(other)
    await life.live(3, 3)


def may_break(record: Record, draw: random.Random) -> None:
    """Lets any write of this worker break behind the first half of its calls: others find the rest undone."""
    stepped: Any = record._items._steps  # type: ignore[union-attr]
    write = stepped._write

    async def write_or_break(calls: list[Any]) -> list[Any]:
        if calls and draw.random() < 0.15:
            await write(calls[: len(calls) // 2])
            raise RegistryUnavailable("It broke.")
        done: list[Any] = await write(calls)
        return done

    stepped._write = write_or_break


@pytest.mark.parametrize("seed", SEEDS)
async def test_what_breaks_in_small_nodes_others_finish(
    shared_cluster: ValkeyCluster, connect: Connect, namespace: str, seed: int
) -> None:
    sizes = LAYOUTS[-2]
    records = []
    for _ in range(4):
        registry = await connect(shared_cluster.url, buckets=9, timeout_ms=20_000)
        records.append(await registry.record(namespace, FINGERPRINT, sizes, max_suffix=MAX_SUFFIX))
    *workers, reader = records
    draw = random.Random(seed)
    chance = Life(reader, sizes, seed)
    acknowledged: dict[str, set[SemanticId]] = {}
    for record in workers:
        may_break(record, draw)

    async def work(record: Record) -> None:
        items = draw.sample(chance.items[:20], draw.randint(1, 4))
        if draw.random() < 0.3:
            await record.retire(items)
            return
        claims = [Claim(item, codes := chance.codes(), digest(codes), draw.random() < 0.5) for item in items]
        for result in await record.claim(claims):
            if isinstance(result, ClaimResult):
                acknowledged.setdefault(result.assignment.item_id, set()).add(result.assignment.semantic_id)

    for _ in range(15):
        done = await asyncio.gather(*[work(record) for record in workers for _ in range(2)], return_exceptions=True)
        assert all(one is None or isinstance(one, RegistryUnavailable) for one in done), done

    past = await reader.by_item_ids(chance.items[:20])
    await agreed(reader)
    assert acknowledged
    for item, ids in acknowledged.items():
        assert {one and one.item_id for one in await reader.by_semantic_ids(sorted(ids))} == {item}
        assert len({one.codes for one in ids}) == len(ids)
    groups = list({one.codes for ids in acknowledged.values() for one in ids})
    for codes, size in zip(groups, await reader.group_sizes(groups), strict=True):
        named = await reader.by_semantic_ids([SemanticId(codes, suffix) for suffix in range(size)])
        assert len({one and one.item_id for one in named} - {None}) == size
    assert [one and one.semantic_id for one in await reader.by_item_ids(chance.items[:20])] == [
        one and one.semantic_id for one in past
    ]

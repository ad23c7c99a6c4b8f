"""Any sequence of claims, retirements, returns, reassignments and restarts, against a simple model of the promises."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
import uuid
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from models import Trie
from service.decoding.snapshot import follow, take
from service.errors import SuffixExhausted
from service.registry import Record, Registry
from service.registry.assignment import Claim, ClaimResult
from service.registry.embedded import EmbeddedValkey
from tests.service.registry.life import Codes, Model
from tests.valkey_cluster import ValkeyCluster

SIZES = (2, 3, 256)
MAX_SUFFIX = 2

ITEM_IDS = st.sampled_from(["a", "b", "c", "d", "e", "f", "1", "é,"])
CODES = st.tuples(st.integers(0, 1), st.just(2), st.sampled_from([0, 44, 255]))
ALTERNATIVES = st.lists(st.sampled_from([0, 1, 44, 255]), max_size=3, unique=True).map(tuple)
CLAIMS = st.lists(st.tuples(ITEM_IDS, CODES, st.booleans(), ALTERNATIVES), min_size=1, max_size=6)


class LifeAgainstAModel(RuleBasedStateMachine):
    """The record beside its model."""

    namespace = "default"
    sorts = True  # whether changes of columns come by the order of their codes

    @initialize()
    def begin(self) -> None:
        self.directory = tempfile.TemporaryDirectory(prefix="semid-")
        self.runner = asyncio.Runner()
        self.runner.run(self.open())
        self.model = Model(MAX_SUFFIX)
        self.followed = Trie.of(torch.empty((0, len(SIZES) + 1), dtype=torch.int64), SIZES)

    async def open(self) -> None:
        url = await self.start()
        self.registry = await Registry.connect(url, retry_ms=20_000, buckets=3)
        self.record: Record = await self.registry.record(
            self.namespace, "0123456789abcdef", SIZES, max_suffix=MAX_SUFFIX
        )

    async def start(self) -> str:
        self.server = await EmbeddedValkey(Path(self.directory.name)).start()
        return self.server.url

    def kill_server(self) -> None:
        assert self.server.pid is not None
        os.kill(self.server.pid, signal.SIGKILL)

    async def stop(self) -> None:
        await self.server.stop()

    async def send(self, claims: list[Claim]) -> list[Any]:
        return await self.record.claim(claims)

    @rule(batch=CLAIMS)
    def claim(self, batch: list[tuple[str, Codes, bool, tuple[int, ...]]]) -> None:
        claims = [
            Claim(item_id, codes, bytes([*codes, *bytes(5)]), reassign, alternatives)
            for item_id, codes, reassign, alternatives in batch
        ]

        results = self.runner.run(self.send(claims))

        for (item_id, codes, reassign, alternatives), result in zip(batch, results, strict=True):
            places = list(dict.fromkeys([codes, *((*codes[:-1], last) for last in alternatives)]))
            semantic_id, created = self.model.claim(item_id, places, reassign=reassign)
            if isinstance(result, SuffixExhausted):
                assert semantic_id is None
            else:
                assert isinstance(result, ClaimResult)
                assert (result.assignment.semantic_id, result.created) == (semantic_id, created)
                assert result.assignment.content_changed == self.model.content_changed[item_id]

    async def send_columns(self, batch: list[tuple[str, Codes]]) -> list[int]:
        codes = np.array([codes for _, codes in batch], np.int32)
        digests = np.frombuffer(b"".join(bytes([*codes, *bytes(5)]) for _, codes in batch), np.uint64)
        return (await self.record.claim_columns([item.encode() for item, _ in batch], digests, codes)).tolist()

    @rule(batch=st.lists(st.tuples(ITEM_IDS, CODES), min_size=1, unique_by=lambda item: item[0]))
    def claim_columns(self, batch: list[tuple[str, Codes]]) -> None:
        new = [item_id not in self.model.held for item_id, _ in batch]

        suffixes = self.runner.run(self.send_columns(batch))

        # In the order of their codes; those that are known are left alone.
        order = sorted(range(len(batch)), key=lambda place: batch[place][1]) if self.sorts else range(len(batch))
        for place in order:
            (item_id, codes), issued = batch[place], None
            if new[place]:
                issued, _ = self.model.claim(item_id, [codes], reassign=False)
            assert suffixes[place] == (-1 if issued is None else issued.suffix)

    @rule(item_ids=st.lists(ITEM_IDS, max_size=4))
    def retire(self, item_ids: list[str]) -> None:
        retired = self.runner.run(self.record.retire(item_ids))

        assert [found and found.semantic_id for found in retired] == [self.model.held.get(item) for item in item_ids]
        assert all(found.retired_at for found in retired if found)
        for item_id in item_ids:
            self.model.retire(item_id)

    @rule()
    def kill(self) -> None:
        self.kill_server()

    @rule()
    def restart(self) -> None:
        self.runner.run(self.registry.close())
        self.runner.run(self.stop())
        self.runner.run(self.open())

    @invariant()
    def forward_and_reverse_agree(self) -> None:
        forward = self.run(self.record.by_item_ids(list(self.model.held)))
        reverse = self.run(self.record.by_semantic_ids(list(self.model.holders)))

        assert {found.item_id: found.semantic_id for found in forward} == self.model.held
        assert {found.item_id for found in forward if found.retired_at} == self.model.retired
        assert {found.semantic_id: found.item_id for found in reverse} == self.model.holders
        for found in reverse:
            current = self.model.held[found.item_id]
            assert found.replaced_by == (None if found.semantic_id == current else current)
            assert bool(found.retired_at) == (found.item_id in self.model.retired)
        assert {found.semantic_id: found.item_id for found in reverse if found.live} == self.model.live
        assert self.run(self.record.count()) == len(self.model.live)

    @invariant()
    def the_tree_is_that_of_the_live_ids(self) -> None:
        live = [(*semantic_id.codes, semantic_id.suffix) for semantic_id in self.model.live]
        prefixes = {numbers[:depth] for numbers in [(*i.codes, 0) for i in self.model.holders] for depth in range(4)}

        children = self.run(self.record.tree.children(list(prefixes)))
        page = self.run(self.record.tree.page((), 1000))

        for prefix, found in zip(prefixes, children, strict=True):
            depth = len(prefix)
            assert found == Counter(numbers[depth] for numbers in live if numbers[:depth] == prefix)
        assert page.semantic_ids == sorted(self.model.live)

    @invariant()
    def a_fresh_trie_and_one_that_follows_are_that_of_the_live_ids(self) -> None:
        fresh = self.run(take(self.record))
        self.followed = self.run(follow(self.record, self.followed))

        live = sorted((*semantic_id.codes, semantic_id.suffix) for semantic_id in self.model.live)
        assert [tuple(row) for row in fresh.semantic_ids().tolist()] == live
        assert self.followed.to_bytes() == fresh.to_bytes()

    @invariant()
    def every_change_is_told(self) -> None:
        told = self.run(self.record.changes.after(0, 10_000)).changes

        assert [change.revision for change in told] == list(range(1, len(told) + 1))
        assert [tuple(change)[1:] for change in told] == self.model.changes

    def run(self, work: Any) -> Any:
        return self.runner.run(work)

    def teardown(self) -> None:
        if hasattr(self, "runner"):
            self.runner.run(self.registry.close())
            self.runner.run(self.stop())
            self.runner.close()
            self.directory.cleanup()


class LifeOnACluster(LifeAgainstAModel):
    """The same, one claim after the other: those of one call are done side by side."""

    cluster: ClassVar[ValkeyCluster]
    sorts = False

    @initialize()
    def begin(self) -> None:
        self.namespace = uuid.uuid4().hex
        super().begin()

    async def start(self) -> str:
        return self.cluster.url

    def kill_server(self) -> None:
        self.cluster.nodes[0].restart()

    async def stop(self) -> None:
        pass

    async def send(self, claims: list[Claim]) -> list[Any]:
        return [result for one in claims for result in await self.record.claim([one])]

    async def send_columns(self, batch: list[tuple[str, Codes]]) -> list[int]:
        suffixes = []
        for one in batch:
            suffixes += await super().send_columns([one])
        return suffixes


def run(machine: type[LifeAgainstAModel], examples: int) -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        machine,
        settings=settings(
            max_examples=int(os.environ.get("LIFE_EXAMPLES", examples)),
            stateful_step_count=16,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_any_sequence_of_lives_keeps_the_promises() -> None:
    run(LifeAgainstAModel, 12)


def test_any_sequence_of_lives_keeps_the_promises_on_a_cluster(shared_cluster: ValkeyCluster) -> None:
    LifeOnACluster.cluster = shared_cluster
    run(LifeOnACluster, 8)

"""The use case with its real parts, where callers leave at any moment and replicas share one registry."""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import pytest

from models import Tokenizer, read_manifest
from service.answers import Answer
from service.assignments import Assignments
from service.batching.batcher import Batcher
from service.batching.capacity import Capacity
from service.bulk.column_tokenization import ColumnTokenization
from service.bulk.entries import EntryTokenization
from service.bulk.row_thread import RowThread
from service.content import ItemReader
from service.errors import (
    MalformedSemanticId,
    NotAssigned,
    RegistryUnavailable,
    TooManyItems,
    UnknownTokenizer,
)
from service.explaining.explainer import Explainer
from service.metrics import Metrics
from service.overflow import OverflowPolicy
from service.records import Records
from service.registry import Registry
from service.schemas import LookupRequest, RecordOptions, TokenizeRequest
from service.stats.drift import ErrorWindow
from service.tokenization import TOGETHER, Tokenization
from service.tokenizers import LoadedTokenizer, Tokenizers, TokenizerSet

MakeEmbedding = Callable[[int], list[float]]
Connect = Callable[..., Awaitable[Registry]]


class UseCases(NamedTuple):
    tokenization: EntryTokenization
    assignments: Assignments


Compose = Callable[..., Awaitable[UseCases]]


@pytest.fixture
async def compose(
    tokenizer: Tokenizer, checkpoint: Path, connect: Connect, row_thread: RowThread
) -> AsyncIterator[Compose]:
    """The use cases on a registry's URL: as many replicas as a test asks for, one model."""
    manifest = read_manifest(checkpoint)
    batcher = Batcher(
        tokenizer,
        batch_tokens=4096,
        batch_s=1.0,
        capacity=Capacity(100_000),
        metrics=Metrics().of_model(manifest.full_name),
    )
    batcher.start()
    reader = ItemReader(tokenizer, max_text_bytes=1000)
    loaded = LoadedTokenizer(manifest, reader, batcher, Explainer(tokenizer), ErrorWindow(None))

    async def compose(url: str, *, max_items: int = 100, max_lookups: int = 1000) -> UseCases:
        tokenizers, records, metrics = (
            Tokenizers(TokenizerSet((loaded,))),
            Records(await connect(url, timeout_ms=2000)),
            Metrics(),
        )
        tokenization = Tokenization(
            tokenizers=tokenizers, records=records, max_items=max_items, overflow=OverflowPolicy({}), metrics=metrics
        )
        columns = ColumnTokenization(tokenization, records, metrics, row_thread)
        entries = EntryTokenization(tokenization, columns, row_thread)
        return UseCases(entries, Assignments(tokenizers, records, max_lookups, metrics))

    yield compose
    await batcher.stop()


def request(namespace: str, *items: Any, **members: Any) -> TokenizeRequest:
    return TokenizeRequest(items=list(items), namespace=namespace, **members)


def entries_of(answer: Answer) -> list[Answer]:
    """As the caller reads them."""
    return orjson.loads(orjson.dumps(answer))["items"]


async def test_replicas_agree_on_every_item(
    compose: Compose, shared_valkey: Any, namespace: str, make_embedding: MakeEmbedding
) -> None:
    replicas = [(await compose(shared_valkey.url)).tokenization for _replica in range(3)]
    chance = random.Random(5)
    items = [{"item_id": f"{i}", "embedding": make_embedding(i % 4)} for i in range(40)]

    answers = await asyncio.gather(
        *(
            replica.tokenize(request(namespace, *chance.sample(items, 40)))
            for replica in replicas
            for _repeat in range(4)
        )
    )

    held: dict[str, set[str]] = defaultdict(set)
    entries = [entry for answer in answers for entry in entries_of(answer)]
    for entry in entries:
        held[entry["item_id"]].add(entry["semantic_id"])
    assert all(len(ids) == 1 for ids in held.values())
    assert len(set.union(*held.values())) == 40
    assert sum(entry["created"] for entry in entries) == 40


@pytest.mark.parametrize("size", [TOGETHER, TOGETHER + 6], ids=["in micro-batches of several", "alone"])
async def test_a_caller_who_leaves_at_any_moment_leaves_nothing_half_assigned(
    compose: Compose, shared_valkey: Any, namespace: str, make_embedding: MakeEmbedding, size: int
) -> None:
    tokenization, assignments = await compose(shared_valkey.url)
    chance = random.Random(7)
    items = [{"item_id": f"{i}", "embedding": make_embedding(i % 3)} for i in range(60)]
    left = 0
    for _round in range(60):
        callers = [
            asyncio.create_task(tokenization.tokenize(request(namespace, *chance.sample(items, size))))
            for _caller in range(3)
        ]
        await asyncio.sleep(chance.random() * 0.002)
        callers[0].cancel()
        outcomes = await asyncio.gather(*callers, return_exceptions=True)
        left += isinstance(outcomes[0], asyncio.CancelledError)
        assert not any(isinstance(outcome, BaseException) for outcome in outcomes[1:])

    everything = entries_of(await tokenization.tokenize(request(namespace, *items)))

    options = RecordOptions(namespace=namespace)
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for entry in everything:
        groups[tuple(entry["codes"])].append(entry["suffix"])
        forward = await assignments.of_item(entry["item_id"], options)
        reverse = await assignments.of_semantic_id(entry["semantic_id"], options)
        assert forward["semantic_id"] == entry["semantic_id"]
        assert reverse["item_id"] == entry["item_id"]
    assert left > 10
    assert all(sorted(suffixes) == list(range(len(suffixes))) for suffixes in groups.values())


async def test_nothing_is_acknowledged_that_the_registry_did_not_confirm(
    compose: Compose, start_valkey: Callable[..., Any], namespace: str, make_embedding: MakeEmbedding
) -> None:
    valkey = start_valkey()
    tokenization, assignments = await compose(valkey.url)
    known, new = ({"item_id": name, "embedding": make_embedding(1)} for name in ("known", "new"))
    await tokenization.tokenize(request(namespace, known))
    valkey.kill()

    for attempt in (request(namespace, new), request(namespace, known), request(namespace, new, assign=False)):
        with pytest.raises(RegistryUnavailable):
            await tokenization.tokenize(attempt)
    with pytest.raises(RegistryUnavailable):
        await assignments.of_semantic_ids(LookupRequest(semantic_ids=["1-2-3-0"], namespace=namespace))

    valkey.restart()
    (entry,) = entries_of(await tokenization.tokenize(request(namespace, known)))
    assert not entry["created"]


async def test_the_limits_of_a_request_are_kept(compose: Compose, shared_valkey: Any, namespace: str) -> None:
    tokenization, assignments = await compose(shared_valkey.url, max_items=2, max_lookups=2)

    with pytest.raises(TooManyItems, match="3 items, at most 2"):
        await tokenization.tokenize(request(namespace, 1, 2, 3))
    with pytest.raises(TooManyItems, match="3 Semantic IDs, at most 2"):
        await assignments.of_semantic_ids(LookupRequest(semantic_ids=["1", "2", "3"], namespace=namespace))


async def test_only_the_loaded_tokenizer_answers(compose: Compose, shared_valkey: Any, namespace: str) -> None:
    tokenization, assignments = await compose(shared_valkey.url)
    manifest = assignments._tokenizers.current.default.manifest
    item = {"item_id": "a", "text": "kettle"}

    for other in ("other", "small@0000000000000000", "", "Small"):
        with pytest.raises(UnknownTokenizer, match=manifest.full_name):
            await tokenization.tokenize(request(namespace, item, tokenizer=other))
        with pytest.raises(UnknownTokenizer):
            await assignments.of_item("a", RecordOptions(namespace=namespace, tokenizer=other))
    with pytest.raises(NotAssigned):
        await assignments.of_item("a", RecordOptions(namespace=namespace, tokenizer=manifest.full_name))
    with pytest.raises(MalformedSemanticId):
        await assignments.of_semantic_id("1-2-3", RecordOptions(namespace=namespace, tokenizer=manifest.name))

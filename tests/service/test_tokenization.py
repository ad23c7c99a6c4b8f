"""The use case with its real parts, where callers leave at any moment and replicas share one registry."""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from models import Tokenizer, read_manifest
from service.batching.batcher import Batcher
from service.batching.capacity import Capacity
from service.content import ItemReader
from service.errors import (
    MalformedSemanticId,
    NotAssigned,
    Overloaded,
    RegistryUnavailable,
    TooManyItems,
    UnknownTokenizer,
)
from service.explaining.explainer import Explainer
from service.metrics import Metrics
from service.outright import Outright
from service.overflow import Overflow, OverflowPolicy
from service.records import Records
from service.registry import Record, Registry
from service.schemas import LookupRequest, TokenizeRequest
from service.stats.drift import ErrorWindow
from service.tokenization import Limits, Tokenization
from service.tokenizers import LoadedTokenizer, Tokenizers, TokenizerSet

MakeEmbedding = Callable[[int], list[float]]
Connect = Callable[..., Awaitable[Registry]]
Compose = Callable[..., Awaitable[Tokenization]]


@pytest.fixture
async def compose(tokenizer: Tokenizer, checkpoint: Path, connect: Connect) -> AsyncIterator[Compose]:
    """The use case on a registry's URL: as many replicas as a test asks for, one model."""
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

    async def compose(url: str, **limits: int) -> Tokenization:
        return Tokenization(
            tokenizers=Tokenizers(TokenizerSet((loaded,))),
            records=Records(await connect(url, timeout_ms=2000)),
            limits=Limits(**{"max_items": 100, "max_lookups": 1000, **limits}),
            overflow=OverflowPolicy({}),
            metrics=Metrics(),
        )

    yield compose
    await batcher.stop()


def request(namespace: str, *items: Any, **members: Any) -> TokenizeRequest:
    return TokenizeRequest(items=list(items), namespace=namespace, **members)


async def test_replicas_agree_on_every_item(
    compose: Compose, shared_valkey: Any, namespace: str, make_embedding: MakeEmbedding
) -> None:
    replicas = [await compose(shared_valkey.url) for _replica in range(3)]
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
    for answer in answers:
        for entry in answer["items"]:
            held[entry["item_id"]].add(entry["semantic_id"])
    assert all(len(ids) == 1 for ids in held.values())
    assert len(set.union(*held.values())) == 40
    assert sum(entry["created"] for answer in answers for entry in answer["items"]) == 40


async def test_a_caller_who_leaves_at_any_moment_leaves_nothing_half_assigned(
    compose: Compose, shared_valkey: Any, namespace: str, make_embedding: MakeEmbedding
) -> None:
    tokenization = await compose(shared_valkey.url)
    chance = random.Random(7)
    items = [{"item_id": f"{i}", "embedding": make_embedding(i % 3)} for i in range(60)]
    left = 0
    for _round in range(60):
        callers = [
            asyncio.create_task(tokenization.tokenize(request(namespace, *chance.sample(items, 10))))
            for _caller in range(3)
        ]
        await asyncio.sleep(chance.random() * 0.002)
        callers[0].cancel()
        outcomes = await asyncio.gather(*callers, return_exceptions=True)
        left += isinstance(outcomes[0], asyncio.CancelledError)
        assert not any(isinstance(outcome, BaseException) for outcome in outcomes[1:])

    everything = (await tokenization.tokenize(request(namespace, *items)))["items"]

    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for entry in everything:
        groups[tuple(entry["codes"])].append(entry["suffix"])
        forward = await tokenization.by_item_id(entry["item_id"], namespace, None)
        reverse = await tokenization.by_semantic_id(entry["semantic_id"], namespace, None)
        assert forward["semantic_id"] == entry["semantic_id"]
        assert reverse["item_id"] == entry["item_id"]
    assert left > 10
    assert all(sorted(suffixes) == list(range(len(suffixes))) for suffixes in groups.values())


async def test_nothing_is_acknowledged_that_the_registry_did_not_confirm(
    compose: Compose, start_valkey: Callable[..., Any], namespace: str, make_embedding: MakeEmbedding
) -> None:
    valkey = start_valkey()
    tokenization = await compose(valkey.url)
    known, new = ({"item_id": name, "embedding": make_embedding(1)} for name in ("known", "new"))
    await tokenization.tokenize(request(namespace, known))
    valkey.kill()

    for attempt in (request(namespace, new), request(namespace, known), request(namespace, new, assign=False)):
        with pytest.raises(RegistryUnavailable):
            await tokenization.tokenize(attempt)
    with pytest.raises(RegistryUnavailable):
        await tokenization.lookup(LookupRequest(semantic_ids=["1-2-3-0"], namespace=namespace))

    valkey.restart()
    (entry,) = (await tokenization.tokenize(request(namespace, known)))["items"]
    assert not entry["created"]


async def test_the_limits_of_a_request_are_kept(compose: Compose, shared_valkey: Any, namespace: str) -> None:
    tokenization = await compose(shared_valkey.url, max_items=2, max_lookups=2)

    with pytest.raises(TooManyItems, match="3 items, at most 2"):
        await tokenization.tokenize(request(namespace, 1, 2, 3))
    with pytest.raises(TooManyItems, match="3 Semantic IDs, at most 2"):
        await tokenization.lookup(LookupRequest(semantic_ids=["1", "2", "3"], namespace=namespace))


async def test_only_the_loaded_tokenizer_answers(compose: Compose, shared_valkey: Any, namespace: str) -> None:
    tokenization = await compose(shared_valkey.url)
    manifest = tokenization._tokenizers.current.default.manifest
    item = {"item_id": "a", "text": "kettle"}

    for other in ("other", "small@0000000000000000", "", "Small"):
        with pytest.raises(UnknownTokenizer, match=manifest.full_name):
            await tokenization.tokenize(request(namespace, item, tokenizer=other))
        with pytest.raises(UnknownTokenizer):
            await tokenization.by_item_id("a", namespace, other)
    with pytest.raises(NotAssigned):
        await tokenization.by_item_id("a", namespace, manifest.full_name)
    with pytest.raises(MalformedSemanticId):
        await tokenization.by_semantic_id("1-2-3", namespace, manifest.name)


class Always(Outright):
    """Claims outright whatever came lately."""

    def suits(self, items: Any) -> bool:
        self._known_share = 0.0
        return super().suits(items)


class Never(Outright):
    """Asks first whatever came lately."""

    def suits(self, _items: Any) -> bool:
        return False


def counted(tokenization: Tokenization, call: str) -> tuple[float, dict[str, float]]:
    """How often the registry was called so, and the items by outcome."""
    (seconds,), (items,) = tokenization._metrics.registry_seconds.collect(), tokenization._metrics.items.collect()
    calls = sum(one.value for one in seconds.samples if one.name.endswith("_count") and one.labels["call"] == call)
    return calls, {one.labels["outcome"]: one.value for one in items.samples if one.name.endswith("_total")}


async def test_items_claimed_outright_are_answered_as_if_it_had_been_asked_first_what_they_hold(
    compose: Compose, shared_valkey: Any, namespace: str, make_embedding: MakeEmbedding
) -> None:
    # given two suffixes, and beyond them the next-nearest codewords in one namespace of two
    asking, outright = [await compose(shared_valkey.url) for _ in range(2)]
    asking._outright, outright._outright = Never(), Always()
    for one in (asking, outright):
        loaded = one._tokenizers.current.default
        bounded = replace(loaded, manifest=replace(loaded.manifest, max_suffix=1))
        one._tokenizers = Tokenizers(TokenizerSet((bounded,)))
        one._overflow = OverflowPolicy({f"{namespace}-{turn}-0": Overflow.NEXT_NEAREST for turn in "ao"})
    chance = random.Random(11)
    seen: set[str] = set()
    for _ in range(150):
        # when new, known, changed and faulty items come, some are retired
        catalogue, count = chance.randrange(2), chance.randint(1, 4)
        items = [
            {
                "item_id": f"{number}",
                "embedding": [1.0] if chance.random() < 0.1 else make_embedding(chance.randrange(4)),
            }
            for number in chance.sample(range(12), count)
        ]
        members = {"on_change": chance.choice(["keep", "reassign"])}
        retired = f"{chance.randrange(12)}" if chance.random() < 0.2 else None
        answers = []
        for one, turn in ((asking, "a"), (outright, "o")):
            its = f"{namespace}-{turn}-{catalogue}"
            answers.append((await one.tokenize(request(its, *items, **members)))["items"])
            if retired in {entry.get("item_id") for entry in answers[-1] if "error" not in entry}:
                await one.retire(str(retired), its, None)
        # then
        for one, other in zip(*answers, strict=True):
            known = "margin" in one and one["margin"] is None
            for measure in ("margin", "quantization_error"):  # their last digits may change with the batch
                pair = one.pop(measure, None), other.pop(measure, None)
                assert pair == (None, None) or pair[0] == pytest.approx(pair[1], rel=1e-6)
            assert one == other
            seen |= {key for key, value in one.items() if value is True} | ({"error"} & one.keys()) | {f"known {known}"}
    assert seen == {"created", "content_changed", "overflow", "error", "known True", "known False"}
    assert counted(outright, "recall")[0] < 10  # of requests in which no item is valid
    assert counted(asking, "recall")[0] == 150
    assert counted(outright, "")[1] == counted(asking, "")[1]


async def test_where_most_that_comes_is_new_it_is_no_longer_asked_what_is_known(
    compose: Compose, shared_valkey: Any, namespace: str, make_embedding: MakeEmbedding
) -> None:
    tokenization = await compose(shared_valkey.url)

    async def send(number: int) -> Any:
        return await tokenization.tokenize(request(namespace, {"item_id": f"{number}", "embedding": make_embedding(1)}))

    for number in range(60):
        await send(number)
    asked, _ = counted(tokenization, "recall")
    assert 20 < asked < 50
    for number in range(20):
        await send(number)
    assert 15 < counted(tokenization, "recall")[0] - asked < 20  # a few are encoded before it asks again


async def test_what_is_known_is_answered_though_the_model_takes_nothing_and_the_registry_no_claims(
    compose: Compose,
    shared_valkey: Any,
    namespace: str,
    make_embedding: MakeEmbedding,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenization = await compose(shared_valkey.url)
    tokenization._outright = Always()
    known, new = ({"item_id": name, "embedding": make_embedding(2)} for name in ("known", "new"))
    await tokenization.tokenize(request(namespace, known))
    batcher = tokenization._tokenizers.current.default.batcher

    with monkeypatch.context() as patched:
        patched.setattr(batcher._capacity, "check_room", _full)
        (entry,) = (await tokenization.tokenize(request(namespace, known)))["items"]
        assert not entry["created"]
        with pytest.raises(Overloaded):
            await tokenization.tokenize(request(namespace, new))
    with monkeypatch.context() as patched:
        patched.setattr(Record, "claim", _unavailable)
        with pytest.raises(RegistryUnavailable):
            await tokenization.tokenize(request(namespace, known))
        (entry,) = (await tokenization.tokenize(request(namespace, known)))["items"]
        assert not entry["created"]


def _full(_lane: object) -> None:
    raise Overloaded("full", retry_after_s=1.0)


async def _unavailable(_record: Record, _claims: object) -> None:
    raise RegistryUnavailable("It takes no writes.")

"""A record on a single primary: suffixes, content, look-ups, records side by side, callers who leave."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import numpy as np
import pytest

from service.errors import RegistryRefused
from service.registry import Assignment, Claim, Record, Registry, run_length
from service.semantic_id import SemanticId
from tests.agreement import agreed
from tests.claims import CODES, FINGERPRINT, OTHER_CODES, SIZES, claim, claim_one, digest

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.valkey import Valkey

    Connect = Callable[..., Awaitable[Registry]]


# Suffixes


async def test_equal_codes_receive_increasing_suffixes_and_the_first_keeps_0(record: Record) -> None:
    first = await claim_one(record, "first")
    assert first.semantic_id == SemanticId(CODES, 0)

    results = await record.claim([claim(name) for name in ("second", "third", "first")])

    assert [result.assignment.semantic_id.suffix for result in results] == [1, 2, 0]
    assert [result.created for result in results] == [True, True, False]
    assert await record.group_sizes([CODES, OTHER_CODES]) == [3, 0]
    assert await record.count() == 3


async def test_a_claim_again_gets_the_same_id_and_creates_nothing(record: Record) -> None:
    claims = [claim(f"item {number}", (number % 3, 0, 0)) for number in range(50)]
    first = await record.claim(claims)

    again = await record.claim(claims)

    assert [result.assignment for result in again] == [result.assignment for result in first]
    assert all(result.created for result in first)
    assert not any(result.created for result in again)
    assert await record.count() == 50


async def test_an_item_twice_in_one_batch_is_assigned_once(record: Record) -> None:
    results = await record.claim([claim("twin"), claim("twin"), claim("other")])

    assert [(result.assignment.semantic_id.suffix, result.created) for result in results] == [
        (0, True),
        (0, False),
        (1, True),
    ]


async def test_no_claims_are_no_answers(record: Record) -> None:
    assert await record.claim([]) == []
    assert await record.by_item_ids([]) == []
    assert await record.by_semantic_ids([]) == []
    assert await record.group_sizes([]) == []


async def test_more_claims_than_one_call_holds_are_answered_in_order(record: Record) -> None:
    claims = [claim(f"item {number}", (number % 7, 0, number % 256)) for number in range(2500)]

    results = await record.claim(claims)

    assert [result.assignment.item_id for result in results] == [wanted.item_id for wanted in claims]
    assert [result.assignment.semantic_id.codes for result in results] == [wanted.codes for wanted in claims]
    assert len({result.assignment.semantic_id for result in results}) == 2500
    issued = Counter(wanted.codes for wanted in claims)
    held = await record.held([wanted.item_id.encode() for wanted in claims])
    assert [tuple(codes) for codes in held.codes.tolist()] == [wanted.codes for wanted in claims]
    sizes = await record.group_size_columns(np.array(list(issued)))
    assert sizes.tolist() == list(issued.values())


async def test_concurrent_colliding_claims_leave_no_hole_and_no_double(
    shared_valkey: Valkey, connect: Connect, namespace: str
) -> None:
    records = [await (await connect(shared_valkey.url)).record(namespace, FINGERPRINT, SIZES) for _ in range(4)]

    async def client(number: int) -> list[Assignment]:
        mine = [f"item {item}" for item in range(number * 10, number * 10 + 40)]  # overlaps its neighbours' items
        answers = []
        for start in range(0, 40, 5):
            results = await records[number % 4].claim([claim(item_id) for item_id in mine[start : start + 5]])
            answers += [result.assignment for result in results]
        return answers

    answers = [answer for answers in await asyncio.gather(*map(client, range(16))) for answer in answers]

    held = {answer.item_id: answer.semantic_id for answer in answers}
    assert all(held[answer.item_id] == answer.semantic_id for answer in answers)
    assert sorted(semantic_id.suffix for semantic_id in held.values()) == list(range(190))
    assert await records[0].group_sizes([CODES]) == [190]


async def test_a_bulk_of_new_items_gets_what_claims_one_by_one_get(
    shared_valkey: Valkey, connect: Connect, namespace: str
) -> None:
    registry = await connect(shared_valkey.url, buckets=7)
    records = [await registry.record(f"{namespace}{turn}", FINGERPRINT, SIZES, max_suffix=12) for turn in range(2)]
    draw = np.random.default_rng(0)
    codes = np.minimum(draw.exponential((1, 2, 9), (1000, 3)), 255).astype(np.int32)
    claims = [claim(f"item {number}", tuple(row), number) for number, row in enumerate(codes.tolist())]
    digests = np.frombuffer(b"".join(one.digest for one in claims), np.uint64)
    for record in records:
        await record.claim([one._replace(codes=(0, 0, 0)) for one in claims[::7]])
        await record.retire([claims[14].item_id])
    before = await records[0].by_item_ids([one.item_id for one in claims])

    suffixes = await records[0].claim_columns([one.item_id.encode() for one in claims], digests, codes)

    results = await records[1].claim(claims)
    issued = [result.assignment.semantic_id.suffix if getattr(result, "created", False) else -1 for result in results]
    assert suffixes.tolist() == issued
    assert sorted(set(suffixes.tolist())) == list(range(-1, 13))
    after = await records[0].by_item_ids([one.item_id for one in claims])
    assert [found for found, known in zip(after, before, strict=True) if known] == [found for found in before if found]
    assert (await records[0].by_item_ids([claims[14].item_id]))[0].retired_at
    await agreed(records[0])


async def test_a_bulk_goes_in_short_runs_while_others_change_the_record_a_little(
    shared_valkey: Valkey, connect: Connect, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_length, "BESIDE_OTHERS_S", 3600)
    bulk, other = [await (await connect(shared_valkey.url)).record(namespace, FINGERPRINT, SIZES) for _ in range(2)]

    async def claimed(record: Record, name: str, items: int) -> None:
        codes = np.tile(np.array(CODES, np.int32), (items, 1))
        item_ids = [f"{name} {number}".encode() for number in range(items)]
        await record.claim_columns(item_ids, np.zeros(items, np.uint64), codes)

    await claimed(bulk, "alone", 512)
    await claimed(other, "another bulk", 512)
    await claimed(bulk, "beside another bulk", 512)
    await other.claim([claim("listing")])
    await claimed(bulk, "beside a listing", 512)

    changes = shared_valkey.client().xrange(f"sid:{{{namespace}:{FINGERPRINT}}}:c")
    lengths = [entry[b"c"].count(b",") for _, entry in changes]
    assert lengths == [256] * 6 + [1] + [256] + [64] * 4


async def test_an_item_twice_in_a_bulk_is_assigned_once(record: Record) -> None:
    codes = np.array([CODES, CODES, OTHER_CODES, OTHER_CODES], np.int32)

    suffixes = await record.claim_columns([b"a", b"twin", b"b", b"twin"], np.zeros(4, np.uint64), codes)
    again = await record.claim_columns([b"a", b"twin", b"b", b"twin"], np.zeros(4, np.uint64), codes)

    assert suffixes.tolist() == [0, 1, 0, -1]
    assert again.tolist() == [-1] * 4
    assert (await agreed(record)).keys() == {"a", "twin", "b"}


@pytest.mark.parametrize("item_id", ["a b", "nul\0nul", "\"'\\", "línea\n", "\U0001f9f4 香", "-1", "1e3", "x" * 256])
async def test_item_ids_are_opaque(record: Record, item_id: str) -> None:
    assignment = await claim_one(record, item_id)

    assert await record.by_item_ids([item_id]) == [assignment]
    assert await record.by_semantic_ids([assignment.semantic_id]) == [assignment]


async def test_wide_codebooks_and_single_levels_work_too(
    shared_valkey: Valkey, connect: Connect, namespace: str
) -> None:
    registry = await connect(shared_valkey.url)
    for sizes, codes in [((65_536,), (65_535,)), ((1,), (0,)), ((2,) * 25, (1,) * 25), ((256, 1024), (255, 1023))]:
        record = await registry.record(namespace, f"{FINGERPRINT}{len(sizes)}{sizes[0]}", sizes)

        results = await record.claim([claim("one", codes), claim("two", codes), claim("three", codes)])

        assert [result.assignment.semantic_id for result in results] == [SemanticId(codes, n) for n in range(3)]
        assert await record.by_semantic_ids([SemanticId(codes, 2)]) == [results[2].assignment]


# Content


async def test_changed_content_keeps_the_id_and_is_recognised_by_its_digest(record: Record) -> None:
    original = await claim_one(record, "item", CODES, "old")

    changed = await claim_one(record, "item", OTHER_CODES, "new")
    again = await claim_one(record, "item", OTHER_CODES, "new")

    assert changed.semantic_id == original.semantic_id
    assert (changed.digest, changed.content_changed) == (digest("new"), True)
    assert again == changed == (await record.by_item_ids(["item"]))[0]
    assert changed.assigned_at == original.assigned_at
    assert await record.group_sizes([OTHER_CODES]) == [0]


async def test_other_content_with_the_same_codes_has_not_changed(record: Record) -> None:
    await claim_one(record, "item", CODES, "old")

    reworded = await claim_one(record, "item", CODES, "reworded")

    assert (reworded.digest, reworded.content_changed) == (digest("reworded"), False)


async def test_content_that_returns_to_the_assigned_codes_is_no_longer_changed(record: Record) -> None:
    await claim_one(record, "item", CODES, "old")
    await claim_one(record, "item", OTHER_CODES, "new")

    returned = await claim_one(record, "item", CODES, "old")

    assert not returned.content_changed
    assert not (await record.by_semantic_ids([returned.semantic_id]))[0].content_changed  # type: ignore[union-attr]


# Look-ups


async def test_reverse_and_forward_lookups_agree(record: Record) -> None:
    claims = [claim(f"item {number}", (number % 5, number % 3, 0)) for number in range(300)]
    assigned = [result.assignment for result in await record.claim(claims)]

    assert await record.by_item_ids([a.item_id for a in assigned]) == assigned
    assert await record.by_semantic_ids([a.semantic_id for a in assigned]) == assigned


async def test_what_is_not_assigned_is_none_in_its_place(record: Record) -> None:
    assignment = await claim_one(record, "item")

    assert await record.by_item_ids(["no", "item", "no"]) == [None, assignment, None]
    assert await record.by_semantic_ids([SemanticId(CODES, 1), SemanticId(CODES, 0)]) == [None, assignment]


async def test_the_time_of_assignment_is_the_servers(record: Record) -> None:
    assignment = await claim_one(record, "item")

    assert abs(datetime.now(UTC) - assignment.assigned_at) < timedelta(seconds=10)


@pytest.mark.parametrize(
    "wrong", [Claim("i", (1, 2), b"8" * 8), Claim("i", (1, 2, 256), b"8" * 8), Claim("i", CODES, b"")]
)
async def test_a_claim_that_cannot_be_is_refused_before_anything_is_sent(record: Record, wrong: Claim) -> None:
    with pytest.raises(ValueError, match=r"codes|digest"):
        await record.claim([claim("neighbour"), wrong])

    assert await record.count() == 0


async def test_an_id_that_nobody_holds_is_looked_up_by_one_call(record: Record, shared_valkey: Valkey) -> None:
    await claim_one(record, "held")

    def scripts() -> int:
        return int(shared_valkey.client().info("commandstats")["cmdstat_eval"]["calls"])

    before = scripts()
    found, *_ = await record.by_semantic_ids([SemanticId(CODES, 0)])
    of_a_held_one = scripts() - before

    assert await record.by_semantic_ids([SemanticId(CODES, 1), SemanticId(OTHER_CODES, 0)]) == [None, None]
    assert found is not None
    assert (of_a_held_one, scripts() - before - of_a_held_one) == (2, 1)


# Records


async def test_namespaces_and_tokenizers_are_independent(
    shared_valkey: Valkey, connect: Connect, namespace: str
) -> None:
    registry = await connect(shared_valkey.url)
    for name, fingerprint in [
        (namespace, "aa"),
        (namespace, "bb"),
        (namespace + ":x", "aa"),
        (namespace + "%d%s", "aa"),
    ]:
        record = await registry.record(name, fingerprint, SIZES)

        assert (await claim_one(record, "item")).semantic_id.suffix == 0
        assert await record.count() == 1


async def test_the_number_of_buckets_is_a_fact_of_the_record(
    shared_valkey: Valkey, connect: Connect, namespace: str
) -> None:
    first = await (await connect(shared_valkey.url, buckets=7)).record(namespace, FINGERPRINT, SIZES)
    assignment = await claim_one(first, "item")

    second = await (await connect(shared_valkey.url, buckets=1000)).record(namespace, FINGERPRINT, SIZES)

    assert second.buckets == 7
    assert await second.by_item_ids(["item"]) == [assignment]


async def test_a_record_of_other_codebooks_is_refused(shared_valkey: Valkey, connect: Connect, namespace: str) -> None:
    registry = await connect(shared_valkey.url)
    await registry.record(namespace, FINGERPRINT, SIZES)

    with pytest.raises(RegistryRefused, match="codebooks 256,256,256"):
        await registry.record(namespace, FINGERPRINT, (256, 256))


async def test_looking_at_a_record_that_is_not_there_leaves_nothing_behind(
    shared_valkey: Valkey, connect: Connect, namespace: str
) -> None:
    registry = await connect(shared_valkey.url)
    absent = await registry.record(namespace, FINGERPRINT, SIZES, create=False)

    assert await absent.by_item_ids(["item"]) == [None]
    assert shared_valkey.client().keys(f"sid:*{namespace}:*") == []

    present = await registry.record(namespace, FINGERPRINT, SIZES)
    assert (await claim_one(present, "item")).semantic_id.suffix == 0
    assert await registry.record(namespace, FINGERPRINT, SIZES, create=False) is present


@pytest.mark.parametrize("name", [("", "f"), ("n", ""), ("{n}", "f"), ("n", "a:b")])
async def test_a_name_that_would_confuse_keys_is_refused(
    shared_valkey: Valkey, connect: Connect, name: tuple[str, str]
) -> None:
    registry = await connect(shared_valkey.url)

    with pytest.raises(ValueError, match="cannot name a record"):
        await registry.record(*name, SIZES)


async def test_small_buckets_stay_in_listpack_encoding(start_valkey: Callable[..., Valkey], connect: Connect) -> None:
    server = start_valkey(hash_max_listpack_entries="512", hash_max_listpack_value="320")
    record = await (await connect(server.url, buckets=8)).record("default", FINGERPRINT, SIZES)

    await record.claim([claim(f"{number:0256d}", (number % 256, number // 256, 0)) for number in range(800)])

    client = server.client()
    kinds = {client.object("encoding", key) for key in client.scan_iter("sid:*default:*:[fr]:*")}
    assert kinds == {b"listpack"}


# Cancellation


async def test_a_cancelled_caller_does_not_disturb_the_others(record: Record) -> None:
    async def ask(number: int) -> tuple[str, list[Assignment | None]]:
        await claim_one(record, f"item {number}", (number % 256, 0, 0))
        return f"item {number}", await record.by_item_ids([f"item {number}"])

    tasks = [asyncio.create_task(ask(number)) for number in range(400)]
    for turn, task in enumerate(tasks[::2]):
        await asyncio.sleep(0.0005 if turn % 10 == 0 else 0)
        task.cancel()
    answers = await asyncio.gather(*tasks, return_exceptions=True)

    for answer in answers[1::2]:
        assert isinstance(answer, tuple)
        item_id, found = answer
        assert found[0] is not None
        assert found[0].item_id == item_id


async def test_a_caller_cancelled_before_sending_has_claimed_nothing(record: Record) -> None:
    task = asyncio.create_task(record.claim([claim("left")]))
    await asyncio.sleep(0)  # its claims wait now
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task

    stayed = await claim_one(record, "stayed")

    assert stayed.semantic_id.suffix == 0
    assert await record.by_item_ids(["left"]) == [None]

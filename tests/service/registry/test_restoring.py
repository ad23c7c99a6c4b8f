"""IDs are put back on one server and on a cluster alike; on a cluster, step by step, whoever finishes."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from service.registry import Registry
from service.registry.assignment import Assignment, Claim, ClaimResult, read_assignment, read_former
from service.registry.record import Record
from service.registry.restoring import Restored
from service.semantic_id import SemanticId
from tests.agreement import agreed
from tests.valkey import Valkey
from tests.valkey_cluster import ValkeyCluster

Connect = Callable[..., Awaitable[Registry]]
Make = Callable[[str], Awaitable[Record]]

FINGERPRINT = "0123456789abcdef"
SIZES = (4, 256, 2)
CODES, OTHER, THIRD = (1, 44, 0), (3, 255, 1), (0, 44, 1)  # 44 is a comma once packed
NAMES = [f"é,{n}" for n in range(40)]
PLACES = [(a, b, c) for a in range(4) for b in (44, 255) for c in range(2)]


@pytest.fixture(params=["server", "cluster"])
def make(request: pytest.FixtureRequest, shared_valkey: Valkey, connect: Connect, namespace: str) -> Make:
    """Records of one tokenizer by name; the same name twice is two workers of one record."""

    async def make_record(name: str) -> Record:
        url = shared_valkey.url
        if request.param == "cluster":
            url = request.getfixturevalue("shared_cluster").url
        registry = await connect(url, buckets=16, retry_ms=5000)
        return await registry.record(f"{namespace}-{name}", FINGERPRINT, SIZES, max_suffix=5)

    return make_record


def claim(item_id: str, codes: tuple[int, ...], content: int = 0, *, reassign: bool = False) -> Claim:
    return Claim(item_id, codes, bytes([content, *codes, *bytes(7 - len(codes))]), reassign)


async def past_of(record: Record) -> list[Assignment]:
    """Every ID ever assigned, those that items hold now first."""
    present, former = [], []
    async for part in record.contents.scan():
        for held in part.items:
            current = read_assignment(held.item_id.decode(), held.value, record.layout)
            present.append(current)
            for semantic_id, at in read_former(held.former, record.layout).items():
                former.append(
                    replace(
                        current,
                        semantic_id=semantic_id,
                        assigned_at=at,
                        retired_at=None,
                        replaced_by=current.semantic_id,
                    )
                )
    return present + former


async def live_through(record: Record, seed: int) -> None:
    """Claims, retirements, returns and reassignments at random."""
    draw = random.Random(seed)
    for turn in range(25):
        some = draw.sample(NAMES, draw.randrange(1, 12))
        if draw.random() < 0.25:
            await record.retire(some)
        else:
            reassign = draw.random() < 0.6
            await record.claim([claim(name, draw.choice(PLACES), turn, reassign=reassign) for name in some])


async def lives_on(record: Record) -> list[SemanticId | str]:
    """What claims give next: new items, and known ones reassigned."""
    claims = [claim(f"new {n}", codes) for n, codes in enumerate(PLACES)]
    claims += [claim(name, PLACES[n % len(PLACES)], reassign=True) for n, name in enumerate(NAMES)]
    answers = [(await record.claim([one]))[0] for one in claims]
    return [answer.assignment.semantic_id if isinstance(answer, ClaimResult) else str(answer) for answer in answers]


@pytest.mark.parametrize("seed", [0, 1])
async def test_a_record_put_back_is_the_record_and_putting_it_back_again_changes_nothing(make: Make, seed: int) -> None:
    ours, theirs = await make("ours"), await make("theirs")
    await live_through(ours, seed)
    past = await past_of(ours)
    ids = [one.semantic_id for one in past]
    assert sum(one.replaced_by is not None for one in past) > 5
    assert sum(one.retired_at is not None for one in past) > 3

    first, again = await theirs.restore(past), await theirs.restore(past)

    assert first == [Restored(True)] * len(past)
    assert again == [Restored(False)] * len(past)
    assert await agreed(theirs) == await agreed(ours)
    assert await theirs.changes.revision() == len(past)
    assert await theirs.by_item_ids(NAMES) == await ours.by_item_ids(NAMES)
    assert await theirs.by_semantic_ids(ids) == await ours.by_semantic_ids(ids)
    assert await theirs.group_sizes(PLACES) == await ours.group_sizes(PLACES)
    assert await lives_on(theirs) == await lives_on(ours)
    assert await agreed(theirs) == await agreed(ours)


async def test_no_suffix_below_one_that_was_put_back_is_issued(make: Make) -> None:
    ours, theirs = await make("ours"), await make("theirs")
    await ours.claim([claim("first", (1, 2, 1)), claim("second", (1, 2, 1))])
    first, second = await ours.by_item_ids(["first", "second"])
    assert first is not None
    assert second is not None

    await theirs.restore([second])
    (new,) = await theirs.claim([claim("new", (1, 2, 1))])
    (answer,) = await theirs.restore([first])

    assert isinstance(new, ClaimResult)
    assert new.assignment.semantic_id.suffix == 2
    assert answer == Restored(created=True)


async def test_what_the_record_holds_stands(make: Make) -> None:
    ours, theirs = await make("ours"), await make("theirs")
    await ours.claim([claim("a", CODES), claim("b", CODES), claim("c", OTHER), claim("d", CODES)])
    await ours.claim([claim("b", OTHER, reassign=True), claim("d", THIRD, reassign=True)])
    past = {(one.item_id, one.replaced_by is not None): one for one in await past_of(ours)}
    await theirs.claim([claim("x", CODES), claim("b", THIRD), claim("d", THIRD)])
    strange = replace(past["d", True], semantic_id=SemanticId(THIRD, 3), replaced_by=past["d", False].semantic_id)
    lost = replace(past["d", True], item_id="nobody")
    asked = [past["a", False], past["b", False], past["c", False], past["d", False], past["b", True], lost, strange]

    outcomes = await theirs.restore(asked)

    assert outcomes == [
        Restored(False, "1-44-0-0 is held by the item 'x'"),
        Restored(False, "the item holds 0-44-1-0 instead"),
        Restored(True),
        Restored(False, "0-44-1-0 is held by the item 'b'"),
        Restored(False, "the item holds 0-44-1-0 instead"),
        Restored(False, "the ID that the item holds now is not in the record"),
        Restored(False, "the item holds 0-44-1-1 instead"),
    ]
    assert await agreed(theirs) == {
        "x": SemanticId(CODES, 0),
        "b": SemanticId(THIRD, 0),
        "c": SemanticId(OTHER, 0),
        "d": SemanticId(THIRD, 1),
    }
    assert await theirs.restore(asked) == [outcome._replace(created=False) for outcome in outcomes]


@pytest.mark.parametrize("step", range(9))
async def test_what_a_worker_left_half_put_back_another_finishes(
    shared_cluster: ValkeyCluster, connect: Connect, namespace: str, step: int
) -> None:
    registries = [await connect(shared_cluster.url, buckets=16, retry_ms=5000) for _ in range(3)]
    ours = await registries[0].record(f"{namespace}-ours", FINGERPRINT, SIZES)
    one, other = [await registry.record(f"{namespace}-theirs", FINGERPRINT, SIZES) for registry in registries[1:]]
    await ours.claim([claim(name, CODES) for name in "abc"])
    await ours.claim([claim("a", OTHER, reassign=True)])
    await ours.retire(["b"])
    past = await past_of(ours)
    items: Any = one._items._steps
    write, steps = items._write, iter(range(100))

    async def write_or_die(calls: Any) -> Any:
        if calls and next(steps) == step:
            raise asyncio.CancelledError
        return await write(calls)

    items._write = write_or_die
    await asyncio.wait([asyncio.create_task(one.restore(past))])

    await other.claim([claim("new", CODES)])  # meets nothing half put back, or finishes it
    outcomes = await other.restore(past)

    assert {outcome.refusal for outcome in outcomes} <= {None, "1-44-0-0 is held by the item 'new'"}
    live = await agreed(other)
    assert {item: live[item] for item in ("a", "c")} == {"a": SemanticId(OTHER, 0), "c": SemanticId(CODES, 2)}
    assert len({*live.values()}) == len(live) == 3
    (retired,) = await other.by_item_ids(["b"])
    assert retired == (await ours.by_item_ids(["b"]))[0]

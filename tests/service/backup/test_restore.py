"""A table that was exported, put back: into an empty record all is as it was, into another one no promise is broken."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
from collections.abc import Awaitable, Callable
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from models import read_manifest
from service.backup.export import export_table
from service.backup.record_table import Description, NotARecordTable, Origin, columns
from service.backup.restore import Outcome, Refusals, restore_table
from service.decoding.snapshot import take
from service.registry import Registry
from service.registry.assignment import Claim, ClaimResult
from service.registry.record import Record
from service.registry.registry import SCHEMA
from service.semantic_id import SemanticId
from tests.valkey import Valkey

Connect = Callable[..., Awaitable[Registry]]
FINGERPRINT = "0123456789abcdef"
SIZES = (3, 300, 2)
MAX_SUFFIX = 3
ORIGIN = Origin(f"small@{FINGERPRINT}", FINGERPRINT, SIZES, MAX_SUFFIX, "shop", SCHEMA)
CODES, OTHER, THIRD = (1, 299, 0), (2, 44, 1), (0, 0, 0)


def claim(item_id: str, codes: tuple[int, ...], content: int = 0, *, reassign: bool = False) -> Claim:
    digest = bytes(part % 256 for part in (content, *codes)).ljust(8)[:8]  # other codes are of other content
    return Claim(item_id, codes, digest, reassign)


@pytest.fixture
def make_record(shared_valkey: Valkey, connect: Connect, namespace: str) -> Callable[[str], Awaitable[Record]]:
    """Records of one tokenizer, each of its own namespace."""

    async def make(name: str, sizes: tuple[int, ...] = SIZES) -> Record:
        registry = await connect(shared_valkey.url, buckets=50)
        return await registry.record(f"{namespace}-{name}", FINGERPRINT, sizes, max_suffix=MAX_SUFFIX)

    return make


async def exported(record: Record, path: Path) -> Path:
    await export_table(record, ORIGIN, path, lambda _, __: None)
    return path


async def imported(record: Record, path: Path) -> tuple[Outcome, list[dict[str, Any]]]:
    """What became of the rows, and those that were refused."""
    refused = path.with_suffix(".refused.jsonl")
    seen: list[tuple[int, int]] = []
    with closing(Refusals(refused)) as refusals:
        outcome = await restore_table(
            record, path, Description.of(path), refusals, lambda done, total: seen.append((done, total))
        )
    rows = len(pq.read_table(path))
    assert seen[-1] == (rows, rows)
    assert sum(outcome) == rows
    return outcome, [json.loads(line) for line in refused.read_text(encoding="utf-8").splitlines()]


async def live_through(record: Record, seed: int, turns: int = 60) -> list[str]:
    """A seeded life of a few items: claims, retirements, returns, reassignments; and their names."""
    draw = random.Random(seed)
    names = [f"é,{n}" for n in range(60)]
    for turn in range(turns):
        some = draw.sample(names, draw.randrange(1, 12))
        codes = [(draw.randrange(3), draw.choice((44, 299)), draw.randrange(2)) for _ in some]
        if draw.random() < 0.25:
            await record.retire(some)
        else:
            reassign = draw.random() < 0.6
            await record.claim([claim(name, c, turn, reassign=reassign) for name, c in zip(some, codes, strict=True)])
    return names


def kept(valkey: Valkey, record: Record) -> dict[bytes, dict[bytes, bytes]]:
    """Everything that stands in a record's buckets, by the name of the bucket in the record."""
    name = record._keys.name.encode()
    with valkey.client() as client:
        buckets = [*client.scan_iter(b"sid:" + name + b":f:*"), *client.scan_iter(b"sid:{" + name + b"*")]
        return {
            bucket.replace(name, b"NAME"): client.hgetall(bucket)
            for bucket in buckets
            if not bucket.endswith((b"}:meta", b"}:c"))
        }


@pytest.mark.parametrize("seed", range(8))
async def test_an_empty_record_becomes_what_was_exported(
    shared_valkey: Valkey, make_record: Callable[[str], Awaitable[Record]], tmp_path: Path, seed: int
) -> None:
    ours, theirs = await make_record("ours"), await make_record("theirs")
    names = await live_through(ours, seed)
    path = await exported(ours, tmp_path / "record.parquet")
    rows = pq.read_table(path).to_pylist()
    ids = [SemanticId(tuple(row["codes"]), row["suffix"]) for row in rows]
    assert {"live", "retired", "replaced"} == {row["state"] for row in rows}

    outcome, refused = await imported(theirs, path)

    assert (outcome, refused) == (Outcome(len(rows), 0, 0), [])
    assert kept(shared_valkey, theirs) == kept(shared_valkey, ours)
    assert await theirs.by_item_ids(names) == await ours.by_item_ids(names)
    assert await theirs.by_semantic_ids(ids) == await ours.by_semantic_ids(ids)
    assert await theirs.count() == await ours.count()
    for prefix in [(), (1,), (1, 44), (1, 44, 0)]:
        assert await theirs.tree.children([prefix]) == await ours.tree.children([prefix])
        assert await theirs.tree.page(prefix, 20) == await ours.tree.page(prefix, 20)
    assert (await take(theirs)).semantic_ids().tolist() == (await take(ours)).semantic_ids().tolist()
    assert await lives_on(theirs) == await lives_on(ours)


async def lives_on(record: Record) -> list[SemanticId | str]:
    """What claims give next: a new item under each codes, and every item reassigned."""
    groups = [(a, b, c) for a in range(3) for b in (44, 299) for c in range(2)]
    fresh = [claim(f"new {n}", codes) for n, codes in enumerate(groups)]
    again = [claim(f"é,{n}", groups[n % len(groups)], reassign=True) for n in range(60)]
    answers = await record.claim([*fresh, *again])
    return [answer.assignment.semantic_id if isinstance(answer, ClaimResult) else str(answer) for answer in answers]


async def test_importing_twice_changes_nothing(make_record: Callable[[str], Awaitable[Record]], tmp_path: Path) -> None:
    ours, theirs = await make_record("ours"), await make_record("theirs")
    await live_through(ours, 0)
    path = await exported(ours, tmp_path / "record.parquet")
    first, _ = await imported(theirs, path)
    revision = await theirs.changes.revision()

    for record in (theirs, ours):
        again, refused = await imported(record, path)
        assert (again, refused) == (Outcome(0, first.restored, 0), [])

    assert await theirs.changes.revision() == revision == first.restored


async def test_what_came_back_is_told_to_followers(
    make_record: Callable[[str], Awaitable[Record]], tmp_path: Path
) -> None:
    ours, theirs = await make_record("ours"), await make_record("theirs")
    await live_through(ours, 3)
    path = await exported(ours, tmp_path / "record.parquet")
    await imported(theirs, path)

    changes = (await theirs.changes.after(0, 10_000)).changes

    rows = pq.read_table(path).to_pylist()
    kinds = {"live": "assigned", "retired": "retired", "replaced": "replaced"}
    told = {(change.kind, change.item_id, str(change.semantic_id)) for change in changes}
    assert told == {(kinds[row["state"]], row["item_id"], row["semantic_id"]) for row in rows}
    assert {str(change.semantic_id) for change in changes if change.live} == {
        row["semantic_id"] for row in rows if row["state"] == "live"
    }


async def test_an_imported_suffix_is_never_issued_again_though_there_is_a_gap(
    make_record: Callable[[str], Awaitable[Record]], tmp_path: Path
) -> None:
    ours, theirs = await make_record("ours"), await make_record("theirs")
    await ours.claim([claim(name, CODES) for name in "abc"])
    await ours.retire(["c"])
    path = await exported(ours, tmp_path / "record.parquet")
    described = Description.of(path)
    write_rows(path, [row for row in pq.read_table(path).to_pylist() if row["suffix"] == 2], described)

    await imported(theirs, path)
    answers = await theirs.claim([claim(name, CODES) for name in "xyz"])

    taken = [answer.assignment.semantic_id.suffix for answer in answers if isinstance(answer, ClaimResult)]
    assert 2 not in taken
    assert taken[-1] == 3
    assert len(set(taken)) == len(taken)


async def test_what_would_break_a_promise_is_refused_with_its_reason_and_nothing_else_is(
    shared_valkey: Valkey, make_record: Callable[[str], Awaitable[Record]], tmp_path: Path
) -> None:
    ours, theirs = await make_record("ours"), await make_record("theirs")
    await ours.claim(
        [claim("a", CODES), claim("b", OTHER), claim("c", THIRD), claim("d", THIRD), claim("moved", OTHER)]
    )
    await ours.claim([claim("b", THIRD, reassign=True), claim("moved", CODES, reassign=True)])
    path = await exported(ours, tmp_path / "record.parquet")
    # There, another item came first; b stayed what it was; d was retired; moved went further.
    await theirs.claim([claim("x", CODES)])
    await theirs.claim([claim("b", OTHER), claim("z", THIRD), claim("d", THIRD), claim("moved", OTHER)])
    await theirs.retire(["d"])
    await theirs.claim([claim("moved", CODES, reassign=True)])
    await theirs.claim([claim("moved", THIRD, reassign=True)])
    before = kept(shared_valkey, theirs)

    outcome, refused = await imported(theirs, path)

    assert {(row["item_id"], row["semantic_id"], row["state"]): row["reason"] for row in refused} == {
        ("a", "1-299-0-0", "live"): "1-299-0-0 is held by the item 'x'",
        ("b", "0-0-0-2", "live"): "0-0-0-2 is held by the item 'moved'",
        ("c", "0-0-0-0", "live"): "0-0-0-0 is held by the item 'z'",
    }
    assert outcome == Outcome(restored=0, known=4, refused=3)
    assert kept(shared_valkey, theirs) == before


async def test_an_item_that_holds_another_id_keeps_it(
    make_record: Callable[[str], Awaitable[Record]], tmp_path: Path
) -> None:
    ours, theirs = await make_record("ours"), await make_record("theirs")
    await ours.claim([claim("a", CODES), claim("b", CODES)])
    await ours.claim([claim("a", OTHER, reassign=True)])
    path = await exported(ours, tmp_path / "record.parquet")
    await theirs.claim([claim("a", THIRD)])

    outcome, refused = await imported(theirs, path)

    assert outcome == Outcome(restored=1, known=0, refused=2)
    assert [(row["item_id"], row["semantic_id"], row["reason"]) for row in refused] == [
        ("a", "2-44-1-0", "the item holds 0-0-0-0 instead"),
        ("a", "1-299-0-0", "the item holds 0-0-0-0 instead"),
    ]


MOMENT = datetime(2024, 2, 29, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("state", "members", "reason"),
    [
        ("live", {"item_id": None}, "an item id has 1 to 256 bytes"),
        ("live", {"item_id": ""}, "an item id has 1 to 256 bytes"),
        ("live", {"item_id": "é" * 129}, "an item id has 1 to 256 bytes"),
        ("live", {"codes": None}, "there are no codes, or no suffix"),
        ("live", {"codes": [1, None, 0]}, "there are no codes, or no suffix"),
        ("live", {"codes": [3, 299, 0]}, "the codes [3, 299, 0] are out of range: the codebook sizes are [3, 300, 2]"),
        ("live", {"suffix": None}, "there are no codes, or no suffix"),
        ("live", {"suffix": -1}, "the suffix -1 is above the highest, 3"),
        ("live", {"suffix": 4, "semantic_id": "1-299-0-4"}, "the suffix 4 is above the highest, 3"),
        ("live", {"semantic_id": "1-299-0-1"}, "codes and suffix are those of 1-299-0-0"),
        ("live", {"semantic_id": None}, "codes and suffix are those of 1-299-0-0"),
        ("live", {"state": "dead"}, "there is no state 'dead'"),
        ("live", {"state": None}, "there is no state None"),
        ("live", {"assigned_at": None}, "there is no time of its assignment"),
        ("live", {"assigned_at": datetime(1969, 1, 1, tzinfo=UTC)}, "no time from 1970 to 2106"),
        ("live", {"retired_at": MOMENT}, "retired_at does not fit the state 'live'"),
        ("live", {"digest": None}, "there is no digest"),
        ("live", {"content_changed": None}, "there is no content_changed"),
        ("live", {"replaced_by": "2-44-1-0"}, "replaced_by does not fit the state 'live'"),
        ("live", {"tokenizer": "other@00"}, "the tokenizer is 'other@00', that of the table"),
        ("live", {"namespace": "other"}, "the namespace is 'other', that of the table 'shop'"),
        ("retired", {"retired_at": None}, "retired_at does not fit the state 'retired'"),
        ("retired", {"retired_at": datetime(2107, 1, 1, tzinfo=UTC)}, "no time from 1970 to 2106"),
        ("replaced", {"replaced_by": None}, "replaced_by does not fit the state 'replaced'"),
        ("replaced", {"replaced_by": "2-44-1"}, "has 3 parts"),
        ("replaced", {"replaced_by": "0-0-0-0"}, "the item holds 0-299-1-0 instead"),
        ("replaced", {"item_id": "nobody"}, "the ID that the item holds now is not in the record"),
        ("replaced", {"codes": [0, 299, 1], "suffix": 1, "semantic_id": "0-299-1-1"}, "the item has 0-299-1-0 under"),
    ],
)
async def test_a_row_that_says_nothing_sound_fails_alone(
    make_record: Callable[[str], Awaitable[Record]], tmp_path: Path, state: str, members: dict[str, Any], reason: str
) -> None:
    ours, theirs = await make_record("ours"), await make_record("theirs")
    await ours.claim([claim("live", CODES), claim("retired", OTHER), claim("replaced", THIRD)])
    await ours.claim([claim("replaced", (0, 299, 1), reassign=True)])
    await ours.retire(["retired"])
    path = await exported(ours, tmp_path / "record.parquet")
    rows, described = pq.read_table(path).to_pylist(), Description.of(path)
    (spoilt,) = [row for row in rows if row["state"] == state and row["item_id"] == state]
    spoilt.update(members)
    write_rows(path, rows, described)

    outcome, refused = await imported(theirs, path)

    assert outcome == Outcome(restored=3, known=0, refused=1)
    assert reason in refused[0]["reason"]
    assert refused[0]["item_id"] == spoilt["item_id"]


def write_rows(path: Path, rows: list[dict[str, Any]], described: Description) -> None:
    table = pa.Table.from_pylist(rows, schema=columns(described.origin))
    pq.write_table(table.replace_schema_metadata({b"semid": described.to_json()}), path)


async def test_titles_of_live_items_come_along_and_none_is_written_over(
    shared_valkey: Valkey, connect: Connect, namespace: str, tmp_path: Path
) -> None:
    registry = await connect(shared_valkey.url, buckets=50, display_bytes=16)
    ours, theirs, without = [
        await registry.record(f"{namespace}-{name}", FINGERPRINT, SIZES, max_suffix=MAX_SUFFIX) for name in "otw"
    ]
    await ours.claim([claim("a", CODES), claim("b", CODES), claim("c", OTHER), claim("d", THIRD)])
    await ours.displays.put({b"a": "Kettle", b"b": "Lamp", b"c": "gone"})
    await ours.claim([claim("b", OTHER, reassign=True)])
    await ours.retire(["c"])  # and its title is still there, as where the service died just then
    path = await exported(ours, tmp_path / "record.parquet")
    rows = pq.read_table(path).to_pylist()
    assert {(row["item_id"], row["state"]): row["display"] for row in rows} == {
        ("a", "live"): "Kettle",
        ("b", "live"): "Lamp",
        ("b", "replaced"): None,
        ("c", "retired"): None,
        ("d", "live"): None,
    }

    await imported(theirs, path)
    assert await theirs.displays.of([b"a", b"b", b"c", b"d"]) == ["Kettle", "Lamp", None, None]
    await theirs.displays.put({b"a": "newer"})
    await imported(theirs, path)
    assert await theirs.displays.of([b"a", b"b"]) == ["newer", "Lamp"]

    described, table = Description.of(path), pq.read_table(path)  # as before there were titles
    pq.write_table(table.drop(["display"]).replace_schema_metadata({b"semid": described.to_json()}), path)
    outcome, _ = await imported(without, path)
    assert outcome.restored == len(rows)
    assert await without.displays.of([b"a", b"b"]) == [None, None]


async def test_a_table_with_other_columns_is_refused_as_a_whole(
    make_record: Callable[[str], Awaitable[Record]], tmp_path: Path
) -> None:
    ours, theirs = await make_record("ours"), await make_record("theirs")
    await ours.claim([claim("a", CODES)])
    path = await exported(ours, tmp_path / "record.parquet")
    described, table = Description.of(path), pq.read_table(path)
    pq.write_table(table.drop(["codes"]).replace_schema_metadata({b"semid": described.to_json()}), path)

    with pytest.raises(NotARecordTable, match="has not the columns"):
        await imported(theirs, path)

    assert await theirs.count() == 0


async def test_an_import_that_was_killed_is_done_again(
    shared_valkey: Valkey, connect: Connect, checkpoint: Path, tmp_path: Path, namespace: str
) -> None:
    manifest = read_manifest(checkpoint)
    registry = await connect(shared_valkey.url, buckets=500)
    facts = (manifest.fingerprint, manifest.codebook_sizes)
    ours = await registry.record(namespace, *facts)
    draw = random.Random(0)
    names = [f"{n}" for n in range(20_000)]
    for start in range(0, len(names), 1000):
        some = [claim(name, tuple(draw.randrange(16) for _ in range(3))) for name in names[start : start + 1000]]
        await ours.claim(some)
    path = tmp_path / "record.parquet"
    origin = Origin(manifest.full_name, *facts, None, namespace, SCHEMA)
    await export_table(ours, origin, path, lambda _, __: None)
    theirs = await registry.record(f"{namespace}-2", *facts)
    words = (
        sys.executable,
        "-c",
        "from service.cli import app; app()",
        "import",
        path,
        "--namespace",
        f"{namespace}-2",
    )
    environment = {**os.environ, "SID_REDIS_URL": shared_valkey.url, "SID_CHECKPOINT": str(checkpoint)}

    running = await asyncio.create_subprocess_exec(*words, env=environment, stderr=subprocess.DEVNULL)
    async with asyncio.timeout(60):
        while await theirs.count() == 0:  # noqa: ASYNC110 - another process makes it so
            await asyncio.sleep(0.005)
    running.kill()
    await running.wait()
    cut_short = await theirs.count()
    again = await asyncio.create_subprocess_exec(*words, env=environment, stdout=subprocess.PIPE)
    said, _ = await again.communicate()

    assert 0 < cut_short < len(names)
    assert again.returncode == 0
    assert f"{len(names) - cut_short} IDs restored, {cut_short} were there already" in said.decode()
    assert kept(shared_valkey, theirs) == kept(shared_valkey, ours)
    assert (await take(theirs)).semantic_ids().tolist() == (await take(ours)).semantic_ids().tolist()
    assert not path.with_suffix(".refused.jsonl").exists()

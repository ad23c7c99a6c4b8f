"""The exported table is the record at exactly one revision, whatever is written meanwhile."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from service.backup import export
from service.backup.export import NothingToExport, export_table
from service.backup.record_table import Description, NotARecordTable, Origin
from service.errors import RegistryUnavailable
from service.registry import Registry
from service.registry.assignment import Claim
from service.registry.record import Record
from service.registry.registry import SCHEMA
from service.semantic_id import SemanticId
from tests.valkey import Valkey

Connect = Callable[..., Awaitable[Registry]]
FINGERPRINT = "0123456789abcdef"
SIZES = (256, 300, 4)
CODES, OTHER = (44, 299, 3), (7, 8, 0)


def origin(namespace: str) -> Origin:
    return Origin(f"small@{FINGERPRINT}", FINGERPRINT, SIZES, None, namespace, SCHEMA)


def claim(item_id: str, codes: tuple[int, ...], content: int = 0, *, reassign: bool = False) -> Claim:
    return Claim(item_id, codes, content.to_bytes(8), reassign)


@pytest.fixture
async def record(shared_valkey: Valkey, connect: Connect, namespace: str) -> Record:
    registry = await connect(shared_valkey.url, buckets=500, changes_kept=1_000_000)
    return await registry.record(namespace, FINGERPRINT, SIZES)


@pytest.fixture(params=["server", "cluster"])
async def busy_record(
    request: pytest.FixtureRequest, shared_valkey: Valkey, connect: Connect, namespace: str
) -> Record:
    """A record on one server, and one on a cluster."""
    url = shared_valkey.url if request.param == "server" else request.getfixturevalue("shared_cluster").url
    registry = await connect(url, buckets=500, changes_kept=1_000_000)
    return await registry.record(namespace, FINGERPRINT, SIZES)


async def exported(record: Record, path: Path, seen: list[tuple[int, int]] | None = None) -> Description:
    told = seen if seen is not None else []
    return await export_table(record, origin("x"), path, lambda done, total: told.append((done, total)))


def rows_of(path: Path) -> dict[str, dict[str, Any]]:
    """The rows by their Semantic ID, each of which may be there once."""
    rows = pq.read_table(path).to_pylist()
    found = {row["semantic_id"]: row for row in rows}
    assert len(found) == len(rows)
    return found


def files_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


async def churn(record: Record, seed: int, turns: int, *, items: int = 3000) -> None:
    """Claims, retirements, returns and reassignments at random."""
    draw = random.Random(seed)
    for _ in range(turns):
        names = [f"item {draw.randrange(items)}" for _ in range(draw.randrange(1, 30))]
        codes = [(draw.randrange(256), draw.randrange(300), draw.randrange(4)) for _ in names]
        if draw.random() < 0.3:
            await record.retire(names)
        else:
            await record.claim([claim(name, c, reassign=True) for name, c in zip(names, codes, strict=True)])


async def told(record: Record, revision: int) -> set[str]:
    """What is live at a revision, by all the changes up to there."""
    live: set[SemanticId] = set()
    for change in (await record.changes.after(0, revision)).changes:
        (live.add if change.live else live.discard)(change.semantic_id)
    return {str(semantic_id) for semantic_id in live}


async def test_a_row_for_each_id_that_was_ever_assigned(record: Record, tmp_path: Path) -> None:
    await record.claim([claim("é,", CODES, 1), claim("b", CODES, 2), claim("c", CODES, 3)])
    await record.claim([claim("b", OTHER, 4, reassign=True), claim("c", OTHER, 5)])
    await record.retire(["é,"])
    path = tmp_path / "record.parquet"

    description = await exported(record, path)

    rows = rows_of(path)
    assigned = {held.item_id: held for held in await record.by_item_ids(["é,", "b", "c"]) if held}
    first, second, third, other = "44-299-3-0", "44-299-3-1", "44-299-3-2", "7-8-0-0"
    assert set(rows) == {first, second, third, other}
    assert [rows[name]["state"] for name in (first, second, third, other)] == ["retired", "replaced", "live", "live"]
    assert [rows[name]["item_id"] for name in (first, second, third, other)] == ["é,", "b", "c", "b"]
    assert rows[first]["retired_at"] == assigned["é,"].retired_at
    assert (rows[second]["replaced_by"], rows[second]["digest"], rows[second]["content_changed"]) == (other, None, None)
    assert (rows[third]["digest"], rows[third]["content_changed"]) == ((5).to_bytes(8), True)
    assert (rows[other]["codes"], rows[other]["suffix"], rows[other]["content_changed"]) == ([7, 8, 0], 0, False)
    assert rows[other]["assigned_at"] == assigned["b"].assigned_at
    assert {row["tokenizer"] for row in rows.values()} == {f"small@{FINGERPRINT}"}
    assert description == Description.of(path)
    assert description.revision == await record.changes.revision()
    assert pq.read_schema(path).field("codes").type == pa.list_(pa.uint16(), 3)


async def test_a_table_taken_while_writes_go_on_is_the_record_at_its_revision(
    busy_record: Record, tmp_path: Path
) -> None:
    record = busy_record
    await churn(record, 0, 100)
    enough = asyncio.Event()

    async def keep_writing(seed: int) -> None:
        while not enough.is_set():
            await churn(record, seed := seed + 10, 5)

    writing = [asyncio.create_task(keep_writing(seed)) for seed in (1, 2)]
    path = tmp_path / "record.parquet"
    for _ in range(8):
        begun = await record.changes.revision()
        description = await exported(record, path)
        assert begun < description.revision  # else it was not written to meanwhile
        live = {name for name, row in rows_of(path).items() if row["state"] == "live"}
        assert live == await told(record, description.revision)
    enough.set()
    await asyncio.gather(*writing)

    await agrees_with_the_service(record, path)


async def agrees_with_the_service(record: Record, path: Path) -> None:
    """Every row of a fresh export says what a look-up answers, and no ID is missing."""
    await exported(record, path)
    rows = rows_of(path)
    ids = [SemanticId(tuple(row["codes"]), row["suffix"]) for row in rows.values()]
    for row, held in zip(rows.values(), await record.by_semantic_ids(ids), strict=True):
        assert held is not None
        assert row["item_id"] == held.item_id
        assert row["assigned_at"] == held.assigned_at
        assert row["replaced_by"] == (str(held.replaced_by) if held.replaced_by else None)
        assert row["state"] == ("replaced" if held.replaced_by else "retired" if held.retired_at else "live")
    groups = {tuple(row["codes"]) for row in rows.values()}
    assert sum(await record.group_sizes(list(groups))) == len(rows)


async def test_buckets_too_large_for_one_answer_are_read_whole(
    shared_valkey: Valkey, connect: Connect, namespace: str, tmp_path: Path
) -> None:
    record = await (await connect(shared_valkey.url, buckets=1)).record(namespace, FINGERPRINT, SIZES)
    for start in range(0, 12_000, 1000):
        await record.claim([claim(f"{n}", (n % 256, n % 300, n % 4)) for n in range(start, start + 1000)])
    seen: list[tuple[int, int]] = []

    await exported(record, tmp_path / "record.parquet", seen)

    assert len(rows_of(tmp_path / "record.parquet")) == 12_000
    assert seen == [(12_000, 12_000)]


async def test_progress_ends_with_what_there_is(record: Record, tmp_path: Path) -> None:
    await churn(record, 0, 60)
    seen: list[tuple[int, int]] = []

    await exported(record, tmp_path / "record.parquet", seen)

    held = {row["item_id"] for row in rows_of(tmp_path / "record.parquet").values()}
    assert seen[-1] == (len(held), len(held))
    assert len(seen) > 1


async def test_an_empty_record_is_no_file(record: Record, tmp_path: Path) -> None:
    with pytest.raises(NothingToExport, match="nothing was ever assigned in namespace 'x'"):
        await exported(record, tmp_path / "record.parquet")

    assert files_in(tmp_path) == []


async def test_a_feed_that_forgets_too_fast_names_the_setting_and_leaves_no_file(
    shared_valkey: Valkey, connect: Connect, namespace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = await connect(shared_valkey.url, buckets=500, changes_kept=0)
    record = await registry.record(namespace, FINGERPRINT, SIZES)
    await record.claim([claim("a", CODES)])
    monkeypatch.setattr(export, "FOLLOW_INTERVAL_S", 1000)
    scan = record.contents.scan

    async def busy_scan() -> Any:  # two thousand changes while the scan goes on, of which none need be kept
        async for part in scan():
            for start in range(0, 300, 100):
                names = [f"{n}" for n in range(start, start + 100)]
                await record.claim([claim(name, OTHER) for name in names])
                await record.retire(names)
            yield part

    monkeypatch.setattr(record.contents, "scan", busy_scan)

    with pytest.raises(RegistryUnavailable, match="SID_CHANGES_KEPT"):
        await exported(record, tmp_path / "record.parquet")

    assert files_in(tmp_path) == []


def test_a_file_that_is_no_export_is_told_so(tmp_path: Path) -> None:
    plain, text = tmp_path / "plain.parquet", tmp_path / "text.parquet"
    pq.write_table(pa.table({"item_id": ["a"]}), plain)
    text.write_text("no Parquet")

    for path in (plain, text):
        with pytest.raises(NotARecordTable, match="is not a table that semid export wrote"):
            Description.of(path)

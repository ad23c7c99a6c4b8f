"""`semid backfill`: files of a catalogue in, a table of Semantic IDs out, whatever ends it on the way."""

from __future__ import annotations

import asyncio
import json
import resource
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from models import read_manifest
from service.backfill import code_files, engines, sorting
from service.backfill.output import Table
from service.backup.commands import opened_record
from service.batching.batcher import Batcher
from service.settings import Settings
from tests.service.backfill.catalogues import (
    ROWS_PER_RUN,
    interrupted,
    matrix_of,
    rejected_of,
    run,
    run_until_killed,
    suffixes_by_codes,
    table_of,
    write_embeddings,
)


def written(path: Path) -> Any:
    """What a file says; of the summary all but which record was claimed from."""
    if path.name != "backfill.json":
        return path.read_bytes()
    summary = json.loads(path.read_text())
    return summary.pop("record").startswith("default:"), summary


@pytest.mark.usefixtures("settings")
def test_a_backfill_that_is_killed_goes_on_and_ends_with_the_same_bytes(
    tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sorting, "ROWS_PER_RUN", ROWS_PER_RUN)
    matrix = matrix_of(1000)
    matrix[77] = 0.0
    catalogue = write_embeddings(tmp_path / "items.parquet", matrix)
    words = [catalogue, "--block-rows", 300, "--workers", 1]
    undisturbed = run(*words, "--out", tmp_path / "whole")

    monkeypatch.setenv("SID_DATA_DIR", str(data_dir / "another"))
    out = tmp_path / "killed"
    words += ["--out", out]
    run_until_killed("codes", 3, *words)
    codes = {path.name: path.stat().st_mtime_ns for path in (out / ".backfill" / "codes").glob("*/0*")}
    run_until_killed("claims", 4, *words)  # its run has been claimed, and nothing says so yet
    claims = {path.name: path.stat().st_mtime_ns for path in (out / ".backfill" / "claims").glob("0*")}
    monkeypatch.setattr(engines, "BlockEncoder", None)  # all blocks are encoded
    last = run(*words)

    assert (len(codes), len(claims)) == (2, 3 + 4)  # of the fourth run only what was known before
    assert (undisturbed.exit_code, last.exit_code) == (3, 3), last.output
    whole, killed = sorted((tmp_path / "whole").iterdir()), sorted(out.iterdir())
    assert [path.name for path in whole] == [path.name for path in killed]
    assert [written(path) for path in whole] == [written(path) for path in killed]
    table = table_of(out)
    assert table["item_id"].to_pylist() == [f"i{row}" for row in range(1000) if row != 77]
    assert len(set(table["semantic_id"].to_pylist())) == 999
    assert table["created"].to_pylist() == [True] * 999
    assert [(row["row"], row["item_id"]) for row in rejected_of(out)] == [(78, "i77")]


@pytest.mark.usefixtures("settings")
def test_suffixes_follow_the_column_that_is_asked_for_whatever_the_blocks_and_the_workers(
    tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sorting, "ROWS_PER_RUN", ROWS_PER_RUN)
    rank = [None if row % 50 == 0 else value for row, value in enumerate(np.random.default_rng(1).permutation(800) / 2)]
    matrix = matrix_of(800)
    for number in (0, 1):
        rows = slice(400 * number, 400 * number + 400)
        write_embeddings(tmp_path / f"{number}.parquet", matrix[rows], first=rows.start, rank=pa.array(rank[rows]))
    outs = [tmp_path / "one", tmp_path / "other"]
    for out, options in zip(outs, (["--block-rows", 90, "--workers", 2], ["--block-rows", 1000]), strict=True):
        monkeypatch.setenv("SID_DATA_DIR", str(data_dir / out.name))
        result = run(tmp_path / "?.parquet", "--out", out, "--order-by", "rank", *options)
        assert result.exit_code == 0, result.output

    one, other = map(table_of, outs)
    assert len(list(outs[0].glob("part-*"))) == 10
    assert one.equals(other)
    keys = {f"i{row}": (value is None, value or 0, row) for row, value in enumerate(rank)}
    groups = suffixes_by_codes(one, keys)
    assert max(map(len, groups.values())) > 10
    assert all(group == sorted(group) for group in groups.values())


@pytest.mark.usefixtures("settings")
def test_a_dry_run_counts_collisions_and_a_run_after_it_encodes_nothing_again(
    tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalogue = write_embeddings(tmp_path / "items.parquet", matrix_of(300))
    words = [catalogue, "--out", tmp_path / "out", "--workers", 1]

    dry = run(*words, "--dry-run")
    report = json.loads((tmp_path / "out" / "collisions.json").read_text())
    untouched = list(data_dir.iterdir()) == []
    monkeypatch.setattr(engines, "BlockEncoder", None)
    result = run(*words)

    assert dry.exit_code == result.exit_code == 0, dry.output + result.output
    assert untouched
    codes = [tuple(row) for row in table_of(tmp_path / "out")["codes"].to_pylist()]
    sizes = [codes.count(group) for group in set(codes)]
    assert report["distinct_prefixes"] == [len({row[:level] for row in codes}) for level in (1, 2, 3)]
    assert report["groups_by_size"] == {str(size): sizes.count(size) for size in sorted(set(sizes))}
    assert report["items_in_collisions"] == sum(size for size in sizes if size > 1)
    assert report["highest_suffix"] == max(sizes) - 1
    assert report["largest_groups"][0]["items"] == max(sizes)


@pytest.mark.usefixtures("settings")
def test_a_dry_run_without_collisions_shows_no_group(tmp_path: Path) -> None:
    catalogue = write_embeddings(tmp_path / "items.parquet", matrix_of(1))

    dry = run(catalogue, "--out", tmp_path / "out", "--workers", 1, "--dry-run")

    assert dry.exit_code == 0, dry.output
    assert "0 items share their codes" in dry.output
    assert ": 1 items" not in dry.output


@pytest.mark.usefixtures("settings")
def test_known_items_keep_their_ids_and_one_that_stands_twice_has_one(tmp_path: Path) -> None:
    first, later = matrix_of(40), matrix_of(40, seed=6)
    write_embeddings(tmp_path / "first.parquet", first)
    write_embeddings(tmp_path / "later.parquet", np.vstack([later[:10], first[10:], later[10:20]]))
    words = ["--workers", 1, "--out"]

    run(tmp_path / "first.parquet", *words, tmp_path / "one")
    run(tmp_path / "later.parquet", *words, tmp_path / "two")

    one, two = (table_of(tmp_path / name).to_pylist() for name in ("one", "two"))
    assert [row["semantic_id"] for row in two[:40]] == [row["semantic_id"] for row in one]
    assert [row["created"] for row in two] == [False] * 40 + [True] * 10
    assert any(row["content_changed"] for row in two[:10])
    assert not any(row["content_changed"] for row in two[10:])
    write_embeddings(tmp_path / "twice.parquet", np.vstack([first[:3], later[:3]]), first=100)
    twice = pq.read_table(tmp_path / "twice.parquet").set_column(0, "item_id", [["x", "y", "z", "x", "y", "z"]])
    pq.write_table(twice, tmp_path / "twice.parquet")
    run(tmp_path / "twice.parquet", *words, tmp_path / "three")
    three = table_of(tmp_path / "three").to_pylist()
    assert [row["semantic_id"] for row in three[:3]] == [row["semantic_id"] for row in three[3:]]
    assert sum(row["created"] for row in three) == 3


def test_a_backfill_beside_a_service_gives_what_the_service_gives(
    service: Any, namespace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"item_id": f"t{row}", "title": f"kettle {row}", "brand": "Steam" if row % 2 else None} for row in range(5)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "items.parquet")
    monkeypatch.setenv("SID_CHECKPOINT", str(service.settings.checkpoint))
    monkeypatch.setenv("SID_DATA_DIR", str(service.settings.data_dir))

    result = run(tmp_path / "items.parquet", "--out", tmp_path / "out", "--workers", 1, "--namespace", namespace)

    assert result.exit_code == 0, result.output
    entries = [{"item_id": row.pop("item_id"), "fields": row} for row in rows]
    answers = service.tokenize(*entries, namespace=namespace)
    assert [answer["semantic_id"] for answer in answers] == table_of(tmp_path / "out")["semantic_id"].to_pylist()
    assert not any(answer["created"] for answer in answers)
    assert [answer["margin"] for answer in answers] == [None] * 5  # known by its content: not computed again


@pytest.mark.usefixtures("settings")
def test_a_directory_with_anything_else_is_left_alone_unless_forced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalogue = write_embeddings(tmp_path / "items.parquet", matrix_of(20))
    other = write_embeddings(tmp_path / "other.parquet", matrix_of(10))
    out = tmp_path / "out"
    words = ["--workers", 1, "--out", out]

    assert run(catalogue, *words, "--dry-run").exit_code == 0
    dry = run(other, *words)
    assert dry.exit_code == 1
    assert "the codes of a dry run of something else (other files)" in dry.output
    with monkeypatch.context() as patched:
        patched.setattr(Table, "write", interrupted)
        assert run(catalogue, *words).exit_code == 130
    unfinished = run(other, *words)
    assert unfinished.exit_code == 1
    assert "an unfinished backfill of something else (other files)" in unfinished.output
    assert run(catalogue, *words).exit_code == 0
    finished = run(other, *words)
    assert finished.exit_code == 1
    assert "is not empty, and its table is another backfill's" in finished.output
    assert run(other, *words, "--force").exit_code == 0
    assert len(table_of(out)) == 10


@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize("option", ["--out", "--journal"])
def test_a_file_where_a_directory_is_needed_is_named(tmp_path: Path, option: str) -> None:
    catalogue = write_embeddings(tmp_path / "items.parquet", matrix_of(20))
    (tmp_path / "file").touch()

    result = run(catalogue, "--out", tmp_path / "out", option, tmp_path / "file" / "below")

    assert (result.exit_code, result.output) == (1, f"semid: {tmp_path}/file is a file; a directory is needed\n")


@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize("place", ["", "/ids", "/../items"])
def test_the_catalogue_is_never_where_the_table_goes_even_if_forced(tmp_path: Path, place: str) -> None:
    items = tmp_path / "items"
    items.mkdir()
    catalogue = write_embeddings(items / "part-000000.parquet", matrix_of(20))
    before = catalogue.read_bytes()

    result = run(items, "--workers", 1, "--force", "--out", f"{items}{place}")
    by_pattern = run(items / "*.parquet", "--workers", 1, "--force", "--out", items)

    assert (result.exit_code, by_pattern.exit_code) == (1, 1)
    assert "name a directory apart from it by --out" in result.output
    assert "name a directory apart from it by --out" in by_pattern.output
    assert catalogue.read_bytes() == before


@pytest.mark.usefixtures("settings")
def test_a_backfill_that_is_killed_as_it_clears_up_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [write_embeddings(tmp_path / "items.parquet", matrix_of(20)), "--workers", 1, "--out", tmp_path / "out"]
    with monkeypatch.context() as patched:
        patched.setattr("service.backfill.journal.shutil.rmtree", interrupted)
        assert run(*words).exit_code == 130
    shutil.rmtree(tmp_path / "out" / ".backfill" / "rejected")

    again = run(*words)

    assert (again.exit_code, len(table_of(tmp_path / "out"))) == (0, 20), again.output
    assert not (tmp_path / "out" / ".backfill").exists()


@pytest.mark.usefixtures("settings")
def test_a_backfill_that_is_done_is_not_done_again_while_its_record_and_its_table_are_there(
    tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = matrix_of(20)
    matrix[7] = 0.0
    words = [write_embeddings(tmp_path / "items.parquet", matrix), "--workers", 1, "--out", tmp_path / "out"]
    first = run(*words)
    with monkeypatch.context() as patched:
        patched.setattr(engines, "BlockEncoder", None)
        again = run(*words)
        patched.setenv("SID_DATA_DIR", str(data_dir / "another"))
        of_another_record = run(*words)
    (tmp_path / "out" / "part-000000.parquet").unlink()
    without_a_part = run(*words)

    assert (first.exit_code, again.exit_code) == (3, 3), again.output  # of both a row was rejected
    assert "19 items with their Semantic IDs" in again.output
    assert "nothing was done now" in again.output
    assert "nothing was done now" not in first.output
    assert (of_another_record.exit_code, without_a_part.exit_code) == (1, 1)
    assert "is not empty" in of_another_record.output
    assert "is not empty" in without_a_part.output


@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize("damaged", ["codes/*/000001.arrow", "claims/000000.arrow"])
def test_a_damaged_file_of_the_journal_is_named_and_made_again_once_it_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: str
) -> None:
    catalogue = write_embeddings(tmp_path / "items.parquet", matrix_of(100))
    words = [catalogue, "--workers", 1, "--block-rows", 40, "--out", tmp_path / "out"]
    with monkeypatch.context() as patched:
        patched.setattr(Table, "write", interrupted)
        assert run(*words).exit_code == 130
    (path,) = (tmp_path / "out" / ".backfill").glob(damaged)
    path.write_bytes(path.read_bytes()[:100])

    refused = run(*words)
    path.unlink()
    again = run(*words)

    assert refused.exit_code == 1
    assert f"{path} is damaged" in refused.output
    assert again.exit_code == 0, again.output
    assert len(set(table_of(tmp_path / "out")["semantic_id"].to_pylist())) == 100


@pytest.mark.usefixtures("settings")
def test_claims_are_made_again_where_the_registry_is_another(
    tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sorting, "ROWS_PER_RUN", ROWS_PER_RUN)
    catalogue = write_embeddings(tmp_path / "items.parquet", matrix_of(600))
    words = [catalogue, "--out", tmp_path / "out", "--workers", 1]
    with monkeypatch.context() as patched:
        patched.setattr(Table, "write", interrupted)
        assert run(*words).exit_code == 130
    monkeypatch.setenv("SID_DATA_DIR", str(data_dir / "another"))

    result = run(*words)

    assert result.exit_code == 0, result.output
    assert "another record" in caplog.text
    assert json.loads((tmp_path / "out" / "backfill.json").read_text())["created"] == 600


def test_what_the_registry_would_not_do_as_asked_is_refused_before_anything_is_encoded(
    tmp_path: Path, make_checkpoint: Any, settings: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "BlockEncoder", None)
    catalogue = write_embeddings(tmp_path / "items.parquet", matrix_of(9), rank=list(range(9)))
    words = [catalogue, "--out", tmp_path / "out", "--workers", 1]
    with monkeypatch.context() as patched:
        patched.setenv("SID_REDIS_URL", "redis+cluster://127.0.0.1:1")
        on_cluster = run(*words, "--order-by", "rank")
    monkeypatch.setenv("SID_OVERFLOW", '{"shop": "next_nearest"}')
    narrow = make_checkpoint("narrow-shop", 2, 2, takes_text=False, dimension=8, max_suffix=3)
    overflowing = run(*words, "--namespace", "shop", "--checkpoint", narrow)

    assert (on_cluster.exit_code, overflowing.exit_code) == (1, 1)
    assert "on a cluster suffixes are issued in no order" in on_cluster.output
    assert "SID_OVERFLOW places items of the namespace shop" in overflowing.output
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("settings")
def test_a_file_that_cannot_be_read_ends_the_command_in_words_and_what_was_done_stays(tmp_path: Path) -> None:
    for name in ("a", "b"):
        catalogue = write_embeddings(tmp_path / f"{name}.parquet", matrix_of(90))
    whole = catalogue.read_bytes()
    page = pq.ParquetFile(catalogue).metadata.row_group(0).column(1).data_page_offset
    catalogue.write_bytes(whole[:page] + b"\xff" * 500 + whole[page + 500 :])

    broken = run(tmp_path / "?.parquet", "--out", tmp_path / "out", "--workers", 1)

    assert broken.exit_code == 1
    assert f"{catalogue} cannot be read from row 0 on" in broken.output
    assert len(list((tmp_path / "out" / ".backfill" / "codes").glob("*/*.arrow"))) == 1


@pytest.mark.usefixtures("settings")
def test_a_file_that_is_replaced_while_it_is_read_by_one_of_as_many_rows_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalogue = write_embeddings(tmp_path / "items.parquet", matrix_of(90))
    other = write_embeddings(tmp_path / "other", matrix_of(90, seed=6))
    write = code_files.write_arrow

    def replace_and_write(path: Path, rows: pa.Table) -> None:
        if other.exists():
            other.replace(catalogue)
        write(path, rows)

    monkeypatch.setattr(code_files, "write_arrow", replace_and_write)
    words = [catalogue, "--out", tmp_path / "out", "--workers", 1, "--block-rows", 30]
    result, again = run(*words), run(*words)

    assert result.exit_code == 1
    assert f"{catalogue} was changed or replaced after the backfill of it began" in result.output
    assert again.exit_code == 1
    assert "something else (other files)" in again.output


@pytest.mark.usefixtures("settings")
def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    words = [write_embeddings(tmp_path / "items.parquet", matrix_of(90)), "--out", tmp_path / "out", "--workers", 1]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))  # a plan fits, codes do not
    try:
        result = run(*words, "--dry-run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    assert result.exit_code == 1
    assert f"File too large: '{tmp_path}/out/.backfill/codes/" in result.output


def test_texts_that_the_record_knows_are_not_encoded_again_and_titles_are_kept(
    service: Any, namespace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SID_CHECKPOINT", str(service.settings.checkpoint))
    monkeypatch.setenv("SID_DATA_DIR", str(service.settings.data_dir))
    monkeypatch.setenv("SID_DISPLAY_BYTES", "32")
    names = [f"No. {row}" if row % 2 else None for row in range(9)]
    rows = [{"item_id": f"t{row}", "text": f"kettle {row}", "name": name} for row, name in enumerate(names)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "items.parquet")
    known = [{"item_id": row["item_id"], "text": row["text"]} for row in rows[:6]]
    before = service.tokenize(*known, namespace=namespace)
    encoded: list[int] = []
    encode_columns = Batcher.encode_columns

    async def count_and_encode(batcher: Batcher, contents: Any, **options: Any) -> Any:
        if not options:  # of the warming-up
            encoded.append(len(contents))
        return await encode_columns(batcher, contents, **options)

    monkeypatch.setattr(Batcher, "encode_columns", count_and_encode)
    words = [tmp_path / "items.parquet", "--workers", 1, "--namespace", namespace, "--display", "name"]
    result = run(*words, "--out", tmp_path / "out")

    assert result.exit_code == 0, result.output
    assert encoded == [3]
    table = table_of(tmp_path / "out")
    assert table["semantic_id"].to_pylist()[:6] == [answer["semantic_id"] for answer in before]
    assert table["created"].to_pylist() == [False] * 6 + [True] * 3
    assert titles_of(service.settings, namespace) == {row["item_id"]: row["name"] for row in rows if row["name"]}
    monkeypatch.setenv("SID_DISPLAY_BYTES", "0")
    without = run(*words, "--out", tmp_path / "another")
    assert without.exit_code == 1
    assert "set SID_DISPLAY_BYTES" in without.output


def titles_of(settings: Any, namespace: str) -> dict[str, str]:
    """The titles of a record's items."""

    async def read() -> dict[str, str]:
        async with opened_record(
            Settings(data_dir=settings.data_dir), read_manifest(settings.checkpoint), namespace
        ) as record:
            parts = [part async for part in record.contents.scan()]
        return {one.item_id.decode(): one.display.decode() for part in parts for one in part.items if one.display}

    return asyncio.run(read())

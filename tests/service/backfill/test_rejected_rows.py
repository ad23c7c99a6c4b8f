"""Rows of a backfill that are at fault: each is rejected alone, with its reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from service.backfill.code_files import CodeFile
from tests.service.backfill.catalogues import matrix_of, rejected_of, run, table_of, write_embeddings


@pytest.mark.usefixtures("settings")
def test_a_row_at_fault_is_rejected_alone_with_its_reason(tmp_path: Path) -> None:
    rows: list[Any] = [list(row) for row in matrix_of(8).tolist()]
    rows[1], rows[2], rows[3][4], rows[4] = rows[1][:5], None, None, [float("nan")] * 8
    ids = ["a", "b", "c", "d", "e", None, "", "h"]
    pq.write_table(pa.table({"item_id": ids, "embedding": rows}), tmp_path / "items.parquet")

    result = run(tmp_path / "items.parquet", "--out", tmp_path / "out", "--workers", 1)

    assert result.exit_code == 3, result.output
    assert table_of(tmp_path / "out")["item_id"].to_pylist() == ["a", "h"]
    found = [(row["row"], row["item_id"], row["type"].rpartition(":")[2]) for row in rejected_of(tmp_path / "out")]
    assert found == [
        (2, "b", "invalid_embedding"),
        (3, "c", "invalid_content"),
        (4, "d", "invalid_embedding"),
        (5, "e", "invalid_embedding"),
        (6, None, "invalid_item_id"),
        (7, "", "invalid_item_id"),
    ]


def strings_of(texts: list[bytes]) -> pa.Array:
    """A column of strings, whatever bytes these are."""
    ends = np.cumsum([0, *map(len, texts)], dtype=np.int32)
    return pa.Array.from_buffers(pa.string(), len(texts), [None, pa.py_buffer(ends), pa.py_buffer(b"".join(texts))])


@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize("kind", [pa.list_(pa.float32()), pa.list_(pa.float32(), 8)])
def test_an_item_id_that_is_not_utf8_gets_no_id_and_its_neighbours_get_theirs(tmp_path: Path, kind: Any) -> None:
    embeddings = pa.array(list(matrix_of(3)), kind)
    ids = strings_of([b"a", b"\xff\xfe", "\N{SNOWMAN}".encode()])
    pq.write_table(pa.table({"item_id": ids, "embedding": embeddings}), tmp_path / "items.parquet")

    result = run(tmp_path / "items.parquet", "--out", tmp_path / "out", "--workers", 1)

    assert result.exit_code == 3, result.output
    assert table_of(tmp_path / "out")["item_id"].to_pylist() == ["a", "\N{SNOWMAN}"]
    (rejected,) = rejected_of(tmp_path / "out")
    assert (rejected["row"], rejected["item_id"]) == (2, None)
    assert rejected["detail"] == "its item_id is not UTF-8"


def test_a_text_that_is_not_utf8_is_told_with_its_item(service: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("SID_CHECKPOINT", str(service.settings.checkpoint))
    monkeypatch.setenv("SID_DATA_DIR", str(tmp_path / "data"))
    titles = strings_of([b"kettle", b"\xff\xfe", b"lamp"])
    pq.write_table(pa.table({"item_id": [1, 2, 3], "title": titles, "brand": ["a"] * 3}), tmp_path / "items.parquet")

    run(tmp_path / "items.parquet", "--out", tmp_path / "out", "--workers", 1, "--dry-run")
    codes = CodeFile.open(next((tmp_path / "out").glob(".backfill/codes/*/000000.arrow")))

    assert codes.rows["item_id"].to_pylist()[codes.valid :] == ["2"]
    assert codes.rows["error"].to_pylist()[codes.valid]["detail"] == "its title is not UTF-8"
    assert codes.valid == 2


@pytest.mark.usefixtures("settings")
def test_a_catalogue_of_which_nothing_can_be_tokenized_is_rejected_whole(tmp_path: Path) -> None:
    catalogue = write_embeddings(tmp_path / "items.parquet", matrix_of(9) * 0)
    words = [catalogue, "--out", tmp_path / "out", "--workers", 1]

    dry, result = run(*words, "--dry-run"), run(*words)

    assert (dry.exit_code, result.exit_code) == (0, 3), dry.output + result.output
    assert "9 rows would be rejected" in dry.output
    assert (len(table_of(tmp_path / "out")), len(rejected_of(tmp_path / "out"))) == (0, 9)


def test_items_whose_codes_have_no_suffix_left_are_rejected(
    tmp_path: Path, data_dir: Path, make_checkpoint: Any, settings: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = make_checkpoint("narrow", 2, 2, takes_text=False, dimension=8, max_suffix=3)
    catalogue = write_embeddings(tmp_path / "items.parquet", matrix_of(60))

    result = run(catalogue, "--out", tmp_path / "out", "--workers", 1, "--checkpoint", checkpoint)

    assert result.exit_code == 3, result.output
    table, rejected = table_of(tmp_path / "out"), rejected_of(tmp_path / "out")
    assert len(table) + len(rejected) == 60
    assert max(table["suffix"].to_pylist()) == 3
    assert {row["type"].rpartition(":")[2] for row in rejected} == {"suffix_exhausted"}
    assert [row["row"] for row in rejected] == sorted(row["row"] for row in rejected)

"""Which files, which rows of them, which columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from service.backfill.plan import Kind, make_plan
from tests.service.backfill.catalogues import matrix_of, write_embeddings


def test_files_come_in_the_order_of_the_arguments_and_of_their_names_and_each_once(tmp_path: Path) -> None:
    for name in ("b", "a", "c/d", "c/.hidden/e", "z"):
        path = tmp_path / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_embeddings(path, matrix_of(5))

    plan = make_plan([f"{tmp_path}/z.parquet", f"file://{tmp_path}/[ab].parquet", str(tmp_path)], block_rows=2)

    names = [file.path.rpartition(f"{tmp_path}/")[2] for file in plan.files]
    assert names == ["z.parquet", "a.parquet", "b.parquet", "c/d.parquet"]
    assert [(block.start, block.rows, block.first) for block in plan.blocks[:4]] == [
        (0, 2, 0),
        (2, 2, 2),
        (4, 1, 4),
        (0, 2, 5),
    ]
    assert plan.rows == 20


def table(**columns: Any) -> pa.Table:
    return pa.table({"item_id": [1], **columns})


@pytest.mark.parametrize(
    ("tables", "order_by", "words"),
    [
        ([], "input", "there is no Parquet file"),
        ([table(price=[1])], "input", "has not the columns item_id, and embedding or some of brand"),
        ([table(text=["a"]), table(embedding=[[1.0]])], "input", "some files hold embeddings and others texts"),
        ([table(text=["a"])], "rank", "has no column 'rank'; its columns are"),
        ([table(text=["a"], rank=[[1]])], "rank", "have no order here"),
        ([table(text=["a"], rank=[1]), table(text=["a"], rank=["1"])], "rank", "is of several types: int64, string"),
        (
            [table(text=["a"], rank=pa.array([0], kind)) for kind in (pa.timestamp("ms"), pa.date32())],
            "rank",
            "is of several types: date32",
        ),
        ([pa.table({"item_id": [1.5], "text": ["a"]})], "input", "item_id: expected strings or integers, got double"),
    ],
)
def test_what_cannot_be_backfilled_is_said_before_anything_is_done(
    tmp_path: Path, tables: list[pa.Table], order_by: str, words: str
) -> None:
    for number, rows in enumerate(tables):
        pq.write_table(rows, tmp_path / f"{number}.parquet")

    with pytest.raises(ValueError, match=words):
        make_plan([str(tmp_path)], order_by=order_by)


def test_columns_of_texts_are_read_beside_those_that_only_some_files_have(tmp_path: Path) -> None:
    pq.write_table(table(title=["a"], embedding=[[1.0]], price=[3]), tmp_path / "0.parquet")
    pq.write_table(table(title=["a"], brand=["b"]), tmp_path / "1.parquet")

    plan = make_plan([str(tmp_path)])

    assert (plan.kind, plan.columns.read) == (Kind.TEXTS, ("brand", "item_id", "title"))


@pytest.mark.parametrize(
    ("wanted", "taken"),
    [({}, Kind.TEXTS), ({"takes_text": False}, Kind.EMBEDDINGS), ({"content": Kind.EMBEDDINGS}, Kind.EMBEDDINGS)],
)
def test_of_files_with_texts_and_embeddings_one_is_taken_which_is_said_where_nobody_chose(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, wanted: Any, taken: Kind
) -> None:
    pq.write_table(table(title=["a"], embedding=[[1.0]]), tmp_path / "items.parquet")

    plan = make_plan([str(tmp_path)], display="title", **wanted)

    of_content = {Kind.TEXTS: [], Kind.EMBEDDINGS: ["embedding"]}
    assert (plan.kind, list(plan.columns.read)) == (taken, [*of_content[taken], "item_id", "title"])
    assert (f"have both: {taken} are tokenized" in caplog.text) == ("content" not in wanted)


def test_content_that_not_all_files_have_and_credentials_in_a_path_are_refused(tmp_path: Path) -> None:
    pq.write_table(table(title=["a"]), tmp_path / "items.parquet")

    with pytest.raises(ValueError, match="not all of these files have embeddings"):
        make_plan([str(tmp_path)], content=Kind.EMBEDDINGS)
    with pytest.raises(ValueError, match="credentials go into the environment"):
        make_plan(["s3://name:secret@bucket/items/*.parquet"])

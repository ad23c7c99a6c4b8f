"""Interactions on disk and their split."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from models.interactions import UserSequence, in_rows, leave_one_out, read_interactions


def written(path: Path, **columns: pa.Array) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def test_sequences_come_in_the_order_of_the_file_as_strings(tmp_path: Path) -> None:
    path = written(tmp_path / "i.parquet", user_id=pa.array([7, 3]), item_ids=pa.array([[1, 2, 1], []]))

    assert list(read_interactions(path)) == [UserSequence("7", ("1", "2", "1")), UserSequence("3", ())]


def test_unknown_items_are_left_out_and_counted() -> None:
    sequences = iter([UserSequence("u", ("a", "x", "b")), UserSequence("v", ("x",))])

    assert in_rows(sequences, {"a": 0, "b": 1}) == ([(0, 1), ()], 2)


def test_the_last_two_interactions_are_left_out_of_the_training() -> None:
    split = leave_one_out([(5, 6, 7, 8), (1, 2), (1, 2, 3)])

    assert split.training == [(5, 6), (1,)]
    assert split.validation == [7, 2]
    assert split.test == [8, 3]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"user_id": pa.array(["u"])}, "needs the columns"),
        ({"user_id": pa.array(["u"]), "item_ids": pa.array(["a,b"])}, "expected lists"),
        ({"user_id": pa.array(["u"]), "item_ids": pa.array([["a", None]])}, "null"),
        ({"user_id": pa.array(["u"]), "item_ids": pa.array([None], pa.list_(pa.string()))}, "null"),
    ],
)
def test_a_file_of_another_shape_is_refused_with_what_it_lacks(tmp_path: Path, columns: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        list(read_interactions(written(tmp_path / "i.parquet", **columns)))


def test_a_file_that_is_no_parquet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "i.parquet").write_text("user,item\n")

    with pytest.raises(ValueError, match="cannot be read as interactions"):
        list(read_interactions(tmp_path / "i.parquet"))

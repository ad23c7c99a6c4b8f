"""What is read for training: rows, weights and item ids."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from models.training.data import Reading, read_training_data


def embeddings_table(path, rows, **columns):
    values = pa.array(np.asarray(rows, np.float32).ravel())
    lists = pa.FixedSizeListArray.from_arrays(values, rows.shape[1])
    pq.write_table(pa.table({**columns, "embedding": lists}), path)
    return path


def read(sources, **settings):
    return read_training_data(sources, Reading(**settings), None, say=lambda _: None)


def test_item_ids_come_in_the_order_of_the_rows_and_only_where_asked_for(tmp_path):
    # given
    rows = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    first = embeddings_table(tmp_path / "a.parquet", rows[:3], item_id=["x", "y", "z"])
    second = embeddings_table(tmp_path / "b.parquet", rows[3:], item_id=[7, 8])
    # when
    data = read([first, second], keep_ids=True)
    # then
    assert data.item_ids.to_pylist() == ["x", "y", "z", "7", "8"]
    assert np.array_equal(data.embeddings.numpy(), rows)
    assert read([first, second]).item_ids is None


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({}, "no column 'item_id'"),
        ({"item_id": ["a", None, "c"]}, "without an item_id"),
        ({"item_id": ["a", "", "c"]}, "without an item_id"),
        ({"item_id": [1.5, 2.5, 3.5]}, "strings or integers, got double"),
    ],
)
def test_item_ids_that_were_asked_for_and_are_not_there_are_refused(columns, reason, tmp_path):
    path = embeddings_table(tmp_path / "a.parquet", np.eye(3, dtype=np.float32), **columns)
    with pytest.raises(ValueError, match=reason):
        read([path], keep_ids=True)
    assert len(read([path]).embeddings) == 3


def test_an_array_names_no_items(tmp_path):
    np.save(tmp_path / "a.npy", np.eye(3, dtype=np.float32))
    with pytest.raises(ValueError, match="names no items"):
        read([tmp_path / "a.npy"], keep_ids=True)

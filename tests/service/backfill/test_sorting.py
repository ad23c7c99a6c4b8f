"""Sorted blocks are one order, whatever their sizes and however many rows are alike."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from service.backfill.code_files import packed_column, write_code_file
from service.backfill.collisions import Collisions
from service.backfill.sorting import Slices, cut, run_of


@pytest.mark.parametrize("alike", [1, 3, 40])
def test_runs_follow_each_other_in_one_order_and_find_back_to_their_blocks(tmp_path: Path, alike: int) -> None:
    random = np.random.default_rng(alike)
    sizes = [700, 0, 1, 350, 900]
    rows = np.arange(sum(sizes))
    codes = random.integers(0, alike, (len(rows), 2)).astype(np.uint8)
    order = [None if value == 0 else value for value in random.integers(0, 30, len(rows)).tolist()]
    paths, starts = [], np.cumsum([0, *sizes])
    for number, (first, last) in enumerate(pairwise(starts)):
        paths.append(tmp_path / f"{number}.arrow")
        columns = {
            "row": pa.array(rows[first:last]),
            "item_id": pa.array([f"i{row}" for row in rows[first:last]], pa.string()),
            "digest": pa.array(rows[first:last].astype(np.uint64)),
            "codes": packed_column(codes[first:last]),
            "order": pa.array(order[first:last], pa.int64()),
            "display": pa.nulls(last - first),
        }
        write_code_file(paths[-1], columns, [], 2)

    cuts = cut(paths, 128)
    runs = [run_of(paths, cuts, number) for number in range(len(cuts) - 1)]

    expected = sorted(rows.tolist(), key=lambda row: (*codes[row], order[row] is None, order[row] or 0, row))
    assert [row for run in runs for row in run.rows["row"].to_pylist()] == expected
    assert len(runs) > 10
    assert max(len(run.places) for run in runs) < 3 * 128
    slices = Slices(cuts)
    for number, (first, last) in enumerate(pairwise(starts)):
        found: list[int] = []
        for run, at, count in slices.of(number):
            in_slices = runs[run].rows["row"].to_numpy()[np.argsort(runs[run].places)]
            found += in_slices[at : at + count].tolist()
        assert found == [row for row in expected if first <= row < last]


def test_collisions_are_counted_over_runs_as_over_all() -> None:
    random = np.random.default_rng(3)
    codes = random.integers(0, 4, (500, 3))
    codes = codes[np.lexsort(codes.T[::-1])]
    counted = Collisions(3)
    for part in np.split(codes, np.sort(random.integers(0, 500, 60))):
        counted.add(part)

    report = counted.report()

    rows = [tuple(row) for row in codes.tolist()]
    sizes = [rows.count(group) for group in set(rows)]
    assert report["distinct_prefixes"] == [len({row[:level] for row in rows}) for level in (1, 2, 3)]
    assert report["groups_by_size"] == {str(size): sizes.count(size) for size in sorted(set(sizes))}
    assert [group["items"] for group in report["largest_groups"]] == sorted(sizes, reverse=True)[:10]

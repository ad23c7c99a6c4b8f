"""A whole catalogue, twice: every item its own Semantic ID, and the second time nothing is computed."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from models import TextTemplate

BEAUTY = Path(__file__).parents[3] / "shared" / "data" / "amazon_beauty_2014" / "items.parquet"
BATCH = 256
SAMPLE = 2048  # SID_FULL=1 takes all 12,101


def batches(rows: Sequence[Any], size: int = BATCH) -> Iterator[Sequence[Any]]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


@pytest.fixture(scope="module")
def catalogue() -> list[dict[str, str]]:
    """The items as text, through the template; all of them, or every sixth."""
    if not BEAUTY.is_file():
        assert "CI" not in os.environ, f"the catalogue is missing: {BEAUTY}"
        pytest.skip(f"the catalogue is missing: {BEAUTY}")
    rows = pyarrow.parquet.read_table(BEAUTY).to_pylist()
    if os.environ.get("SID_FULL") != "1":
        rows = rows[:: round(len(rows) / SAMPLE)]
    render = TextTemplate().render
    return [
        {
            "item_id": row["item_id"],
            "text": render({**row, "categories": row["category"]}),
        }
        for row in rows
    ]


def posted(running: Any, catalogue: list[dict[str, str]]) -> tuple[list[dict[str, Any]], float]:
    """The entries of all answers, and how long they took in seconds."""
    entries: list[dict[str, Any]] = []
    started = time.perf_counter()
    for batch in batches(catalogue):
        response = running.http.post("/tokenize", json={"namespace": "beauty", "items": batch})
        assert response.status_code == 200, response.text
        entries += response.json()["items"]
    return entries, time.perf_counter() - started


def test_a_catalogue_gets_as_many_ids_as_it_has_items_and_keeps_them(
    running: Any, catalogue: list[dict[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    first, first_s = posted(running, catalogue)
    rows = running.metric("semid_batch_rows_sum")
    second, second_s = posted(running, catalogue)

    ids = [entry["semantic_id"] for entry in first]
    groups: dict[tuple[int, ...], list[int]] = {}
    for entry in first:
        groups.setdefault(tuple(entry["codes"]), []).append(entry["suffix"])
    with capsys.disabled():
        raw = 1 - len(groups) / len(ids)
        print(
            f"\nBeauty: {len(ids)} items, {len(set(ids))} Semantic IDs, {raw:.2%} raw collisions, largest group "
            f"{max(map(len, groups.values()))}; first {first_s:.1f} s ({len(ids) / first_s:.0f}/s), again "
            f"{second_s:.2f} s ({len(ids) / second_s:.0f}/s, {first_s / second_s:.0f} times faster)"
        )

    assert [entry["item_id"] for entry in first] == [item["item_id"] for item in catalogue]
    assert all(entry["created"] for entry in first)
    assert len(set(ids)) == len(catalogue)
    assert all(sorted(suffixes) == list(range(len(suffixes))) for suffixes in groups.values())
    assert [entry["semantic_id"] for entry in second] == ids
    assert not any(entry["created"] or entry["content_changed"] for entry in second)
    assert running.metric("semid_batch_rows_sum") == rows
    for batch in batches(first, 1024):
        asked = {"namespace": "beauty", "semantic_ids": [entry["semantic_id"] for entry in batch]}
        found = running.http.post("/lookup", json=asked).json()["items"]
        assert [entry["item_id"] for entry in found] == [entry["item_id"] for entry in batch]
    for entry in first[:: len(first) // 100]:
        found = running.http.get(f"/item/{entry['semantic_id']}", params={"namespace": "beauty"}).json()
        assert found["item_id"] == entry["item_id"]

"""`semid migrate`: the new record filled, compared, made the default, and left again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner, Result

from models import read_manifest
from service.cli import app, tokenize_journal
from service.cli.tokenize_journal import Journal
from tests.conftest import DIMENSION

ITEMS = 60
CONTENTS = np.random.default_rng(11).standard_normal((ITEMS, DIMENSION)).astype(np.float32)


class Two(NamedTuple):
    """A service with two tokenizers, and their full names; the old one is the default."""

    service: Any
    old: str
    new: str

    def tokenize(self, rows: range, tokenizer: str | None, namespace: str) -> list[dict[str, Any]]:
        items = [{"item_id": f"i{row}", "embedding": CONTENTS[row].tolist()} for row in rows]
        found: list[dict[str, Any]] = self.service.tokenize(*items, namespace=namespace, tokenizer=tokenizer)
        return found

    def assignment(self, row: int, tokenizer: str, namespace: str) -> Any:
        return self.service.http.get(f"/assignment/i{row}", params={"tokenizer": tokenizer, "namespace": namespace})

    def migrate(self, directory: Path, files: list[Path], namespace: str, *more: str) -> Result:
        words = ["migrate", self.old, self.new, "--url", str(self.service.http.base_url), "--namespace", namespace]
        words += ["--out", str(directory / "out"), *(word for file in files for word in ("--items", str(file)))]
        return CliRunner().invoke(app, [*words, *more])


@pytest.fixture(scope="module")
def two(
    start_service: Callable[..., Any], make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Two]:
    winter = make_checkpoint("winter", 4, 4, 4, takes_text=False)
    spring = make_checkpoint("spring", 6, 6, seed=7, takes_text=False)
    data_dir = tmp_path_factory.mktemp("d")
    service = start_service(checkpoint=winter, further_checkpoints=(spring,), data_dir=data_dir, max_items=128)
    yield Two(service, *(read_manifest(path).full_name for path in (winter, spring)))
    service.stop()


def catalogue(path: Path, rows: range, zeroed: tuple[int, ...] = ()) -> Path:
    contents = CONTENTS[rows.start : rows.stop].copy()
    contents[[row - rows.start for row in zeroed]] = 0.0
    column = pa.array(list(contents), pa.list_(pa.float32(), DIMENSION))
    pq.write_table(pa.table({"item_id": [f"i{row}" for row in rows], "embedding": column}), path, row_group_size=7)
    return path


def test_the_new_record_is_filled_and_what_it_lacks_is_listed_with_the_reason(
    two: Two, namespace: str, tmp_path: Path
) -> None:
    old = two.tokenize(range(50), None, namespace)
    for row in (3, 20):
        two.service.http.delete(f"/assignment/i{row}", params={"namespace": namespace})
    files = [
        catalogue(tmp_path / "a.parquet", range(25), zeroed=(8,)),
        catalogue(tmp_path / "b.parquet", range(25, 45)),
    ]
    files.append(catalogue(tmp_path / "c.parquet", range(55, 58)))  # of which the old record knows nothing

    done = two.migrate(tmp_path, files, namespace)

    assert done.exit_code == 3, done.output
    missing = [json.loads(line) for line in (tmp_path / "out" / "missing.jsonl").read_text().splitlines()]
    reasons = {"i8": "rejected", **{f"i{row}": "not in the files" for row in range(45, 50)}}
    assert {each["item_id"]: each["reason"] for each in missing} == reasons
    assert {each["semantic_id"] for each in missing} == {old[row]["semantic_id"] for row in (8, *range(45, 50))}
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["items"] == {
        "both": 42,
        "missing": 6,
        "missing_by_reason": {"rejected": 1, "not in the files": 5},
        "only_new": 3,
        "retired": 2,
    }
    assert [two.assignment(row, two.new, namespace).status_code for row in (0, 3, 8, 20, 44, 45, 55)] == [
        200,
        410,
        404,
        410,
        200,
        404,
        200,
    ]
    both = [row for row in range(45) if row not in {3, 8, 20}]
    codes = {
        name: [two.assignment(row, name, namespace).json()["codes"] for row in both] for name in (two.old, two.new)
    }
    pairs = list(zip(*codes.values(), strict=True))
    assert [level["equal_codes"] for level in report["levels"]] == [
        sum(before[level] == after[level] for before, after in pairs) / 42 for level in (0, 1)
    ]
    live = {tuple(entry["codes"]) for row, entry in enumerate(old) if row not in {3, 20}}
    assert report["old"]["collisions"]["rate"] == 1 - len(live) / 48
    assert "missing under new    6 (5 not in the files, 1 rejected)" in done.output
    assert two.service.http.get("/tokenizers").json()["default"] == two.old


def test_a_migration_that_is_interrupted_goes_on_and_ends_as_if_it_had_not_been(
    two: Two, namespace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two.tokenize(range(40), two.old, namespace)
    files = [catalogue(tmp_path / "a.parquet", range(30)), catalogue(tmp_path / "b.parquet", range(30, 40))]
    monkeypatch.setattr(tokenize_journal, "ROWS_PER_PART", 1)
    monkeypatch.setattr("service.cli.tokenize_source.ROWS_TOGETHER", 2)
    append, began = Journal.append, []

    def append_and_end(journal: Journal, batch: pa.RecordBatch) -> None:
        began.append(journal.rows)
        append(journal, batch)
        if len(began) in {2, 5}:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "append", append_and_end)
    ended = [two.migrate(tmp_path, files, namespace, "--in-flight", "1").exit_code for _ in range(3)]

    assert ended == [130, 130, 0]
    assert began == sorted(set(began))  # nothing was asked for twice
    ids = pq.read_table(tmp_path / "out" / "ids.parquet")
    assert ids["item_id"].to_pylist() == [f"i{row}" for row in range(40)]
    held = [two.assignment(row, two.new, namespace).json()["semantic_id"] for row in range(40)]
    assert ids["semantic_id"].to_pylist() == held
    assert (tmp_path / "out" / "missing.jsonl").read_text() == ""


def test_the_default_changes_only_where_nothing_is_missing_or_so_much_may_be_and_changes_back_by_one_command(
    two: Two, namespace: str, tmp_path: Path
) -> None:
    old = two.tokenize(range(20), None, namespace)
    files = [catalogue(tmp_path / "a.parquet", range(19))]

    refused = two.migrate(tmp_path, files, namespace, "--switch")

    assert refused.exit_code == 1
    assert "nothing was switched: 1 items would have no Semantic ID" in refused.stderr
    assert two.service.http.get("/tokenizers").json()["default"] == two.old
    try:
        switched = two.migrate(tmp_path, files, namespace, "--switch", "--missing-at-most", "1")
        assert switched.exit_code == 3, switched.output
        report = json.loads((tmp_path / "out" / "report.json").read_text())
        assert report["switch"] == {"default": two.new, "pending_workers": 0, "late": [], "late_retired": []}
        assert two.tokenize(range(19, 20), None, namespace)[0]["created"]  # the first request fills what was missing
        before = two.service.http.get(
            f"/item/{old[0]['semantic_id']}", params={"namespace": namespace, "tokenizer": two.old}
        )
        assert before.json()["item_id"] == "i0"
        two.service.http.delete("/assignment/i5", params={"namespace": namespace, "tokenizer": two.old})
        again = two.migrate(tmp_path, files, namespace)
        assert again.exit_code == 0, again.output
        assert two.assignment(5, two.new, namespace).status_code == 200  # what is live is said by the default
    finally:
        words = ["tokenizers", "default", two.old, "--url", str(two.service.http.base_url)]
        back = CliRunner().invoke(app, words)
    assert back.exit_code == 0
    assert two.tokenize(range(1), None, namespace)[0]["semantic_id"] == old[0]["semantic_id"]


@pytest.mark.parametrize("names", [("winter", "winter"), ("winter", "autumn")])
def test_tokenizers_that_are_one_or_not_loaded_are_refused_before_anything_is_asked_for(
    two: Two, namespace: str, tmp_path: Path, names: tuple[str, str]
) -> None:
    refused = Two(two.service, *names).migrate(tmp_path, [catalogue(tmp_path / "a.parquet", range(2))], namespace)

    assert refused.exit_code == 1
    assert "where to come from and where to go" in refused.stderr or "not loaded" in refused.stderr
    assert two.service.assigned(namespace) == {}

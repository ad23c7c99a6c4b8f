"""`semid migrate`: the new record filled, compared, made the default, and left again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from models import read_manifest
from service.cli import tokenize_journal
from service.cli.tokenize_journal import Journal
from tests.service.migration.two import Two, catalogue, report_in


def test_a_name_that_several_tokenizers_have_is_told_with_those_that_it_may_mean(
    start_service: Callable[..., Any],
    make_checkpoint: Callable[..., Path],
    checkpoints: tuple[Path, Path],
    data_dir: Path,
    namespace: str,
    tmp_path: Path,
) -> None:
    namesake = make_checkpoint("spring", 4, 4, seed=9, takes_text=False)
    further = (checkpoints[1], namesake)
    service = start_service(checkpoint=checkpoints[0], further_checkpoints=further, data_dir=data_dir)

    refused = Two(service, "winter", "spring").migrate(
        tmp_path, [catalogue(tmp_path / "a.parquet", range(2))], namespace
    )
    service.stop()

    meant = " or ".join(read_manifest(path).full_name for path in further)
    assert refused.exit_code == 1
    assert refused.stderr == f"semid: several loaded tokenizers have the name spring: say {meant}\n"


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
    report = report_in(tmp_path)
    assert report["items"] == {
        "both": 42,
        "missing": 6,
        "missing_by_reason": {"rejected": 1, "not in the files": 5},
        "only_new": 3,
        "retired": 2,
        "live_again": [],
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
    assert two.default == two.old


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
    assert two.default == two.old
    try:
        switched = two.migrate(tmp_path, files, namespace, "--switch", "--missing-at-most", "1")
        assert switched.exit_code == 3, switched.output
        report = report_in(tmp_path)
        assert (report["default"], report["switch"]["pending_workers"]) == (two.new, 0)
        assert two.tokenize(range(19, 20), None, namespace)[0]["created"]  # the first request fills what was missing
        before = two.service.http.get(
            f"/item/{old[0]['semantic_id']}", params={"namespace": namespace, "tokenizer": two.old}
        )
        assert before.json()["item_id"] == "i0"
        two.service.http.delete("/assignment/i5", params={"namespace": namespace, "tokenizer": two.old})
        again = two.migrate(tmp_path, files, namespace)
        assert again.exit_code == 0, again.output
        assert two.assignment(5, two.new, namespace).status_code == 200  # what is live is said by the default
        report = report_in(tmp_path)
        assert (report["default"], report["items"]["live_again"]) == (two.new, ["i5"])
        assert "retired under old    1 of those only under new" in again.output
    finally:
        back = two.make_default(two.old)
    assert back.exit_code == 0
    assert two.tokenize(range(1), None, namespace)[0]["semantic_id"] == old[0]["semantic_id"]


def test_a_namespace_that_the_old_tokenizer_knows_nothing_of_switches_nothing(
    two: Two, namespace: str, tmp_path: Path
) -> None:
    two.tokenize(range(3), None, namespace)
    files = [catalogue(tmp_path / "a.parquet", range(3))]

    mistyped = two.migrate(tmp_path, files, f"{namespace}x", "--switch")

    assert mistyped.exit_code == 1
    assert f"nothing was switched: no item is live under {two.old} in this namespace" in mistyped.stderr
    assert two.default == two.old


def test_going_back_by_the_same_command_loses_nobody_who_came_or_went_meanwhile(
    two: Two, namespace: str, tmp_path: Path
) -> None:
    def held(tokenizer: str) -> dict[int, str]:
        """What is live under a tokenizer."""
        answers = {row: two.assignment(row, tokenizer, namespace) for row in range(16)}
        return {row: answer.json()["semantic_id"] for row, answer in answers.items() if answer.is_success}

    def retire(row: int) -> None:
        assert two.service.http.delete(f"/assignment/i{row}", params={"namespace": namespace}).is_success

    two.tokenize(range(10), None, namespace)
    retire(9)
    assert two.migrate(tmp_path, [catalogue(tmp_path / "a.parquet", range(10))], namespace).exit_code == 0
    two.tokenize(range(9, 10), None, namespace)  # it has come back, and so far the new one has it retired
    fewer = [catalogue(tmp_path / "a.parquet", range(9))]
    there = two.migrate(tmp_path, fewer, namespace, "--switch", "--missing-at-most", "1")
    assert (there.exit_code, two.default) == (3, two.new)
    before = {name: held(name) for name in (two.old, two.new)}
    time.sleep(1.1)  # what is retired from now on is so since the switch, by the whole seconds that are kept
    two.tokenize(range(10, 14), None, namespace)  # under the new one, which is the default
    two.tokenize(range(14, 15), two.old, namespace)  # by a stream that began before, say
    retire(4)
    since = held(two.new)

    fresh = [catalogue(tmp_path / "b.parquet", range(16))]
    back = Two(two.service, two.new, two.old).migrate(tmp_path, fresh, namespace, "--switch")

    assert (back.exit_code, two.default) == (0, two.old), back.output
    after = {name: held(name) for name in (two.old, two.new)}
    assert {*after[two.old]} == {*range(16)} - {4}
    assert after[two.new] == since
    assert {*since} == {*range(14)} - {4, 9}
    for name in (two.old, two.new):
        assert {row: after[name].get(row) for row in before[name] if row != 4} == {
            row: semantic_id for row, semantic_id in before[name].items() if row != 4
        }
    for row in range(10, 14):
        found = two.service.http.get(f"/item/{after[two.old][row]}", params={"namespace": namespace}).json()
        assert (found["item_id"], found["counterparts"]) == (f"i{row}", {two.new: since[row]})


@pytest.mark.parametrize("names", [("winter", "winter"), ("winter", "autumn")])
def test_tokenizers_that_are_one_or_not_loaded_are_refused_before_anything_is_asked_for(
    two: Two, namespace: str, tmp_path: Path, names: tuple[str, str]
) -> None:
    refused = Two(two.service, *names).migrate(tmp_path, [catalogue(tmp_path / "a.parquet", range(2))], namespace)

    assert refused.exit_code == 1
    assert "where to come from and where to go" in refused.stderr or "not loaded" in refused.stderr
    assert two.service.assigned(namespace) == {}

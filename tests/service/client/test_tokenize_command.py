"""`semid tokenize`: what ends a run in its middle does not show in its result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner, Result

from service.cli import app, tokenize_journal
from service.cli.tokenize_journal import ANSWERS, Journal, RunUnderWay
from tests.conftest import DIMENSION

ROWS = 300


def run(*words: Any) -> Result:
    return CliRunner().invoke(app, ["tokenize", *(str(word) for word in words)])


@pytest.fixture
def url(service: Any) -> str:
    return str(service.http.base_url)


def embeddings(path: Path) -> Path:
    """A file of embeddings in several row groups, its ids integers, its numbers float64; one row is at fault."""
    matrix = np.random.default_rng(5).standard_normal((ROWS, DIMENSION))
    matrix[77] = 0.0
    column = pa.array(list(matrix), pa.list_(pa.float64()))
    pq.write_table(pa.table({"embedding": column, "item_id": list(range(ROWS))}), path, row_group_size=90)
    return path


def texts(path: Path) -> Path:
    rows = [{"item_id": f"t{row}", "title": f"kettle {row % 7}" if row != 33 else " "} for row in range(110)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(("write", "ending"), [(embeddings, "parquet"), (texts, "csv"), (texts, "jsonl")])
def test_a_run_that_is_interrupted_goes_on_and_ends_with_the_same_bytes(
    url: str, namespace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Any, ending: str
) -> None:
    catalogue = write(tmp_path / ("items.parquet" if write is embeddings else "items.jsonl"))
    whole, ended = tmp_path / f"whole.{ending}", tmp_path / f"ended.{ending}"
    monkeypatch.setattr(tokenize_journal, "ROWS_PER_PART", 20)
    monkeypatch.setattr("service.cli.tokenize_source.ROWS_TOGETHER", 15)
    words = [catalogue, "--url", url, "--batch-items", 15, "--in-flight", 1]  # one after another: equal suffixes
    undisturbed = run(*words, "--out", whole, "--namespace", f"{namespace}-1")
    words += ["--out", ended, "--namespace", f"{namespace}-2"]

    append = Journal.append
    lives: list[int] = []
    for _ in range(3):
        appended: list[int] = []

        def append_and_end(journal: Journal, batch: pa.RecordBatch, appended: list[int] = appended) -> None:
            if not appended:
                lives.append(journal.rows)
            append(journal, batch)
            appended.append(len(batch))
            if len(appended) == 2:
                raise KeyboardInterrupt

        monkeypatch.setattr(Journal, "append", append_and_end)
        interrupted = run(*words)
        assert interrupted.exit_code == 130, interrupted.output
        assert not ended.exists()
    monkeypatch.setattr(Journal, "append", append)
    last = run(*words)

    assert lives[0] == 0 < lives[1] < lives[2]  # each began behind the one before
    assert (undisturbed.exit_code, last.exit_code) == (3, 3), last.output
    assert "are done already" in last.output
    assert ended.read_bytes() == whole.read_bytes()
    rejected = [json.loads(line) for line in (tmp_path / "ended.rejected.jsonl").read_text().splitlines()]
    assert [(row["row"], row["item_id"]) for row in rejected] == [(78, "77") if write is embeddings else (34, "t33")]
    assert (tmp_path / "ended.rejected.jsonl").read_bytes() == (tmp_path / "whole.rejected.jsonl").read_bytes()
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith(".")} == set()


JSON_ROWS = """\
{"item_id": "a", "title": "kettle"}
{"title": "lamp"}
{"item_id": "b", "title": ["rug", 3]}
{nonsense

{"item_id": "c", "title": "rug"}
[]
"""
CSV_ROWS = """\
item_id,title
,lamp
a,kettle
b,rug,more
c,rug
"""


@pytest.mark.parametrize(
    ("name", "content", "bad"),
    [
        (
            "items.jsonl",
            JSON_ROWS,
            [
                (2, None, "has no 'item_id'"),
                (3, "b", "title: expected"),
                (4, None, "is not JSON"),
                (6, None, "no JSON"),
            ],
        ),
        ("items.csv", CSV_ROWS, [(1, None, "has no 'item_id'"), (3, None, "more cells")]),
    ],
)
def test_a_row_that_cannot_be_read_is_rejected_alone(
    url: str, namespace: str, tmp_path: Path, name: str, content: str, bad: list[tuple[int, str | None, str]]
) -> None:
    (tmp_path / name).write_text(content)

    result = run(tmp_path / name, "--out", tmp_path / "ids.jsonl", "--url", url, "--namespace", namespace)

    assert result.exit_code == 3, result.output
    written = [json.loads(line)["item_id"] for line in (tmp_path / "ids.jsonl").read_text().splitlines()]
    assert written == ["a", "c"]
    told = [json.loads(line) for line in (tmp_path / "ids.rejected.jsonl").read_text().splitlines()]
    assert [(each["row"], each["item_id"], each["type"]) for each in told] == [
        (row, item_id, "urn:semid:problem:invalid_item") for row, item_id, _ in bad
    ]
    assert all(words in each["detail"] for each, (_, _, words) in zip(told, bad, strict=True))


def test_a_run_that_was_interrupted_goes_on_behind_rows_that_cannot_be_read(
    url: str, namespace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.cli.tokenize_source.ROWS_TOGETHER", 4)
    monkeypatch.setattr("service.cli.tokenize_source.ROWS_ON_THEIR_WAY", 5)
    rows = [{"title": "lamp"} if row % 3 == 1 else {"item_id": f"t{row}", "title": "kettle"} for row in range(20)]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [tmp_path / "items.jsonl", "--out", tmp_path / "ids.jsonl", "--url", url, "--namespace", namespace]
    append = Journal.append

    def append_and_end(journal: Journal, batch: pa.RecordBatch) -> None:
        append(journal, batch)
        if journal.rows + len(batch) == 8:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(tokenize_journal, "ROWS_PER_PART", 4)
        patched.setattr(Journal, "append", append_and_end)
        assert run(*words).exit_code == 130
    result = run(*words)

    assert result.exit_code == 3, result.output
    written = [json.loads(line)["item_id"] for line in (tmp_path / "ids.jsonl").read_text().splitlines()]
    assert written == [row["item_id"] for row in rows if "item_id" in row]
    told = [json.loads(line)["row"] for line in (tmp_path / "ids.rejected.jsonl").read_text().splitlines()]
    assert told == [row + 1 for row in range(20) if row % 3 == 1]


def test_a_row_of_embeddings_without_an_item_id_is_rejected_alone(url: str, namespace: str, tmp_path: Path) -> None:
    matrix = np.random.default_rng(6).standard_normal((2, DIMENSION))
    table = {"item_id": ["a", None, "c"], "embedding": pa.array([None, *matrix], pa.list_(pa.float64()))}
    pq.write_table(pa.table(table), tmp_path / "items.parquet")

    result = run(tmp_path / "items.parquet", "--out", tmp_path / "ids.jsonl", "--url", url, "--namespace", namespace)

    assert result.exit_code == 3, result.output
    told = [json.loads(line) for line in (tmp_path / "ids.rejected.jsonl").read_text().splitlines()]
    assert [(each["row"], each["item_id"]) for each in told] == [(1, "a"), (2, None)]


def test_a_file_without_a_header_is_refused(tmp_path: Path) -> None:
    (tmp_path / "items.csv").touch()

    result = run(tmp_path / "items.csv")

    assert result.exit_code == 1
    assert result.output.strip() == f"semid: {tmp_path}/items.csv has no header line"


def answers(first: int, rows: int) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist([{"item_id": f"i{first + row}", "codes": [1]} for row in range(rows)], ANSWERS)


def test_a_run_that_is_killed_loses_what_is_in_no_part_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenize_journal, "ROWS_PER_PART", 10)
    killed = Journal(tmp_path / "ids.jsonl", {"of": "this"})
    killed.__enter__()
    killed.note(tokenizer="small@1")
    killed.append(answers(0, 12))
    killed.append(answers(12, 5))
    killed._lock.close()  # a process that is killed holds no lock
    (tmp_path / ".ids.jsonl.run" / ".000000000012.arrow.draft").write_bytes(b"half a part")

    with Journal(tmp_path / "ids.jsonl", {"of": "this"}) as journal:
        assert (journal.rows, journal.notes) == (12, {"tokenizer": "small@1"})
        with pytest.raises(RunUnderWay), Journal(tmp_path / "ids.jsonl", {"of": "this"}):
            pass
        journal.append(answers(12, 8))
        assert journal.finish(tmp_path / "rejected.jsonl") == (20, 0)
    lines = (tmp_path / "ids.jsonl").read_text().splitlines()
    assert [json.loads(line)["item_id"] for line in lines] == [f"i{row}" for row in range(20)]
    assert [path.name for path in tmp_path.iterdir()] == ["ids.jsonl"]


def test_what_another_run_has_left_is_not_gone_on_with(tmp_path: Path) -> None:
    with Journal(tmp_path / "ids.jsonl", {"of": "this"}) as journal:
        journal.append(answers(0, 12))
    with Journal(tmp_path / "ids.jsonl", {"of": "another"}) as journal:
        assert journal.rows == 0
    assert list(tmp_path.iterdir()) == []  # nothing was answered: nothing is left


def test_a_service_that_is_away_is_named_at_once_and_given_up_when_patience_ends(tmp_path: Path) -> None:
    result = run(texts(tmp_path / "items.jsonl"), "--url", "http://127.0.0.1:1", "--patience", 0.3)

    assert result.exit_code == 1
    said, gave_up = (line for line in result.output.splitlines() if line)
    assert said.startswith("semid: http://127.0.0.1:1 cannot be reached (ConnectError: ")
    assert said.endswith("trying again for up to 0.3 s")
    assert gave_up.startswith("semid: gave up on http://127.0.0.1:1 after ")
    assert [path.name for path in tmp_path.iterdir()] == ["items.jsonl"]

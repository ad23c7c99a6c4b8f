"""The console script: what people type, and what they are told when it goes wrong."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner, Result

from service.cli import app

ROOT = Path(__file__).parents[2]


def run(*words: Any) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def url(service: Any) -> str:
    return str(service.http.base_url)


@pytest.fixture
def catalogue(tmp_path: Path) -> Path:
    titles = [f"stainless kettle number {number}" for number in range(70)]
    path = tmp_path / "items.parquet"
    ids = [f"k{number}" for number in range(70)]
    pq.write_table(pa.table({"item_id": ids, "title": titles, "category": ["Home > Kitchen"] * 70}), path)
    return path


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "csv"])
def test_tokenize_writes_every_item_with_the_id_that_the_service_holds(
    service: Any, url: str, catalogue: Path, namespace: str, tmp_path: Path, ending: str
) -> None:
    out = tmp_path / f"ids.{ending}"

    result = run("tokenize", catalogue, "--url", url, "--namespace", namespace, "--out", out, "--batch-items", 32)

    assert result.exit_code == 0, result.output
    rows = read(out)
    assert [row["item_id"] for row in rows] == [f"k{number}" for number in range(70)]
    assert len({row["semantic_id"] for row in rows}) == 70
    held = service.http.get("/assignment/k7", params={"namespace": namespace}).json()
    assert rows[7]["semantic_id"] == held["semantic_id"]


def test_a_second_run_gives_the_same_ids_and_creates_none(
    url: str, catalogue: Path, namespace: str, tmp_path: Path
) -> None:
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    for out in (first, second):
        run("tokenize", catalogue, "--url", url, "--namespace", namespace, "--out", out, "--batch-items", 64)

    assert [row["semantic_id"] for row in read(first)] == [row["semantic_id"] for row in read(second)]
    assert all(row["created"] for row in read(first))
    assert not any(row["created"] for row in read(second))


def test_rejected_items_stand_in_a_file_with_their_reason_and_the_exit_status_says_so(
    url: str, namespace: str, tmp_path: Path
) -> None:
    items = tmp_path / "items.jsonl"
    rows = [{"item_id": "good", "title": "kettle"}, {"item_id": "bad", "title": "  "}, {"item_id": "bare"}]
    items.write_text("".join(json.dumps(row) + "\n" for row in rows))

    result = run("tokenize", items, "--url", url, "--namespace", namespace)

    assert result.exit_code == 3
    assert "2 items were rejected" in result.output
    assert [row["item_id"] for row in read(tmp_path / "items.ids.parquet")] == ["good"]
    rejected = read(tmp_path / "items.ids.rejected.jsonl")
    assert [(row["row"], row["item_id"]) for row in rejected] == [(2, "bad"), (3, "bare")]
    assert {row["type"] for row in rejected} == {"urn:semid:problem:invalid_text"}


def test_a_dry_run_writes_codes_and_assigns_nothing(
    service: Any, url: str, catalogue: Path, namespace: str, tmp_path: Path
) -> None:
    out = tmp_path / "codes.jsonl"

    result = run(
        "tokenize", catalogue, "--url", url, "--namespace", namespace, "--out", out, "--dry-run", "--batch-items", 64
    )

    assert result.exit_code == 0, result.output
    assert f"70 items with their codes in {out}" in result.output
    assert {len(row["codes"]) for row in read(out)} == {3}
    assert {row["semantic_id"] for row in read(out)} == {None}
    assert service.assigned(namespace) == {}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tokenize", "{dir}/none.csv"], "does not exist"),
        (["tokenize", "{dir}/empty.csv", "--url", "http://127.0.0.1:1"], "item_id"),
        (["tokenize", "{dir}/good.csv", "--out", "{dir}/ids.xls"], "write to one of .parquet, .jsonl, .csv"),
        (["tokenize", "{dir}/good.txt"], ".txt"),
        (["train", "{dir}/good.csv", "--out", "{dir}/new", "--set", "nonsense=1"], "there is no setting 'nonsense'"),
        (
            ["train", "{dir}/good.csv", "--out", "{dir}/new", "--set", "loss.contrastiv=1"],
            "(did you mean loss.contrastive?); known are loss.reconstruction, ",
        ),
        (
            ["train", "{dir}/good.csv", "--out", "{dir}/new", "--family", "pq", "--epochs", "3"],
            "--epochs is for rqvae and r-vq; pq has none",
        ),
        (["train", "{dir}/good.csv", "--out", "{dir}"], "not empty"),
        (["train", "{dir}/good.csv", "--out", "{dir}/new", "--levels", "0"], "greater than or equal to 1"),
        (
            ["train", "{dir}/good.csv", "--out", "{dir}/new", "--set", "codebook_sizes=[1000000000]"],
            "at most 25 levels of at most 65,536",
        ),
        (["train", "{dir}/good.csv", "--out", "{dir}/two words"], "a tokenizer's name has letters"),
        (["train", "{dir}/good.csv", "--out", "{dir}/new", "--text-encoder", "{dir}/nowhere"], "nowhere"),
    ],
)
def test_a_mistake_is_answered_with_words_and_no_traceback(
    tmp_path: Path, words: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty.csv").write_text("sku,title\n1,kettle\n")
    for name in ("good.csv", "good.txt"):
        (tmp_path / name).write_text("item_id,title\n1,kettle\n2,lamp\n")

    result = run(*(word.format(dir=tmp_path) for word in words))

    assert result.exit_code != 0
    assert said in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_a_setting_with_a_slip_in_its_name_is_refused_and_a_variable_unlike_any_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SID_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("SID_PORT_8000_TCP", "tcp://10.0.0.1:8000")
    assert "semid: SID_PORT_8000_TCP is no setting and is passed over" in run("registry", "status").output

    monkeypatch.setenv("SID_KEY_FILE", "keys.json")
    result = run("serve")
    assert result.exit_code == 2
    assert "SID_KEY_FILE is none; is SID_KEYS_FILE meant?" in " ".join(result.output.replace("│", "").split())


@pytest.mark.parametrize(("name", "out"), [("items.jsonl", "items.jsonl"), ("ids.rejected.jsonl", "ids.parquet")])
def test_the_catalogue_is_not_written_over_by_its_own_ids(tmp_path: Path, url: str, name: str, out: str) -> None:
    catalogue = tmp_path / name
    catalogue.write_text('{"item_id": "1", "title": "kettle"}\n')

    result = run("tokenize", catalogue, "--url", url, "--out", tmp_path / out)

    assert result.exit_code == 1
    assert f"{name} would be written over" in result.output
    assert catalogue.read_text() == '{"item_id": "1", "title": "kettle"}\n'


def test_the_tokenizer_that_is_named_is_asked(service: Any, url: str, catalogue: Path, namespace: str) -> None:
    full_name = service.state.tokenizers.current.default.full_name

    words = ("tokenize", catalogue, "--url", url, "--namespace", namespace, "--batch-items", 64, "--tokenizer")
    known, unknown = run(*words, full_name), run(*words, "other")

    assert (known.exit_code, unknown.exit_code) == (0, 1), known.output
    assert "That tokenizer is not loaded" in unknown.output


@pytest.mark.parametrize(
    "words",
    [
        ["export", "{out}"],
        ["recommend", "--catalogue", "{items}", "--interactions", "{items}", "--out", "{out}"],
        ["evaluate", "{items}", "--catalogue", "{items}", "--out", "{out}"],
    ],
)
def test_what_is_there_already_is_not_written_over_unless_asked_to(
    catalogue: Path, tmp_path: Path, words: list[str]
) -> None:
    out = tmp_path / ("record.parquet" if words[0] == "export" else "report")
    kept = out if words[0] == "export" else out / "earlier"
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("earlier")
    words = [word.format(out=out, items=catalogue) for word in words]

    refused, forced = run(*words), run(*words, "--force")

    assert refused.exit_code == forced.exit_code == 1  # the latter for what is wrong otherwise
    said = f"{out} is there already; with --force it is written over"
    assert said in " ".join(refused.stderr.split())
    assert said not in " ".join(forced.stderr.split())
    assert kept.read_text() == "earlier"


def test_the_table_does_not_appear_when_the_service_refuses(tmp_path: Path, url: str) -> None:
    items = tmp_path / "items.jsonl"
    items.write_text('{"item_id": "good", "title": "kettle"}\n')

    result = run("tokenize", items, "--url", url, "--namespace", "no spaces allowed")

    assert result.exit_code == 1
    assert "namespace" in result.output
    assert not (tmp_path / "items.ids.parquet").exists()


def read(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
        return rows
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".csv":
        return [{**row, "created": row["created"] == "True"} for row in csv.DictReader(text.splitlines())]
    return [json.loads(line) for line in text.splitlines()]


def test_evaluate_writes_a_page_and_figures_of_a_catalogue_of_texts(catalogue: Path, tmp_path: Path) -> None:
    shipped = Path(__file__).parents[2] / "models" / "checkpoints" / "tiger-beauty"

    result = run(
        "evaluate", shipped, "--catalogue", catalogue, "--out", tmp_path / "report", "--paraphrased", 3, "--all-unseen"
    )

    assert result.exit_code == 0, result.output
    assert "Tokenizers side by side" in (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    (found,) = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))["results"]
    assert found["unseen_items"] == found["items"] == 70
    assert found["on_unseen"]["stability"]["upper case"] == {"items": 3, "by_depth": [1.0, 1.0, 1.0]}
    assert found["on_unseen"]["stability"]["boilerplate"]["items"] == 3


def test_evaluate_leaves_stability_out_where_no_drawn_item_has_a_text(tmp_path: Path) -> None:
    shipped = Path(__file__).parents[2] / "models" / "checkpoints" / "tiger-beauty"
    path = tmp_path / "items.parquet"
    pq.write_table(pa.table({"item_id": ["a", "b", "c"], "title": ["lipstick", "", ""]}), path)

    # By lot of this seed the third item is paraphrased.
    result = run("evaluate", shipped, "--catalogue", path, "--out", tmp_path / "report", "--paraphrased", 1)

    assert result.exit_code == 0, result.output
    (found,) = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))["results"]
    assert found["items"] == 1
    assert found["on_all"]["stability"] == {}


def test_evaluate_says_that_it_cannot_write_before_it_measures(catalogue: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = run("evaluate", tmp_path / "file", "--catalogue", catalogue, "--out", tmp_path / "file" / "report")
    assert result.exit_code == 1
    assert "Not a directory" in result.output


def test_evaluate_says_what_is_wrong_with_a_file(catalogue: Path, tmp_path: Path) -> None:
    index = tmp_path / "index.json"
    index.write_text('{"stranger": ["<a_1>"]}')
    result = run("evaluate", index, "--catalogue", catalogue, "--out", tmp_path / "report")
    assert result.exit_code == 1
    assert "names no item of the catalogue" in result.output
    assert not (tmp_path / "report").exists()


def test_an_interrupted_training_says_where_it_goes_on_from(tmp_path: Path) -> None:
    # given a training that has kept a state
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).standard_normal((200, 8), dtype=np.float32))
    settings = ["--levels", "2", "--codebook-size", "8", "--latent", "2", "--hidden", "", "--epochs", "100000"]
    # A shell's background jobs ignore the signal, and so would what they start.
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    command = [sys.executable, "-c", heard + "from service.cli import app; app()", "train", "rows.npy", "--out", "new"]
    state = tmp_path / ".new-training"
    with subprocess.Popen(
        [*command, *settings, "--set", "patience=100000", "--keep-every-s", "0"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        while not list(state.glob("*.safetensors")):
            assert child.poll() is None
            time.sleep(0.05)
        # when
        child.send_signal(signal.SIGINT)
        _, said = child.communicate(timeout=60)
    # then
    assert child.returncode == 130
    assert said.strip() == f"semid: interrupted; the same command goes on from {state}"

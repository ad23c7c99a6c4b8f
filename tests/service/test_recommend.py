"""`semid recommend`: IDs of a checkpoint, of a running service and of an exported record, measured side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner, Result

from models.tiger import Tiger
from service.cli import app
from service.cli.sources import CatalogueFile, of_service
from service.follower import Follower

ITEMS = 30
TINY = [
    "--set", "shape.width=16", "--set", "shape.encoder_layers=1", "--set", "shape.decoder_layers=1",
    "--set", "shape.hidden=32", "--set", "training.measurements=1", "--set", "beams=10",
]  # fmt: skip


def run(*words: Any) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def url(service: Any) -> str:
    return str(service.http.base_url)


@pytest.fixture
def catalogue(tmp_path: Path) -> Path:
    path = tmp_path / "items.parquet"
    titles = [f"{what} number {number}" for number in range(ITEMS // 3) for what in ("kettle", "sofa", "lipstick")]
    pq.write_table(pa.table({"item_id": [f"i{row}" for row in range(ITEMS)], "title": titles}), path)
    return path


@pytest.fixture
def interactions(tmp_path: Path) -> Path:
    path = tmp_path / "users.parquet"
    walks = [[f"i{(start + place) % ITEMS}" for place in range(3 + start % 4)] for start in range(ITEMS)]
    pq.write_table(pa.table({"user_id": [*range(ITEMS)], "item_ids": [*walks[1:], ["i0", "i1", "gone"]]}), path)
    return path


@pytest.fixture
def given(catalogue: Path, interactions: Path) -> list[Any]:
    return ["--catalogue", catalogue, "--interactions", interactions, "--steps", 3, *TINY]


def test_a_checkpoint_a_service_and_a_record_of_one_tokenizer_come_to_the_same(
    service: Any,
    checkpoint: Path,
    url: str,
    namespace: str,
    given: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, record = tmp_path / "out", tmp_path / "record.parquet"
    run("tokenize", given[1], "--url", url, "--namespace", namespace, "--batch-items", 10, "--in-flight", 1)
    monkeypatch.setenv("SID_REDIS_URL", service.redis_url)
    monkeypatch.setenv("SID_CHECKPOINT", str(checkpoint))
    exported = run("export", record, "--namespace", namespace)
    assert exported.exit_code == 0, exported.output

    result = run(
        "recommend", checkpoint, *given, "--out", out, "--url", url, "--namespace", namespace, "--record", record
    )

    assert result.exit_code == 0, result.output
    assert "1 interactions with items that are not in items.parquet are left out" in result.output
    report = json.loads((out / "recommend.json").read_text())
    of_checkpoint, of_record, of_url = report["tokenizers"]
    assert of_checkpoint["name"] == service.http.get("/tokenizers").json()["default"]
    assert of_record["name"] == of_checkpoint["name"] + " (2)"
    assert of_url["name"] == f"default tokenizer of {url}, namespace {namespace}"
    for each in (of_record, of_url):
        assert each["test"] == of_checkpoint["test"]
        assert each["invalid"] == 0
    assert of_checkpoint["test"]["users"] == ITEMS - 1
    assert set(report["baselines"]) == {"popularity", "most frequent next", "item-kNN"}
    assert [row.split("|")[1].strip() for row in result.output.splitlines() if "@" in row and "small" in row]
    assert Tiger.load(out / of_checkpoint["name"]).config.codebook_sizes == (16, 16, 16)


def test_the_trie_of_a_service_is_that_of_now(service: Any, url: str, namespace: str, catalogue: Path) -> None:
    follower = Follower(url, namespace=namespace)
    identified = of_service(url, namespace, None, CatalogueFile(catalogue), follower)
    held = service.http.get("/assignment/i7", params={"namespace": namespace}).json()
    assert identified.semantic_ids[7].tolist() == [*held["codes"], held["suffix"]]
    assert identified.trie().holds(identified.semantic_ids).all()

    service.http.delete("/assignment/i7", params={"namespace": namespace})

    live = identified.trie().holds(identified.semantic_ids)
    assert (~live).nonzero().flatten().tolist() == [7]
    follower.stop()


def test_a_catalogue_of_embeddings_is_measured_too(
    make_checkpoint: Any, make_embedding: Any, given: list[Any], catalogue: Path, tmp_path: Path
) -> None:
    vectors = pa.array([make_embedding(row) for row in range(ITEMS)], pa.list_(pa.float32(), 384))
    pq.write_table(pa.table({"item_id": [f"i{row}" for row in range(ITEMS)], "embedding": vectors}), catalogue)
    tokenizer = make_checkpoint("vectors", 8, 8, takes_text=False)

    result = run("recommend", tokenizer, *given, "--out", tmp_path / "out", "--cold", 0.2, "--users", 20)

    assert result.exit_code == 0, result.output
    measured = json.loads((tmp_path / "out" / "recommend.json").read_text())["tokenizers"][0]
    assert measured["test"]["users"] == 20
    assert measured["cold"]["items"] == 6
    assert measured["cold"]["by_content"]["users"] == measured["cold"]["plain"]["users"]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "name a checkpoint, a service"),
        (["--setting", "huge"], "known are small, paper"),
        (["--device", "tpu"], "the device 'tpu' is none of auto"),
        (["--set", "shape.depth=3"], "there is no setting 'shape.depth'"),
        (["--url", "http://127.0.0.1:9", "--set", "beams=0.5"], "beams is of type int"),
        (["--set", "beams=5"], "beams has to be at least 10"),
    ],
)
def test_what_cannot_be_run_is_said(given: list[Any], tmp_path: Path, words: list[str], reason: str) -> None:
    result = run("recommend", *given, "--out", tmp_path / "out", *words)

    assert result.exit_code == 1
    assert reason in result.output


def test_what_is_wrong_with_a_later_tokenizer_or_the_report_is_said_before_anything_is_trained(
    checkpoint: Path, given: list[Any], tmp_path: Path
) -> None:
    out, file = tmp_path / "out", tmp_path / "file"
    (tmp_path / "empty").mkdir()
    file.touch()

    later = run("recommend", checkpoint, tmp_path / "empty", *given, "--out", out)
    within = run("recommend", checkpoint, *given, "--out", file / "out")

    assert later.exit_code == within.exit_code == 1
    assert "no checkpoint" in later.output
    assert not list(out.glob("*"))
    assert "Not a directory" in within.output


def test_tokenizers_of_one_name_are_told_apart(checkpoint: Path, given: list[Any], tmp_path: Path) -> None:
    result = run("recommend", checkpoint, checkpoint, *given, "--out", tmp_path / "out")

    assert result.exit_code == 0, result.output
    measured = json.loads((tmp_path / "out" / "recommend.json").read_text())["tokenizers"]
    assert measured[1]["name"] == measured[0]["name"] + " (2)"
    assert len(list((tmp_path / "out").glob("*/generator.json"))) == 2


def test_a_record_without_an_item_of_the_catalogue_is_refused(
    service: Any, checkpoint: Path, namespace: str, given: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.tokenize({"item_id": "i0", "text": "kettle"}, namespace=namespace)
    monkeypatch.setenv("SID_REDIS_URL", service.redis_url)
    monkeypatch.setenv("SID_CHECKPOINT", str(checkpoint))
    run("export", tmp_path / "record.parquet", "--namespace", namespace)

    result = run("recommend", *given, "--out", tmp_path / "out", "--record", tmp_path / "record.parquet")

    assert result.exit_code == 1
    assert "29 items of the catalogue have no live ID" in result.output
    assert not (tmp_path / "out" / "recommend.json").exists()

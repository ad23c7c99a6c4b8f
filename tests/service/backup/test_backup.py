"""`semid export` and `semid import` as people type them, on the registry of a running service."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner, Result

from models import DEFAULT_CHECKPOINT, read_manifest
from service.backup.record_table import Description
from service.cli import app
from tests.valkey import Valkey

MakeEmbedding = Callable[[int], list[float]]


@pytest.fixture
def semid(service: Any, checkpoint: Path) -> Callable[..., Result]:
    """The console script with the settings of the running service."""

    def run(*words: Any, **settings: Any) -> Result:
        environment = {"SID_DATA_DIR": str(service.settings.data_dir), "SID_CHECKPOINT": str(checkpoint)}
        environment |= {f"SID_{name.upper()}": str(value) for name, value in settings.items()}
        return CliRunner().invoke(app, [str(word) for word in words], env=environment)

    return run


@pytest.fixture
def items(service: Any, namespace: str, make_embedding: MakeEmbedding) -> dict[str, dict[str, Any]]:
    """Sixty items of the running service, one of them retired; by item id, as it answered."""
    entries = [{"item_id": f"item {n}", "embedding": make_embedding(n)} for n in range(60)]
    answers = service.tokenize(*entries, namespace=namespace)
    service.http.delete("/assignment/item 7", params={"namespace": namespace})
    return {answer["item_id"]: answer for answer in answers}


def test_a_running_service_is_exported(
    semid: Callable[..., Result], items: dict[str, Any], namespace: str, tmp_path: Path, checkpoint: Path
) -> None:
    path = tmp_path / "record.parquet"

    result = semid("export", path, "--namespace", namespace)

    assert result.exit_code == 0, result.output
    rows = {row["item_id"]: row for row in pq.read_table(path).to_pylist()}
    assert {name: row["semantic_id"] for name, row in rows.items()} == {
        name: answer["semantic_id"] for name, answer in items.items()
    }
    assert [name for name, row in rows.items() if row["state"] == "retired"] == ["item 7"]
    tokenizer = read_manifest(checkpoint).full_name
    assert {(row["tokenizer"], row["namespace"]) for row in rows.values()} == {(tokenizer, namespace)}
    assert Description.of(path).revision == 61
    assert f"under {tokenizer} at revision 61" in result.output
    assert [file.name for file in tmp_path.iterdir()] == ["record.parquet"]


def test_a_generator_gets_the_live_items_and_the_sizes_of_its_levels(
    semid: Callable[..., Result], items: dict[str, Any], namespace: str, tmp_path: Path
) -> None:
    index, lines = tmp_path / "items.index.json", tmp_path / "items.jsonl"

    semid("export", index, "--namespace", namespace, "--format", "index-json")
    result = semid("export", lines, "--namespace", namespace, "--format", "jsonl", "--token-base", 1000)

    live = {name: answer for name, answer in items.items() if name != "item 7"}
    assert json.loads(index.read_text()) == {name: answer["tokens"] for name, answer in live.items()}
    numbers = {entry["item_id"]: entry["token_ids"] for entry in map(json.loads, lines.read_text().splitlines())}
    offsets = (1000, 1016, 1032, 1048)
    assert numbers == {
        name: [offset + number for offset, number in zip(offsets, (*answer["codes"], answer["suffix"]), strict=True)]
        for name, answer in live.items()
    }
    suffixes = 1 + max(answer["suffix"] for answer in live.values())
    assert f"tokens by level, the suffixes last: 16, 16, 16, {suffixes}" in result.output


def test_an_export_moves_into_another_namespace_while_the_service_runs(
    service: Any, semid: Callable[..., Result], items: dict[str, Any], namespace: str, tmp_path: Path
) -> None:
    path, other = tmp_path / "record.parquet", f"{namespace}-2"
    semid("export", path, "--namespace", namespace)

    result = semid("import", path, "--namespace", other)
    again = semid("import", path, "--namespace", other)

    assert (result.exit_code, again.exit_code) == (0, 0), result.output
    assert "60 IDs restored, 0 were there already" in result.output
    assert "0 IDs restored, 60 were there already" in again.output
    for item_id, answer in items.items():
        here, there = (
            service.http.get(f"/item/{answer['semantic_id']}", params={"namespace": name})
            for name in (namespace, other)
        )
        assert here.status_code == there.status_code == (410 if item_id == "item 7" else 200)
        of_this_call = {"namespace": namespace, "request_id": ""}
        assert there.json() | of_this_call == here.json() | of_this_call
    pages = [service.http.get("/prefix/", params={"namespace": name}).json() for name in (namespace, other)]
    assert pages[0]["items"] == pages[1]["items"]
    assert [file.name for file in tmp_path.iterdir()] == ["record.parquet"]


def test_refused_rows_stand_in_a_file_with_their_reason_and_the_exit_status_says_so(
    service: Any,
    semid: Callable[..., Result],
    items: dict[str, Any],
    namespace: str,
    tmp_path: Path,
    make_embedding: MakeEmbedding,
) -> None:
    path, other = tmp_path / "record.parquet", f"{namespace}-2"
    semid("export", path, "--namespace", namespace)
    service.tokenize({"item_id": "squatter", "embedding": make_embedding(0)}, namespace=other)

    result = semid("import", path, "--namespace", other)

    refused = tmp_path / "record.refused.jsonl"
    assert result.exit_code == 1
    assert f"1 rows were refused; the reasons are in {refused}" in result.output
    taken = items["item 0"]["semantic_id"]
    assert [json.loads(line) for line in refused.read_text().splitlines()] == [
        {
            "item_id": "item 0",
            "semantic_id": taken,
            "state": "live",
            "reason": f"{taken} is held by the item 'squatter'",
        }
    ]


def test_a_table_of_another_tokenizer_is_refused_as_a_whole(
    service: Any, semid: Callable[..., Result], items: dict[str, Any], namespace: str, tmp_path: Path
) -> None:
    path = tmp_path / "record.parquet"
    semid("export", path, "--namespace", namespace)

    result = semid("import", path, "--namespace", f"{namespace}-2", "--checkpoint", DEFAULT_CHECKPOINT)

    assert result.exit_code == 1
    assert "an ID of one names nothing under the other. Nothing was imported." in result.output
    assert service.assigned(f"{namespace}-2") == {}


def test_nothing_is_imported_into_a_registry_that_is_older_than_its_services(
    start_service: Callable[..., Any],
    checkpoint: Path,
    valkey_process: Valkey,
    data_dir: Path,
    make_embedding: MakeEmbedding,
    tmp_path: Path,
) -> None:
    service = start_service(redis_url=valkey_process.url, data_dir=data_dir)
    service.tokenize({"item_id": "a", "embedding": make_embedding(0)})
    service.stop()
    environment = {
        "SID_DATA_DIR": str(data_dir),
        "SID_REDIS_URL": valkey_process.url,
        "SID_CHECKPOINT": str(checkpoint),
    }
    words = [str(tmp_path / "record.parquet")]
    exported = CliRunner().invoke(app, ["export", *words], env=environment)
    with valkey_process.client() as client:
        client.flushall()

    refused = CliRunner().invoke(app, ["import", *words], env=environment)
    CliRunner().invoke(app, ["registry", "accept", "--yes"], env=environment)
    imported = CliRunner().invoke(app, ["import", *words], env=environment)

    assert exported.exit_code == 0, exported.output
    assert refused.exit_code == 1
    assert "was at revision 1" in refused.output
    assert "1 IDs restored" in imported.output, imported.output


@pytest.mark.parametrize(
    ("words", "settings", "said"),
    [
        (["export", "{dir}/x.parquet"], {"data_dir": "{dir}/none"}, "There is no registry in"),
        (["export", "{dir}/x.parquet", "--namespace", "nobody"], {}, "nothing was ever assigned in namespace 'nobody'"),
        (["export", "{dir}/x.parquet", "--namespace", "{{}}"], {}, "is no namespace: 1 to 64"),
        (["export", "{dir}/x.json"], {}, "a name that ends in .parquet is for the format parquet"),
        (["export", "{dir}/x.parquet", "--format", "jsonl"], {}, "a name that ends in .parquet is for the format"),
        (["export", "{dir}/x.parquet", "--checkpoint", "{dir}"], {}, "manifest.json is missing"),
        (["export", "{dir}/none/x.parquet"], {}, "No such file or directory"),
        (["export", "{dir}/x.parquet"], {"redis_url": "unix://{dir}/none"}, "cannot be reached"),
        (["export", "{dir}/x.parquet"], {"port": "http"}, "SID_* settings"),
        (["export", "{dir}/x.parquet", "--tokenizer", "big"], {}, "0 tokenizers of the settings are named 'big'"),
        (["import", "{dir}/x.parquet"], {}, "does not exist"),
        (["import", __file__], {}, "is not a table that semid export wrote"),
    ],
)
def test_a_mistake_is_answered_with_words_and_leaves_nothing_behind(
    semid: Callable[..., Result], tmp_path: Path, words: list[str], settings: dict[str, str], said: str
) -> None:
    settings = {name: value.format(dir=tmp_path) for name, value in settings.items()}

    result = semid(*(word.format(dir=tmp_path) for word in words), registry_wait_s=0, **settings)

    assert result.exit_code != 0
    assert said in " ".join(result.output.split())
    assert "Traceback" not in result.output
    assert not any(tmp_path.iterdir())

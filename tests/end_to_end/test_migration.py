"""A catalogue of texts from one of the checkpoints that ship to the other, by the commands of docs/migration.md."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from models import DEFAULT_CHECKPOINT, read_manifest
from service.cli import app

KINDS = ("kettle", "teapot", "walking boot", "rain jacket", "hair dryer", "night cream", "desk lamp", "garden hose")
FIELDS = {f"t{number}": {"title": f"{kind} {number // 8}", "brand": "Acme"} for number, kind in enumerate(KINDS * 4)}


def run(service: Any, *words: str) -> Result:
    return CliRunner().invoke(app, [*words, "--url", str(service.http.base_url)])


@pytest.fixture
def names(running: Any) -> Iterator[tuple[str, str]]:
    """Of the default tokenizer and of the other one that ships, which is loaded beside it."""
    other = DEFAULT_CHECKPOINT.parent / "tiger-beauty"
    old, new = (read_manifest(directory).full_name for directory in (DEFAULT_CHECKPOINT, other))
    assert run(running, "tokenizers", "load", str(other)).exit_code == 0
    yield old, new
    assert run(running, "tokenizers", "default", old).exit_code == 0
    assert run(running, "tokenizers", "unload", new).exit_code == 0


def test_a_catalogue_of_texts_goes_to_the_other_tokenizer_that_ships(
    running: Any, names: tuple[str, str], namespace: str, tmp_path: Path
) -> None:
    def tokenize(item_ids: list[str], **members: Any) -> list[dict[str, Any]]:
        items = [{"item_id": item_id, "fields": FIELDS[item_id]} for item_id in item_ids]
        answer = running.http.post("/tokenize", json={"items": items, "namespace": namespace, **members}).json()
        return list(answer["items"])

    before = tokenize([*FIELDS])
    catalogue, out = tmp_path / "items.jsonl", tmp_path / "out"
    rows = [{"item_id": "wordless", "title": ""}, *({"item_id": name, **fields} for name, fields in FIELDS.items())]
    catalogue.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")

    words = ["migrate", *names, "--items", str(catalogue), "--out", str(out), "--namespace", namespace, "--switch"]
    done = run(running, *words)

    assert done.exit_code == 3, done.output  # one was rejected
    assert json.loads((out / "ids.rejected.jsonl").read_text())["item_id"] == "wordless"
    assert (out / "missing.jsonl").read_text() == ""
    after = tokenize([*FIELDS])  # under the new default
    alone = [tokenize([item_id], tokenizer=names[1], assign=False)[0] for item_id in FIELDS]
    assert not any(entry["created"] for entry in after)
    assert [entry["codes"] for entry in after] == [entry["codes"] for entry in alone]
    assert {len(entry["codes"]) for entry in before} == {6}
    assert {len(entry["codes"]) for entry in after} == {3}
    levels = json.loads((out / "report.json").read_text())["levels"]
    assert levels[0]["together"] > levels[0]["pairs_by_chance"]
    params = {"tokenizer": names[0], "namespace": namespace}
    for was, now in zip(before, after, strict=True):
        found = running.http.get(f"/item/{was['semantic_id']}", params=params).json()
        assert (found["item_id"], found["counterparts"]) == (was["item_id"], {names[1]: now["semantic_id"]})

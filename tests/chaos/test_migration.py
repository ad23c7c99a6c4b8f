"""A migration under load: no request fails, and every promise is kept in both records.

Some seconds of it; `SID_MIGRATION_REQUESTS` says how many requests each stretch of it lasts.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from models import read_manifest
from service.cli import app
from tests.chaos.checker import check
from tests.chaos.migration import Traffic, filled, kill_once, observe, write_catalogue
from tests.chaos.tokenizer import embeddings, write_checkpoint

REQUESTS = int(os.environ.get("SID_MIGRATION_REQUESTS", "75"))  # read before the tests' settings are cleared
FIRST_NEW, NEW_ITEMS = 100_000, 60
"""How many items the catalogue's file has that no caller has brought yet."""


@pytest.fixture
def checkpoints(tmp_path: Path) -> list[Path]:
    return [write_checkpoint(tmp_path / name, name, seed) for seed, name in enumerate(("winter", "spring"))]


@pytest.fixture
def service(start_service: Callable[..., Any], checkpoints: list[Path], data_dir: Path) -> Iterator[Any]:
    old, new = checkpoints
    running = start_service(checkpoint=old, further_checkpoints=(new,), data_dir=data_dir, changes_kept=1_000_000)
    yield running
    running.stop()


def test_a_migration_under_load_fails_no_request_and_keeps_every_promise_in_both_records(
    service: Any, checkpoints: list[Path], tmp_path: Path
) -> None:
    old, new = (read_manifest(checkpoint).full_name for checkpoint in checkpoints)
    contents, port = embeddings(), service.address[1]
    seed = secrets.randbits(32)
    traffic = Traffic(port, (old, new), contents, seed)
    catalogue, out = tmp_path / "items.parquet", tmp_path / "out"
    words = ["migrate", old, new, "--url", str(service.http.base_url), "--items", f"{catalogue}", "--out", f"{out}"]

    def migrate(*more: str) -> None:
        done = CliRunner().invoke(app, [*words, *more])
        assert done.exit_code in {0, 3}, done.output

    def killed_and_begun_again() -> None:
        command = [sys.executable, "-c", "from service.cli import app; app()", *words]
        command += ["--batch-items", "1", "--in-flight", "1"]
        asked = {"url": f"/assignment/{FIRST_NEW}-0", "params": {"tokenizer": new}}
        kill_once(command, tmp_path / "killed.log", lambda: service.http.get(**asked).is_success)
        migrate()

    traffic.start()
    try:
        traffic.go_on(REQUESTS)
        items = sorted(traffic.items() | {f"{FIRST_NEW + number}-0" for number in range(NEW_ITEMS)})
        write_catalogue(catalogue, items, contents)
        filled(traffic, (old, new), items, out, killed_and_begun_again)
        traffic.go_on(REQUESTS // 2)
        items = sorted(traffic.items())
        write_catalogue(catalogue, items, contents)
        late = ("--switch", "--missing-at-most", "100000")  # callers bring new items all the time
        filled(traffic, (old, new), items, out, lambda: migrate(*late))
        at_the_switch = json.loads((out / "report.json").read_text())
        for default in (new, old, new):
            before = traffic.defaults[default]
            assert CliRunner().invoke(app, ["tokenizers", "default", default, *words[3:5]]).exit_code == 0
            traffic.go_on(REQUESTS // 3)
            assert traffic.defaults[default] > before
    finally:
        traffic.stop()

    assert traffic.failures == [], seed
    assert at_the_switch["switch"]["default"] == new
    assert at_the_switch["items"]["both"] > REQUESTS / 2
    for name in (old, new):
        operations, final, codes = observe(traffic, name, port, tmp_path / "histories" / name, contents)
        violations = check(operations, final, codes)
        assert violations == [], (seed, name, list(map(str, violations))[:5])
    by_callers = [operation for operation in operations if operation.client != "migrate"]
    assert any(found.promise == "unexplained" for found in check(by_callers, final, codes))  # it does look
    held = service.http.get("/prefix/", params={"tokenizer": old, "limit": 200}).json()["items"]
    for holder in held[:20]:
        found = service.http.get(f"/item/{holder['semantic_id']}", params={"tokenizer": old}).json()["counterparts"]
        there = service.http.get(f"/assignment/{holder['item_id']}", params={"tokenizer": new})
        assert found == {new: there.json()["semantic_id"] if there.status_code == 200 else None}

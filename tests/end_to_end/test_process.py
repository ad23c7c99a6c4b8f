"""The process: it starts or says why not, ends in order, and comes back from `kill -9` with everything it said."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.topologies import wait_until

ROOT = Path(__file__).parents[2]


def registry_server(service: Any) -> psutil.Process:
    """The embedded registry's process."""
    (server,) = (child for child in psutil.Process(service.pid).children() if "valkey" in child.name())
    return server


def test_a_killed_service_comes_back_with_everything_it_acknowledged(start_process: Callable[..., Any]) -> None:
    items = [{"item_id": f"{i}", "text": f"kettle {i % 10}"} for i in range(100)]
    service = start_process().wait_until_ready()
    registry = registry_server(service)
    first = service.http.post("/tokenize", json={"items": items}).json()["items"]

    service.kill()
    service = start_process().wait_until_ready()
    again = service.http.post("/tokenize", json={"items": items}).json()["items"]
    found = service.http.post("/lookup", json={"semantic_ids": [entry["semantic_id"] for entry in first]}).json()[
        "items"
    ]

    assert all(entry["created"] for entry in first)
    assert [entry["semantic_id"] for entry in again] == [entry["semantic_id"] for entry in first]
    assert not any(entry["created"] for entry in again)
    assert [entry["item_id"] for entry in found] == [item["item_id"] for item in items]
    assert service.metric("semid_batch_rows_sum") == 1  # the one that warms the model
    assert not registry.is_running() or registry.pid == registry_server(service).pid


def test_sigterm_finishes_the_requests_under_way_and_ends_with_0(start_process: Callable[..., Any]) -> None:
    service = start_process(batch_tokens=60, drain_s=120).wait_until_ready()
    registry = registry_server(service)
    items = [{"item_id": f"{i}", "text": f"{i} " + "kettle " * 50} for i in range(32)]
    answers: list[httpx.Response] = []
    caller = threading.Thread(target=lambda: answers.append(service.http.post("/tokenize", json={"items": items})))
    caller.start()
    while service.metric("semid_batch_rows_count") < 2:
        time.sleep(0.01)
    under_way = not answers

    service.terminate()
    code = service.wait(150)
    caller.join()

    assert under_way, "the request ended before the signal: it shows nothing"
    assert code == 0, service.log
    assert answers[0].status_code == 200
    assert all(entry["created"] for entry in answers[0].json()["items"])
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{service.http.base_url}/healthz")
    psutil.wait_procs([registry], timeout=10)
    assert not registry.is_running()
    assert "Traceback" not in service.log


def test_a_service_of_one_worker_survives_sighup_and_says_that_nothing_is_renewed(running: Any) -> None:
    os.kill(running.pid, signal.SIGHUP)

    wait_until(lambda: "SIGHUP: nothing is renewed" in running.log, "the log says nothing")
    assert running.http.get("/healthz").status_code == 200


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"SID_PORT": "http"}, "port"),
        ({"SID_DEVICE": "tpu"}, "device"),
        ({"SID_CHECKPOINT": "/nowhere"}, "there is no checkpoint at /nowhere"),
        ({"SID_REDIS_URL": "http://127.0.0.1:1"}, "SID_REDIS_URL"),
    ],
)
def test_a_service_that_cannot_start_says_why_in_few_words(
    data_dir: Path, settings: dict[str, str], reason: str
) -> None:
    environment = {**os.environ, "SID_DATA_DIR": str(data_dir), "SID_PORT": "0", "NO_COLOR": "1", **settings}
    command = [sys.executable, "-c", "from service.cli import app; app()", "serve"]

    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180, check=False)

    output = ended.stdout + ended.stderr
    assert ended.returncode not in {0, None}
    assert reason in output.replace("\n", " ")
    assert "Traceback" not in output

"""The chaos run itself: a minute of it keeps every promise, and it does find what a weaker registry loses.

`SID_CHAOS_S` makes it longer, `make chaos` much longer.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos.schedule import KILL_PRIMARY

ROOT = Path(__file__).parents[2]
SECONDS = os.environ.get("SID_CHAOS_S")  # read before the tests' settings are cleared
SEED = secrets.randbits(32)


def chaos(*options: str, timeout_s: float) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.chaos", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False)


@pytest.mark.parametrize(("topology", "seconds"), [("single", "25"), ("cluster", "20")])
def test_every_promise_is_kept_through_kills_and_cut_connections(
    topology: str, seconds: str, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = SECONDS or seconds

    run = chaos("--topology", topology, "--seconds", seconds, "--seed", f"{SEED}", timeout_s=float(seconds) * 2 + 300)

    with capsys.disabled():
        print(f"\n{run.stdout}")
    assert run.returncode == 0, run.stdout + run.stderr[-4000:]


def test_a_registry_that_forgets_when_it_is_killed_is_found_out(tmp_path: Path) -> None:
    options = ["--durability", "memory", "--server-option", "appendonly=no", "--fault", KILL_PRIMARY, "--accept"]

    run = chaos("--seconds", "5", "--seed", "1", "--directory", f"{tmp_path / 'run'}", *options, timeout_s=300)

    assert run.returncode == 1, run.stdout + run.stderr[-4000:]
    assert run.stdout.startswith("seed 1: ")
    assert "VIOLATION lost: " in run.stdout
    assert f"histories and logs are in {tmp_path / 'run'}" in run.stdout
    assert (tmp_path / "run" / "history" / "client-0.jsonl").is_file()

"""By Ray the table is that of the local engine."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.service.backfill.catalogues import matrix_of, rejected_of, run, table_of, write_embeddings

COMMAND = [sys.executable, "-c", "from service.cli import app; app()", "backfill"]

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: semid[bulk]")


@needs_ray
@pytest.mark.usefixtures("settings")
def test_two_actors_of_ray_make_the_table_that_one_process_makes(
    tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = matrix_of(600)
    matrix[100] = 0.0
    catalogue = write_embeddings(tmp_path / "items.parquet", matrix)
    run(catalogue, "--out", tmp_path / "local", "--workers", 1)
    monkeypatch.setenv("SID_DATA_DIR", str(data_dir / "ray"))
    words = [catalogue, "--out", tmp_path / "ray", "--engine", "ray", "--workers", 2, "--block-rows", 150]

    ended = subprocess.run(
        [*COMMAND, *map(str, words)], capture_output=True, timeout=300, check=False, cwd=Path.cwd(), env=os.environ
    )

    assert ended.returncode == 3, ended.stderr.decode()
    assert len(list((tmp_path / "ray").glob("part-*"))) == 4
    assert table_of(tmp_path / "ray").equals(table_of(tmp_path / "local"))
    assert rejected_of(tmp_path / "ray") == rejected_of(tmp_path / "local")


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")
@pytest.mark.usefixtures("settings")
def test_without_ray_the_command_says_what_to_install(tmp_path: Path) -> None:
    catalogue = write_embeddings(tmp_path / "items.parquet", matrix_of(20))
    result = run(catalogue, "--out", tmp_path / "out", "--engine", "ray")
    assert result.exit_code == 1
    assert "install semid[bulk], or use --engine local" in result.output

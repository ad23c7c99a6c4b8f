"""Catalogues to backfill, and what a backfill made of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from typer.testing import CliRunner, Result

from service.cli import app

DIMENSION = 8
ROWS_PER_RUN = 128

# A backfill that is killed as it is about to write its n-th file of codes, or of claims.
KILLED = """
import os, signal, sys
from service.backfill import claims, code_files, sorting
from service.cli import app

def killed_before(module, number):
    write = module.write_arrow
    def count_and_write(path, table):
        nonlocal number
        number -= 1
        if number == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        write(path, table)
    module.write_arrow = count_and_write

sorting.ROWS_PER_RUN = int(sys.argv.pop(1))
killed_before({"codes": code_files, "claims": claims}[sys.argv.pop(1)], int(sys.argv.pop(1)))
app()
"""


def matrix_of(rows: int, seed: int = 5) -> NDArray[np.float32]:
    """Embeddings that are not far from each other, so that many have equal codes."""
    return (np.random.default_rng(seed).standard_normal((rows, DIMENSION)) + 0.3).astype(np.float32)


def write_embeddings(path: Path, matrix: NDArray[Any], *, first: int = 0, **columns: Any) -> Path:
    """A file of embeddings in several row groups."""
    ids = [f"i{first + row}" for row in range(len(matrix))]
    table = pa.table({"item_id": ids, "embedding": pa.array(list(matrix), pa.list_(pa.float32())), **columns})
    pq.write_table(table, path, row_group_size=max(1, len(matrix) // 3))
    return path


def run(*words: Any) -> Result:
    """`semid backfill` in this process."""
    return CliRunner().invoke(app, ["backfill", *map(str, words)])


def run_until_killed(kind: str, number: int, *words: Any) -> None:
    command = [sys.executable, "-c", KILLED, str(ROWS_PER_RUN), kind, str(number), "backfill", *map(str, words)]
    ended = subprocess.run(command, capture_output=True, timeout=120, check=False, env=os.environ)
    assert ended.returncode == -9, ended.stderr.decode()


def table_of(out: Path) -> pa.Table:
    """All parts, in order."""
    return pa.concat_tables([pq.read_table(path) for path in sorted(out.glob("part-*.parquet"))])


def rejected_of(out: Path) -> list[dict[str, Any]]:
    """What was rejected."""
    path = out / "rejected.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def suffixes_by_codes(table: pa.Table, by: dict[str, Any]) -> dict[tuple[int, ...], list[Any]]:
    """For each codes what the items have by which they are told apart, in the order of their suffixes."""
    groups: dict[tuple[int, ...], list[Any]] = {}
    for row in sorted(table.to_pylist(), key=lambda row: row["suffix"]):
        groups.setdefault(tuple(row["codes"]), []).append(by[row["item_id"]])
    return groups


def interrupted(*_: Any) -> None:
    raise KeyboardInterrupt

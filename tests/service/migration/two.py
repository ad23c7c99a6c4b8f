"""A service with two tokenizers, and `semid migrate` from one to the other."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from typer.testing import CliRunner, Result

from service.cli import app
from tests.conftest import DIMENSION

ITEMS = 60
CONTENTS = np.random.default_rng(11).standard_normal((ITEMS, DIMENSION)).astype(np.float32)


@dataclass
class Two:
    """A service with two tokenizers, and their full names; the old one is the default."""

    service: Any
    old: str
    new: str

    @property
    def default(self) -> str:
        """The default tokenizer."""
        return str(self.service.http.get("/tokenizers").json()["default"])

    def tokenize(self, rows: range, tokenizer: str | None, namespace: str) -> list[dict[str, Any]]:
        items = [{"item_id": f"i{row}", "embedding": CONTENTS[row].tolist()} for row in rows]
        found: list[dict[str, Any]] = self.service.tokenize(*items, namespace=namespace, tokenizer=tokenizer)
        return found

    def assignment(self, row: int, tokenizer: str, namespace: str) -> Any:
        return self.service.http.get(f"/assignment/i{row}", params={"tokenizer": tokenizer, "namespace": namespace})

    def migrate(self, directory: Path, files: list[Path], namespace: str, *more: str) -> Result:
        words = ["migrate", self.old, self.new, "--url", str(self.service.http.base_url), "--namespace", namespace]
        words += ["--out", str(directory / "out"), *(word for file in files for word in ("--items", str(file)))]
        return CliRunner().invoke(app, [*words, *more])

    def make_default(self, tokenizer: str) -> Result:
        words = ["tokenizers", "default", tokenizer, "--url", str(self.service.http.base_url)]
        done = CliRunner().invoke(app, words)
        time.sleep(1.1)  # what is retired from now on is so since then, by the whole seconds that are kept
        return done


def report_in(directory: Path) -> dict[str, Any]:
    """What the last migration reported."""
    found: dict[str, Any] = json.loads((directory / "out" / "report.json").read_text())
    return found


def catalogue(path: Path, rows: range, zeroed: tuple[int, ...] = ()) -> Path:
    """A file of these items; those without a content are rejected."""
    contents = CONTENTS[rows.start : rows.stop].copy()
    contents[[row - rows.start for row in zeroed]] = 0.0
    column = pa.array(list(contents), pa.list_(pa.float32(), DIMENSION))
    pq.write_table(pa.table({"item_id": [f"i{row}" for row in rows], "embedding": column}), path, row_group_size=7)
    return path

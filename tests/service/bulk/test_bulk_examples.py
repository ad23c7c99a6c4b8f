"""The examples of docs/bulk.md do what they say."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

PAGE = (Path(__file__).parents[3] / "docs" / "bulk.md").read_text(encoding="utf-8")


def examples(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def here(service: Any, example: str) -> str:
    """An example that talks to this service."""
    host, port = service.address
    return example.replace("127.0.0.1:8000", f"{host}:{port}").replace('"127.0.0.1", 8000', f'"{host}", {port}')


def test_the_pages_python_tokenizes_what_it_sends(service: Any) -> None:
    lines, batches = [
        subprocess.run(
            [sys.executable, "-c", here(service, example).replace("max_chunksize=1024", "max_chunksize=256")],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout
        for example in examples("python")
    ]

    assert len(lines.splitlines()) == 1000
    assert re.fullmatch(r"item-999 \d+-\d+-\d+-\d+", lines.splitlines()[-1])
    assert re.match(r"5000 items answered, the last \d+-\d+-\d+-\d+", batches)


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_the_pages_curl_tokenizes_what_it_sends(service: Any, tmp_path: Path) -> None:
    batch = pa.RecordBatch.from_pydict({"item_id": ["a", "b"], "text": ["kettle", "lamp"]})
    with pa.OSFile(str(tmp_path / "items.arrows"), "wb") as file, pa.ipc.new_stream(file, batch.schema) as writer:
        writer.write_batch(batch)

    lines, _ = [
        subprocess.run(
            here(service, example), shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True
        ).stdout
        for example in examples("sh")
    ]

    assert [line.split(",")[0] for line in lines.splitlines()] == ['{"item_id":"kettle-1"', '{"item_id":"lamp-1"']
    answered = pa.ipc.open_stream((tmp_path / "ids.arrows").read_bytes()).read_all()
    assert answered["item_id"].to_pylist() == ["a", "b"]
    assert answered["created"].to_pylist() == [True, True]

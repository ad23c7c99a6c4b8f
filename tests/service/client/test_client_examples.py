"""The examples of docs/client.md and of the README do what they say."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from service.cli import app

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "client.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8").split("## From Python")[1]


def here(service: Any, example: str) -> str:
    """An example that talks to this service."""
    return example.replace("127.0.0.1:8000", "{}:{}".format(*service.address))


def test_the_pages_python_does_what_the_page_says(service: Any) -> None:
    # in one process, as each would import the same again
    pages = [*re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL), README.split("```python\n")[1].split("```")[0]]
    examples = [here(service, example) for example in pages]

    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "\nprint('--')\n".join(examples)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    items, tables, lookups, explained, mugs, kettle = done.stdout.split("--\n")
    assert re.match(r"kettle-1 \d+-\d+-\d+-0 \('<a_\d+>'", items)
    assert "empty failed: " in items
    assert re.match(r"5000 items answered, the last \d+-\d+-\d+-\d+", tables)
    assert lookups.startswith("rake-1 20")
    assert "['rake-1', None]\n1 [(" in lookups
    assert re.search(r"\n2 retired \d+-\d+-\d+-0\nretired at 20.*\n404 .*\nsmall@\w+ True\n$", lookups)
    assert re.match(r"(\d \d+ \d\.\d+ \d\.\d+ \d\n){3}would get \d+-\d+-\d+-\d+ \('<a_\d+>'", explained)
    assert re.search(r"kettle-1 shares \d codes\n$", explained)
    assert mugs == "600 items; True True\n"
    assert re.fullmatch(r"kettle-1 \d+-\d+-\d+-\d+\n", kettle)


def test_the_pages_command_writes_the_table(service: Any, tmp_path: Path) -> None:
    (words,) = re.findall(r"```sh\nsemid (.*?)\n```", PAGE)
    rows = [{"item_id": "kettle-1", "title": "kettle"}, {"item_id": "lamp-1", "title": "lamp"}]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [str(tmp_path / word) if word.startswith(("items.", "ids.")) else word for word in shlex.split(words)]

    result = CliRunner().invoke(app, [here(service, word) for word in arguments])

    assert result.exit_code == 0, result.output
    assert (tmp_path / "ids.parquet").is_file()

"""Runs a page of docs/ block by block, as a reader would, and compares what the page shows with what is answered.

    ```sh      commands, run by sh; a block that begins with `semid` is one command of the CLI, run in this process
    ```python  run in this process; a page's blocks go on from each other
    ```json    what the block before it prints, as JSON
    ```text    what the block before it prints, line by line

In what is shown `...` stands for anything: a value, the rest of a list or of an object, a part of a line.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from typer.testing import CliRunner

from service.cli import app

DOCS = Path(__file__).parent.parent / "docs"
ADDRESS = "http://127.0.0.1:8000"
REST = "..."
SHOWN = frozenset({"json", "text"})


class Block(NamedTuple):
    """A fenced block: its language, its text, and the line of the page on which it begins."""

    language: str
    text: str
    line: int


def blocks_of(page: str) -> list[Block]:
    """All blocks of a page of docs/, in order."""
    text = (DOCS / page).read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(block[1], block[2], text.count("\n", 0, block.start()) + 1) for block in found]


class Reader:
    """Does what a page says.

    Args:
        directory: Where its commands run.
        url: The service that stands for the page's own.
        path: Directories of commands.
        instead: What is done in the place of a whole block, by its text; it answers what the block prints.
    """

    def __init__(
        self, directory: Path, url: str, *, path: str = "", instead: Mapping[str, Callable[[], str]] | None = None
    ) -> None:
        self.url = url
        self._directory = directory
        self._path = path
        self._instead = dict(instead or {})
        self._names: dict[str, Any] = {"__name__": "__main__"}

    def read(self, page: str) -> None:
        """Run every block, and compare what is shown."""
        printed = ""
        for block in blocks_of(page):
            at = f"docs/{page}, line {block.line}"
            if block.language in SHOWN:
                compare(block, printed, at)
            else:
                printed = self.run(block, at)
        assert not self._instead, f"docs/{page} has no block {[*self._instead]}"

    def run(self, block: Block, at: str) -> str:
        """What a block prints."""
        if (instead := self._instead.pop(block.text.strip(), None)) is not None:
            return instead()
        text = block.text.replace(ADDRESS, self.url)
        if block.language == "python":
            return self._python(text, at)
        if text.startswith("semid "):
            return self._semid(text, at)
        environment = {**os.environ, "PATH": f"{self._path}:{os.environ['PATH']}"}
        done = subprocess.run(
            ["sh", "-euc", text],
            cwd=self._directory,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"{at}: {done.stderr}"
        return done.stdout

    def _python(self, text: str, at: str) -> str:
        printed = io.StringIO()
        with contextlib.chdir(self._directory), contextlib.redirect_stdout(printed):
            exec(compile(text, at, "exec"), self._names)
        return printed.getvalue()

    def _semid(self, text: str, at: str) -> str:
        words = shlex.split(text.replace("\\\n", " "), comments=True)[1:]
        if words[0] == "tokenize" and "--url" not in words:  # else it would ask the address of the page
            words += ["--url", self.url]
        with contextlib.chdir(self._directory):
            done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, f"{at}: {done.output}{done.exception or ''}"
        return done.stdout


def compare(shown: Block, printed: str, at: str) -> None:
    """Fail where what is shown is not what was printed."""
    if shown.language == "json":
        assert fits(json.loads(shown.text), json.loads(printed)), f"{at} shows another answer than\n{printed}"
    else:
        pattern = r".*".join(map(re.escape, shown.text.strip().split(REST)))
        assert re.fullmatch(pattern, printed.strip(), re.DOTALL), f"{at} shows something else than\n{printed}"


def fits(shown: Any, answered: Any) -> bool:
    """Whether an answer is what is shown; numbers with a point up to a thousandth, times in any second."""
    match shown, answered:
        case str(), _ if shown == REST:
            return True
        case dict(), dict():
            known = shown.keys() - {REST}
            return (known == answered.keys() or (REST in shown and known <= answered.keys())) and all(
                fits(shown[name], answered[name]) for name in known
            )
        case list(), list():
            if shown and shown[-1] == REST:
                shown, answered = shown[:-1], answered[: len(shown) - 1]
            return len(shown) == len(answered) and all(map(fits, shown, answered))
        case float(), float() | int():
            return abs(shown - answered) <= 1e-3 + 1e-3 * abs(answered)
        case str(), str() if re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:]+Z", shown):
            return re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:]+Z", answered) is not None
        case _:
            return type(shown) is type(answered) and bool(shown == answered)

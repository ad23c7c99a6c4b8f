"""What was asked and what was answered, a line each, written before the next step is taken.

A request line has no outcome yet; an `answer` line acknowledges it, an `unknown` line says why there was none. A
request without either, as its client was stopped, is unknown too. Times are seconds of the machine's monotonic clock,
which all its processes share.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self


@dataclass
class Operation:
    """One request, and what is known of its outcome.

    Attributes:
        client: Who asked.
        number: Which of that client's requests it is.
        call: `tokenize`, `retire`, `forward`, `reverse` or `lookup`.
        arguments: What was asked, by name.
        start: When it was written down, before it was sent.
        end: When the answer had arrived, or was given up.
        status: The HTTP status; None where there was no answer.
        body: What was answered, without what nobody checks.
        why: Where there was no answer, what happened instead.
    """

    client: str
    number: int
    call: str
    arguments: dict[str, Any]
    start: float
    end: float | None = None
    status: int | None = None
    body: Any = None
    why: str | None = None

    @property
    def acknowledged(self) -> bool:
        """Whether the answer is a promise; 429 and failures of the service promise nothing."""
        return self.status is not None and self.status < 500 and self.status != 429

    @property
    def name(self) -> str:
        """Where to find it: the client's file, and which of its requests."""
        return f"{self.client}/{self.number}"

    def __str__(self) -> str:
        outcome = f"{self.status} {json.dumps(self.body)}" if self.status else f"unknown ({self.why})"
        return f"{self.name} {self.call} {json.dumps(self.arguments)} -> {outcome}"


class History:
    """One client's file."""

    def __init__(self, path: Path) -> None:
        self._client = path.stem
        self._file = path.open("a", encoding="utf-8")
        self._number = 0

    def request(self, call: str, arguments: dict[str, Any]) -> int:
        """Writes a request down; returns its number."""
        self._number += 1
        self._write({"request": self._number, "call": call, "arguments": arguments})
        return self._number

    def answer(self, number: int, status: int, body: Any) -> None:
        """Writes down what was answered."""
        self._write({"answer": number, "status": status, "body": body})

    def unknown(self, number: int, why: str) -> None:
        """Writes down that there was no answer."""
        self._write({"unknown": number, "why": why})

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps({**line, "at": time.monotonic()}) + "\n")
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def read_history(path: Path) -> list[Operation]:
    """The operations of one file, in order."""
    operations: dict[int, Operation] = {}
    for text in path.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        if "request" in line:
            number = line["request"]
            operations[number] = Operation(path.stem, number, line["call"], line["arguments"], line["at"])
            continue
        operation = operations[line.get("answer") or line["unknown"]]
        operation.end = line["at"]
        operation.status, operation.body = line.get("status"), line.get("body")
        operation.why = line.get("why")
    return list(operations.values())

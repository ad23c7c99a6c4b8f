"""The log of a process, as lines for a person or as JSON: its own, uvicorn's and Python's warnings alike.

What callers send is in no line: no text, no item id, no path that holds one.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final, Literal

import orjson

from service.telemetry.serving import request_id

LogFormat = Literal["text", "json"]
CHATTY = ("sentence_transformers", "httpx")
MEMBERS: Final = "members"  # of a record, by `extra`: what a JSON line tells beside its message


def begin_logging(level: str, form: LogFormat, *, processes: bool) -> None:
    """Log to standard error from now on.

    Args:
        level: From which on lines are written.
        form: Of each line.
        processes: Whether a line for a person says which process it is of; JSON always does.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if form == "json" else TextLines(processes=processes))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    logging.captureWarnings(form == "json")
    for chatty in CHATTY:
        logging.getLogger(chatty).setLevel(logging.WARNING)


class TextLines(logging.Formatter):
    """A line for a person; that of a request ends with the request's id.

    Args:
        processes: Whether to tell which process a line is of.
    """

    def __init__(self, *, processes: bool) -> None:
        process = "[%(process)d]" if processes else ""
        super().__init__(f"%(asctime)s %(levelname)s %(name)s{process}: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the library's name
        """One line."""
        line = super().formatMessage(record)
        found = _request_id(record)
        return line if found is None else f"{line} [{found}]"


class JsonLines(logging.Formatter):
    """A JSON object a line: `time`, `level`, `logger`, `process`, `message`, and what else there is."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, however many the message has."""
        members: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")[:-6] + "Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": record.process,
            "message": record.getMessage(),
        }
        found = _request_id(record)
        if found is not None:
            members["request_id"] = found
        more: Mapping[str, Any] = getattr(record, MEMBERS, {})
        members |= more
        if record.exc_info:
            members["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            members["stack"] = self.formatStack(record.stack_info)
        return orjson.dumps(members, default=str).decode()


def _request_id(record: logging.LogRecord) -> str | None:
    """Of the request that a line is about: named by whoever logs it, where that is not who serves it."""
    named: str | None = getattr(record, "request_id", None)
    return named or request_id()

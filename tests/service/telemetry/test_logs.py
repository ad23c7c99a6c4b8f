"""The log: its forms, and what stands in a line."""

from __future__ import annotations

import json
import logging
import sys
import warnings

import pytest

from service.telemetry.logs import JsonLines, TextLines, begin_logging
from service.telemetry.serving import SERVING, Serving


@pytest.fixture
def _serving():
    token = SERVING.set(Serving("abc-1"))
    yield
    SERVING.reset(token)


def record(message: str, *arguments: object, **more: object) -> logging.LogRecord:
    logger = logging.getLogger("service.some")
    return logger.makeRecord(logger.name, logging.WARNING, __file__, 1, message, arguments, None, extra=more)


@pytest.mark.usefixtures("_serving")
def test_every_line_written_while_a_request_is_served_has_its_id() -> None:
    line = json.loads(JsonLines().format(record("%d rows", 3)))

    assert line["time"].endswith("Z")
    assert (line["level"], line["logger"], line["message"]) == ("warning", "service.some", "3 rows")
    assert line["request_id"] == "abc-1"
    assert TextLines(processes=True).format(record("%d rows", 3)).endswith("3 rows [abc-1]")


def test_a_line_outside_of_requests_has_none_unless_it_names_one() -> None:
    assert "request_id" not in json.loads(JsonLines().format(record("started")))
    assert json.loads(JsonLines().format(record("failed", request_id="of-the-job")))["request_id"] == "of-the-job"


def test_an_error_with_its_traceback_is_one_line_of_json() -> None:
    failed = record("it failed")
    try:
        int("first\nsecond")
    except ValueError:
        failed.exc_info = sys.exc_info()

    (line,) = JsonLines().format(failed).splitlines()

    assert json.loads(line)["exception"].startswith("Traceback")


def test_warnings_are_lines_of_json_too(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    try:
        begin_logging("info", "json", processes=False)
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            logging.captureWarnings(True)  # pytest has put its own in place meanwhile
            warnings.warn("old ways", stacklevel=1)
    finally:
        logging.captureWarnings(False)

    (line,) = capsys.readouterr().err.splitlines()
    assert json.loads(line)["logger"] == "py.warnings"

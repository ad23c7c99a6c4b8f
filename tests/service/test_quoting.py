"""What a caller wrote is said back, printable and short, wherever it is."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from service.quoting import LISTED_WORDS, QUOTED_CHARACTERS, bare, listed, quoted

LONG = "\x00long" * 200


@pytest.mark.parametrize("text", [LONG, "\ud800" * 100_000, "\U0001f600" * 1000])
def test_a_long_text_is_cut_and_printable(text: str) -> None:
    assert len(quoted(text)) <= len(r"\U0001f600") * QUOTED_CHARACTERS + len("...''")
    assert quoted(text).isprintable()
    assert quoted(text).endswith("...'")
    assert quoted(text) == f"'{bare(text)}'"


def test_of_many_words_the_first_are_said_and_how_many_there_are_beside() -> None:
    assert listed(["a", "b"]) == "'a', 'b'"
    words = listed([LONG] * (LISTED_WORDS + 7))
    assert words.count("...") == LISTED_WORDS
    assert words.endswith(" and 7 more")


def _arrow() -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, pa.schema([(f"{i} {LONG}", pa.string()) for i in range(100)])):
        pass
    content: bytes = sink.getvalue().to_pybytes()
    return content


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        ({"content": _arrow(), "headers": {"content-type": "application/vnd.apache.arrow.stream"}}, 422),
        ({"json": {"items": [{f"{i} {LONG}": 1 for i in range(100)}]}}, 200),
        ({"json": {"items": [{"item_id": "a", "text": "b"}], LONG: 1}}, 422),
        ({"content": b"{}", "headers": {"content-type": "x" * 8000}}, 415),
        ({"content": b"", "headers": {"content-type": "application/x-ndjson", "content-encoding": "x" * 8000}}, 415),
        ({"json": {}, "params": {f"{i}" + "x" * 100: "1" for i in range(100)}}, 422),
        ({"json": {"items": [{"item_id": "a", "text": "b"}], "tokenizer": LONG}}, 422),
    ],
    ids=["columns", "members", "member", "media type", "encoding", "options", "tokenizer"],
)
def test_a_problem_is_short_whatever_the_request_said(service: Any, request_: dict[str, Any], status: int) -> None:
    response = service.http.post("/tokenize", **request_)

    assert response.status_code == status
    assert len(response.content) < 3000

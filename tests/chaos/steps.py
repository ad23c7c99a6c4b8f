"""A request, as what it was to each item that it is about."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tests.chaos.history import Operation
from tests.chaos.linearizability import Answer, Step

EXPECTED = {
    "tokenize": {200},
    "lookup": {200},
    "retire": {200, 404},
    "forward": {200, 404, 410},
    "reverse": {200, 404, 410},
}
"""The documented statuses of each call, beside 429 and 503."""

MISSING = "urn:semid:problem:not_assigned"


def entries(operation: Operation) -> list[dict[str, Any]]:
    """The entries of an answer; of one that has none, itself."""
    return operation.body if isinstance(operation.body, list) else [operation.body]


def steps_of(operation: Operation, codes: Sequence[str], holders: Mapping[str, str]) -> Iterator[tuple[str, Step]]:
    """What a request was to each item it is about."""
    source = operation.name
    times = (operation.start, operation.end if operation.end is not None else operation.start)
    known = operation.acknowledged and operation.status in EXPECTED[operation.call]
    arguments = operation.arguments
    if operation.call == "tokenize":
        for i, (item, content) in enumerate(arguments["items"]):
            answer = _tokenized(operation.body[i]) if known and "error" not in operation.body[i] else None
            yield item, Step(arguments["on_change"], codes[content], *times, answer, source)
    elif operation.call in {"retire", "forward"}:
        yield arguments["item"], Step(operation.call, "", *times, _found_forward(operation) if known else None, source)
    else:
        asked = arguments.get("semantic_ids") or [arguments["semantic_id"]]
        bodies = entries(operation) if known else [None] * len(asked)
        for semantic_id, body in zip(asked, bodies, strict=True):
            if semantic_id in holders:
                answer = _found_reverse(body) if known and body else None
                yield holders[semantic_id], Step("reverse", _codes(semantic_id), *times, answer, source)


def _tokenized(entry: dict[str, Any]) -> Answer:
    return "held", _codes(entry["semantic_id"]), entry["created"], entry["content_changed"]


def _found_forward(operation: Operation) -> Answer:
    if operation.status == 404:
        return ("none",)
    body = operation.body
    if operation.call == "retire" or operation.status == 410:
        return "retired", _codes(body["semantic_id"])
    return "live", _codes(body["semantic_id"]), body["content_changed"]


def _found_reverse(body: dict[str, Any]) -> Answer:
    told = body.get("error", body)
    if told.get("type") == MISSING:
        return ("none",)
    if "content_changed" not in told:
        return "retired", _codes(told["semantic_id"])
    replaced_by = told["replaced_by"]
    return "live", _codes(told["semantic_id"]), told["content_changed"], replaced_by and _codes(replaced_by)


def _codes(semantic_id: str) -> str:
    return semantic_id.rpartition("-")[0]

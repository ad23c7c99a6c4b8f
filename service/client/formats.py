"""What items and answers are written in: NDJSON item by item, Arrow by record batches, JSON lists of questions."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import httpx
import orjson

from service import errors as problems
from service.client.answers import Entry, FailedItem, Fault, TokenizedItem, tokenized
from service.client.errors import Refused, UnusableAnswer, refusal
from service.client.exchange import JSON, Reply, Request
from service.client.portion import Received

if TYPE_CHECKING:
    import pyarrow as pa

T = TypeVar("T")

NDJSON = "application/x-ndjson"
ARROW = "application/vnd.apache.arrow.stream"

Item = Mapping[str, Any]
"""`item_id`, and `text`, `fields` or `embedding`: a list, an array (D,), or base64 of float32; perhaps `display`."""


@dataclass(frozen=True)
class Lines:
    """NDJSON: an item a line.

    Args:
        params: Of the request.
    """

    params: Mapping[str, str]

    def request(self, rows: Sequence[Item]) -> Request:
        """The request of these items."""
        content = b"".join(item_json(row) + b"\n" for row in rows)
        return Request("POST", "/tokenize", self.params, content, {"content-type": NDJSON})

    def read(self, reply: Reply, rows: Sequence[Item]) -> Received[TokenizedItem | FailedItem]:
        """The answers of the lines that came whole."""
        lines = reply.content.split(b"\n")[:-1]
        trouble: httpx.TransportError | Refused | None = reply.cut
        try:
            entries: list[Entry] = [orjson.loads(line) for line in lines]
            if entries and "problem" in entries[-1]:
                problem = entries.pop()["problem"]
                trouble = refusal(problem["status"], Fault.of(problem))
            _require_aligned([entry["item_id"] for entry in entries], [row.get("item_id") for row in rows])
            return Received([tokenized(entry) for entry in entries], len(entries), trouble)
        except (KeyError, TypeError, ValueError) as error:
            raise UnusableAnswer(f"/tokenize answered what cannot be read: {error!r}") from error


@dataclass(frozen=True)
class RecordBatches:
    """Arrow: record batches of items, record batches of answers.

    Args:
        params: Of the request.
    """

    params: Mapping[str, str]

    def request(self, rows: pa.RecordBatch) -> Request:
        """The request of the rows of a record batch."""
        import pyarrow as pa

        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, rows.schema) as stream:
            stream.write_batch(rows)
        return Request("POST", "/tokenize", self.params, sink.getvalue().to_pybytes(), {"content-type": ARROW})

    def read(self, reply: Reply, rows: pa.RecordBatch) -> Received[pa.RecordBatch]:
        """The record batches that came whole."""
        import pyarrow as pa

        batches: list[pa.RecordBatch] = []
        trouble: httpx.TransportError | Refused | None = reply.cut
        try:
            batches += pa.ipc.open_stream(reply.content)
        except (pa.ArrowException, OSError) as error:
            if reply.cut is None:
                raise UnusableAnswer(f"the answer is no Arrow stream: {error}") from error
            batches = _whole(reply.content)
        if batches and (problem := _problem(batches[-1])) is not None:
            batches.pop()
            trouble = problem
        answered = [item_id for batch in batches for item_id in batch["item_id"].to_pylist()]
        _require_aligned(answered, rows["item_id"].to_pylist())
        return Received(batches, len(answered), trouble)


@dataclass(frozen=True)
class Questions(Generic[T]):
    """JSON: a list of questions, a list of answers.

    Args:
        path: Of the call.
        asked: The request's member that has the questions.
        answered: The answer's member that has the entries.
        origin: The request's other members.
        read_entry: Reads an entry.
    """

    path: str
    asked: str
    answered: str
    origin: Mapping[str, str | bool]
    read_entry: Callable[[Entry], T]

    def request(self, rows: Sequence[str]) -> Request:
        """The request of these questions."""
        content = _json({self.asked: list(rows), **self.origin})
        return Request("POST", self.path, {}, content, {"content-type": JSON})

    def read(self, reply: Reply, rows: Sequence[str]) -> Received[T]:  # noqa: ARG002 - a list is whole or none
        """The answers; all or none."""
        try:
            entries = reply.json()[self.answered]
            return Received([self.read_entry(entry) for entry in entries], len(entries))
        except (KeyError, TypeError, ValueError) as error:
            raise UnusableAnswer(f"{self.path} answered what cannot be read: {error!r}") from error


def item_json(item: Item) -> bytes:
    """An item as JSON, on one line; an array as base64 of float32.

    Raises:
        TypeError: It is no mapping, or holds what JSON has not.
    """
    if not isinstance(item, Mapping):
        raise TypeError(f"an item is a mapping with `item_id` and its content, not {type(item).__name__}: {item!r:.60}")
    embedding = item.get("embedding")
    if hasattr(embedding, "__array__"):
        import numpy as np

        vector = np.ascontiguousarray(embedding, dtype="<f4")
        item = {**item, "embedding": base64.b64encode(vector.tobytes()).decode()}
    return _json(item)


def _json(value: Mapping[str, Any]) -> bytes:
    """As JSON. What orjson refuses (half a surrogate pair) is left to the service: that item fails alone."""
    try:
        return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
    except TypeError:
        return json.dumps(value).encode()


def _require_aligned(answered: Sequence[str | None], sent: Sequence[Any]) -> None:
    """Raise UnusableAnswer unless each answer is that of the item in its place; a failed one may not say whose."""
    if len(answered) > len(sent):
        raise UnusableAnswer(f"{len(sent)} items were sent, {len(answered)} are answered")
    for item_id, own in zip(answered, sent, strict=False):
        if item_id is not None and item_id != own:
            raise UnusableAnswer(f"the answer to {own!r} is one to {item_id!r}")


def _whole(content: bytes) -> list[pa.RecordBatch]:
    """The record batches before the place where a stream was cut off."""
    import pyarrow as pa

    batches: list[pa.RecordBatch] = []
    try:
        with pa.ipc.open_stream(content) as stream:
            while True:
                batches.append(stream.read_next_batch())
    except (pa.ArrowException, OSError, StopIteration):
        return batches


def _problem(batch: pa.RecordBatch) -> Refused | None:
    """Why the stream ended, where its last row says that: it is nobody's, and its error is one of whole requests."""
    if len(batch) != 1 or batch["item_id"][0].is_valid or not batch["error"][0].is_valid:
        return None
    fault = Fault.of(batch["error"][0].as_py())
    status = _statuses_of_requests().get(fault.slug)
    return None if status is None else refusal(status, fault)


@cache
def _statuses_of_requests() -> dict[str, int]:
    """Slug -> status of every problem that a whole request can have."""
    kinds: list[type[problems.SemidError]] = [problems.SemidError, *problems.ServiceError.__subclasses__()]
    return {kind.slug: kind.status for kind in kinds}

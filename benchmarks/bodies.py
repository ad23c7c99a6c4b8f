"""Items as bodies of `POST /tokenize` in each of its media types, and what the answers say."""

from __future__ import annotations

import base64
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
from numpy.typing import NDArray

from benchmarks.contents import Texts
from benchmarks.light import JSON

NDJSON, ARROW = "application/x-ndjson", "application/vnd.apache.arrow.stream"

Items = list[dict[str, Any]]


def new_prefix() -> str:
    """Of item ids that no service knows yet."""
    return secrets.token_hex(4)


def as_texts(prefix: str, texts: Sequence[str]) -> Items:
    """Items of texts."""
    return [{"item_id": f"{prefix}-{number}", "text": text} for number, text in enumerate(texts)]


def as_base64(prefix: str, embeddings: NDArray[np.float32]) -> Items:
    """Items of embeddings, as base64 of little-endian float32."""
    return [
        {"item_id": f"{prefix}-{number}", "embedding": base64.b64encode(row.tobytes()).decode()}
        for number, row in enumerate(embeddings)
    ]


def as_floats(prefix: str, embeddings: NDArray[np.float32]) -> Items:
    """Items of embeddings, as lists of numbers."""
    return [{"item_id": f"{prefix}-{number}", "embedding": row.tolist()} for number, row in enumerate(embeddings)]


def batches(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """The items in parts of a size."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def json_bodies(items: Items, size: int) -> list[bytes]:
    """JSON of so many items each."""
    return [orjson.dumps({"items": part}) for part in batches(items, size)]


def ndjson_body(items: Items) -> bytes:
    """All items, a line each."""
    return b"".join(orjson.dumps(item) + b"\n" for item in items)


def arrow_body(prefix: str, content: Sequence[str] | NDArray[np.float32], *, rows: int = 4096, times: int = 1) -> bytes:
    """All texts or embeddings as an Arrow stream, so many rows a record batch, once or several times."""
    ids = pa.array([f"{prefix}-{number}" for number in range(len(content))])
    if isinstance(content, np.ndarray):
        column = pa.FixedSizeListArray.from_arrays(pa.array(content.ravel()), content.shape[1])
        table = pa.table({"item_id": ids, "embedding": column})
    else:
        table = pa.table({"item_id": ids, "text": pa.array(content)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        for _ in range(times):
            stream.write_table(table, max_chunksize=rows)
    body: bytes = sink.getvalue().to_pybytes()
    return body


def entries_of(answer: bytes) -> list[dict[str, Any]]:
    """The entries of a JSON answer; raises RuntimeError where an item failed."""
    return _sound(orjson.loads(answer)["items"])


def check(answers: Iterable[bytes], media_type: str, items: int, column: str = "semantic_id") -> None:
    """Raise RuntimeError unless answers of the service have a Semantic ID, or something else, for each item."""
    found = faults = 0
    for answer in answers:
        if media_type == ARROW:
            table = pa.ipc.open_stream(answer).read_all()
            found, faults = found + table.num_rows, faults + table[column].null_count
        else:
            entries = entries_of(answer) if media_type == JSON else _sound(map(orjson.loads, answer.splitlines()))
            found, faults = found + len(entries), faults + sum(entry[column] is None for entry in entries)
    if found != items or faults:
        raise RuntimeError(f"{items} items were sent, {found} answered, {faults} of them with errors")


def _sound(entries: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    found = [dict(entry) for entry in entries]
    for entry in found:
        if "error" in entry or "problem" in entry:
            raise RuntimeError(f"an item failed: {entry}")
    return found


class TextBodies:
    """Bodies of `POST /tokenize` with texts that are new to the service."""

    def __init__(self, catalogue: Path | None) -> None:
        self._texts = Texts(catalogue)

    def listing(self) -> bytes:
        """Of one item."""
        return self.bulk(1)

    def bulk(self, size: int) -> bytes:
        """Of so many."""
        return json_bodies(as_texts(new_prefix(), self._texts.take(size)), size)[0]

"""Arrow bodies, as a caller writes them and reads the answers."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pyarrow as pa

from service.bulk.arrow import MEDIA_TYPE

MakeEmbedding = Callable[[int], list[float]]

TYPE = "urn:semid:problem:"
D = 384
EMBEDDING = pa.list_(pa.float32(), D)


def texts(*rows: tuple[str | None, str | None]) -> pa.RecordBatch:
    ids, contents = zip(*rows, strict=True)
    return pa.RecordBatch.from_pydict({"item_id": pa.array(ids, pa.string()), "text": pa.array(contents, pa.string())})


def embeddings(*rows: tuple[str | None, list[float] | None]) -> pa.RecordBatch:
    ids, contents = zip(*rows, strict=True)
    return pa.RecordBatch.from_pydict(
        {"item_id": pa.array(ids, pa.string()), "embedding": pa.array(contents, EMBEDDING)}
    )


def written(*batches: pa.RecordBatch, **options: Any) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, batches[0].schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return sink.getvalue()


def post(service: Any, body: bytes, **query: Any) -> Any:
    return service.http.post("/tokenize", content=body, params=query, headers={"content-type": MEDIA_TYPE})


def rows_of(answer: Any) -> list[dict[str, Any]]:
    assert answer.status_code == 200, answer.text
    rows: list[dict[str, Any]] = pa.ipc.open_stream(answer.content).read_all().to_pylist()
    return rows


def tokenize(service: Any, *batches: pa.RecordBatch, **query: Any) -> list[dict[str, Any]]:
    return rows_of(post(service, written(*batches), **query))


def as_row(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry of a JSON answer as the row it should be."""
    failed = {"overflow": None} if "error" in entry else {"overflow": entry.get("overflow", False)}
    names = ("item_id", "semantic_id", "codes", "suffix", "created", "content_changed", "quantization_error", "margin")
    return {**{name: entry.get(name) for name in (*names, "group_size", "error")}, **failed}


def rounded(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the digits that depend on a row's neighbours."""
    return [
        {name: round(value, 9) if isinstance(value, float) else value for name, value in row.items()} for row in rows
    ]

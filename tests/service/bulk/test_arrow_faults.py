"""What is at fault in an Arrow stream fails alone where it can, and is told where it cannot."""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models import Tokenizer
from service.bulk.arrow import MEDIA_TYPE, read_columns
from service.bulk.arrow_messages import _field
from service.content import ItemReader
from tests.service.bulk.arrow_calls import (
    TYPE,
    D,
    embeddings,
    post,
    rows_of,
    texts,
    tokenize,
    written,
)
from tests.streaming import StreamingCaller

MakeEmbedding = Callable[[int], list[float]]

pytestmark = pytest.mark.usefixtures("nothing_left")


UNIT = [1.0] + [0.0] * (D - 1)

BAD_TEXTS: dict[str, tuple[str | None, str | None, str]] = {
    "no item id": (None, "x", "invalid_item_id"),
    "an empty item id": ("", "x", "invalid_item_id"),
    "an item id of 257 bytes": ("é" * 128 + "x", "x", "invalid_item_id"),
    "an item id with a NUL": ("b\0d", "x", "invalid_item_id"),
    "no text": ("bad", None, "invalid_content"),
    "an empty text": ("bad", "", "invalid_text"),
    "a blank text": ("bad", " \t\u3000", "invalid_text"),
    "a very long text": ("bad", "x" * 4097, "invalid_text"),
    "a text with a NUL": ("bad", "a\0b", "invalid_text"),
}
BAD_EMBEDDINGS: dict[str, tuple[list[float] | None, str]] = {
    "no embedding": (None, "invalid_content"),
    "NaN": ([float("nan"), *UNIT[1:]], "invalid_embedding"),
    "infinity": ([float("inf"), *UNIT[1:]], "invalid_embedding"),
    "zeros": ([0.0] * D, "invalid_embedding"),
    "a null in it": ([*UNIT[:-1], None], "invalid_embedding"),  # type: ignore[list-item]
}


@pytest.mark.parametrize(("item_id", "text", "slug"), BAD_TEXTS.values(), ids=BAD_TEXTS.keys())
def test_a_row_at_fault_fails_alone(
    service: Any, namespace: str, item_id: str | None, text: str | None, slug: str
) -> None:
    before, bad, after = tokenize(
        service, texts(("before", "kettle"), (item_id, text), ("after", "lamp")), namespace=namespace
    )

    assert (before["created"], after["created"]) == (True, True)
    assert (before["error"], after["error"]) == (None, None)
    assert bad["error"]["type"] == TYPE + slug
    assert bad["error"]["detail"]
    assert {name for name, value in bad.items() if value is not None} <= {"item_id", "error"}
    assert bad["item_id"] == (None if slug == "invalid_item_id" else item_id)
    assert set(service.assigned(namespace)) == {"before", "after"}


@pytest.mark.parametrize(("embedding", "slug"), BAD_EMBEDDINGS.values(), ids=BAD_EMBEDDINGS.keys())
def test_an_embedding_at_fault_fails_alone(service: Any, namespace: str, embedding: Any, slug: str) -> None:
    before, bad, after = tokenize(
        service, embeddings(("before", UNIT), ("bad", embedding), ("after", UNIT)), namespace=namespace
    )

    assert (before["suffix"], after["suffix"]) == (0, 1)
    assert (bad["item_id"], bad["error"]["type"]) == ("bad", TYPE + slug)
    assert set(service.assigned(namespace)) == {"before", "after"}


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("seeds", [[1], [1, 2]])
def test_a_row_that_the_model_fails_on_fails_alone(
    service: Any,
    namespace: str,
    make_embedding: MakeEmbedding,
    monkeypatch: pytest.MonkeyPatch,
    seeds: list[int],
    *,
    assign: bool,
) -> None:
    encode, poison = service.batcher._encoder.encode, torch.tensor(make_embedding(1))

    def failing(embeddings: torch.Tensor, **options: Any) -> Any:
        if bool((embeddings == poison).all(dim=1).any()):
            raise RuntimeError("poison")
        return encode(embeddings, **options)

    monkeypatch.setattr(service.batcher._encoder, "encode", failing)
    batch = embeddings(*((f"item {seed}", make_embedding(seed)) for seed in seeds))

    rows = tokenize(service, batch, namespace=namespace, assign=assign)

    assert [row["item_id"] for row in rows] == [f"item {seed}" for seed in seeds]
    assert rows[0]["error"]["type"] == "urn:semid:problem:encoding_failed"
    assert [row["error"] for row in rows[1:]] == [None] * (len(seeds) - 1)


@given(st.lists(st.text(alphabet=" \t\x1c\x1f\x85\xa0\u1680\u2003\u2028\u3000aé中\0", max_size=3), min_size=1))
def test_rows_fail_by_the_same_rules_as_json_items(tokenizer: Tokenizer, contents: list[str]) -> None:
    reader = ItemReader(tokenizer, max_text_bytes=6)
    columns = read_columns(texts(*((f"{i}", text) for i, text in enumerate(contents))), reader)

    for i, text in enumerate(contents):
        if i in columns.failures:
            with pytest.raises(type(columns.failures[i])) as failure:
                reader.read({"item_id": f"{i}", "text": text})
            assert columns.failures[i].as_error() == failure.value.as_error()
        else:
            assert columns.digests[i].tobytes() == reader.read({"item_id": f"{i}", "text": text}).digest


NUMBERS = st.sampled_from([0.0, -0.0, 1.0, 1e-40, 1e-30, 1e30, 3e38, math.nan, math.inf, -math.inf, None])


EMBEDDINGS = st.tuples(NUMBERS, st.sampled_from([0.0, 0.5]), NUMBERS).map(
    lambda drawn: [drawn[0], *[drawn[1]] * (D - 2), drawn[2]]
)


@given(st.lists(st.none() | EMBEDDINGS, min_size=1, max_size=6), st.integers(0, 5))
def test_embeddings_fail_by_the_same_rules_as_json_items(
    tokenizer: Tokenizer, contents: list[list[float] | None], cut: int
) -> None:
    start = min(cut, len(contents) - 1)
    reader = ItemReader(tokenizer, max_text_bytes=6)
    columns = read_columns(embeddings(*((f"{i}", row) for i, row in enumerate(contents))).slice(start), reader)

    for i, embedding in enumerate(contents[start:]):
        if i in columns.failures:
            with pytest.raises(type(columns.failures[i])) as failure:
                reader.read({"item_id": "x", "embedding": embedding})
            assert columns.failures[i].as_error() == failure.value.as_error()
        else:
            assert columns.digests[i].tobytes() == reader.read({"item_id": "x", "embedding": embedding}).digest


BATCH = texts(("never", "x"))
SCHEMAS: dict[str, tuple[pa.RecordBatch, str]] = {
    "no item id": (BATCH.select(["text"]), "the columns are item_id"),
    "no content": (BATCH.select(["item_id"]), "the columns are item_id"),
    "a column too many": (BATCH.append_column("price", pa.array([1])), "'price'"),
    "numbers for ids": (BATCH.set_column(0, "item_id", pa.array([1])), "item_id is a column of strings"),
    "a dictionary": (BATCH.set_column(1, "text", pa.array(["x"]).dictionary_encode()), "text is a column of strings"),
    "embeddings of another width": (
        pa.RecordBatch.from_pydict({"item_id": ["a"], "embedding": pa.array([[1.0]], pa.list_(pa.float32(), 1))}),
        f"[{D}]",
    ),
    "embeddings of float64": (
        pa.RecordBatch.from_pydict({"item_id": ["a"], "embedding": pa.array([UNIT], pa.list_(pa.float64(), D))}),
        "float",
    ),
    "embeddings of any width": (
        pa.RecordBatch.from_pydict({"item_id": ["a"], "embedding": pa.array([UNIT], pa.list_(pa.float32()))}),
        f"[{D}]",
    ),
}


@pytest.mark.parametrize(("batch", "detail"), SCHEMAS.values(), ids=SCHEMAS.keys())
def test_other_columns_are_refused(service: Any, batch: pa.RecordBatch, detail: str) -> None:
    refused = post(service, written(batch))

    assert (refused.status_code, refused.json()["type"]) == (422, TYPE + "malformed_request")
    assert detail in refused.json()["detail"]


def with_offsets(body: bytes) -> bytes:
    """A stream whose text says that it is longer than it is."""
    at = body.index(struct.pack("<ii", 0, 6))
    return body[: at + 4] + struct.pack("<i", 2**20) + body[at + 8 :]


def compressed_as_of_old(batch: pa.RecordBatch) -> bytes:
    """As Arrow 0.17 did: its metadata are of version 4, and say so in a place of their own."""
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, batch.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_batch(batch, custom_metadata={"ARROW:experimental_compression": "zstd"})
    body, at = bytearray(sink.getvalue()), batch.schema.serialize().size + 8
    metadata = body[at:]
    (message,) = struct.unpack_from("<I", metadata)
    header_at = _field(metadata, message, 2)
    header = header_at + struct.unpack_from("<I", metadata, header_at)[0]
    vtable = header - struct.unpack_from("<i", metadata, header)[0]
    struct.pack_into("<h", body, at + _field(metadata, message, 0), 3)
    struct.pack_into("<H", body, at + vtable + 4 + 2 * 3, 0)
    return bytes(body)


def big_endian(body: bytes) -> bytes:
    """The same, which says that its numbers are turned round: by another place of it that holds a 1."""
    said, at = bytearray(body), 8
    metadata = said[at:]
    (message,) = struct.unpack_from("<I", metadata)
    header_at = _field(metadata, message, 2)
    header = header_at + struct.unpack_from("<I", metadata, header_at)[0]
    vtable = header - struct.unpack_from("<i", metadata, header)[0]
    one = next(place for place in range(header, len(metadata), 2) if metadata[place : place + 2] == b"\1\0")
    struct.pack_into("<H", said, at + vtable + 4, one - header)
    return bytes(said)


WHOLE = written(texts(("before", "kettle")), BATCH)
BROKEN: dict[str, bytes] = {
    "nothing": b"",
    "JSON": b'{"items": []}',
    "a file": b"ARROW1\0\0" + WHOLE,
    "the end alone": b"\xff\xff\xff\xff\0\0\0\0",
    "half of a schema": WHOLE[:60],
    "metadata of 2 GiB": b"\xff\xff\xff\xff" + struct.pack("<I", 2**31 - 1) + WHOLE[8:],
    "metadata of noise": b"\xff\xff\xff\xff" + struct.pack("<I", 64) + bytes(range(64)),
    "compressed": written(BATCH, compression="zstd"),
    "compressed as of old": compressed_as_of_old(BATCH),
    "big-endian": big_endian(written(embeddings(("never", UNIT)))),
    "offsets beyond the end": with_offsets(written(texts(("never", "kettle")))),
}


@pytest.mark.parametrize("body", BROKEN.values(), ids=BROKEN.keys())
def test_what_is_no_stream_is_refused(service: Any, namespace: str, body: bytes) -> None:
    refused = post(service, body, namespace=namespace)

    assert (refused.status_code, refused.json()["type"]) == (400, TYPE + "broken_stream")
    assert service.assigned(namespace) == {}


def test_a_stream_that_breaks_later_says_so_in_its_last_row(service: Any, namespace: str) -> None:
    *answered, last = rows_of(post(service, WHOLE[:-20], namespace=namespace))

    assert [row["item_id"] for row in answered] == ["before"]
    assert last["item_id"] is None
    assert last["error"]["type"] == TYPE + "broken_stream"
    assert set(service.assigned(namespace)) == {"before"}


def test_a_record_batch_beyond_the_limit_is_refused_before_it_is_read(service: Any, namespace: str) -> None:
    batch = texts(*((f"{i}", "x" * 2000) for i in range(300)))
    with StreamingCaller(service, MEDIA_TYPE, namespace=namespace) as caller:
        caller.send(written(batch)[:2000])

        assert caller.answer.status == 413
        assert b"write smaller ones" in caller.answer.read()


@settings(deadline=None, max_examples=50)
@given(st.integers(0, len(WHOLE) - 1), st.integers(0, 255))
def test_a_byte_that_is_wrong_harms_nothing_but_its_stream(service: Any, place: int, byte: int) -> None:
    body = WHOLE[:place] + bytes([byte]) + WHOLE[place + 1 :]

    answer = post(service, body, namespace="damaged", assign=False)

    assert answer.status_code in {200, 400, 413, 422}

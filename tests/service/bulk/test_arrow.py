"""`application/vnd.apache.arrow.stream`: record batches are answered while the next ones are still to come."""

from __future__ import annotations

import asyncio
import io
import struct
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.types import Message

from models import Tokenizer
from service.bodies import STREAM_BYTES, BodyGate
from service.bulk import arrow
from service.bulk.arrow import EMBEDDINGS_PER_GROUP, MEDIA_TYPE, TEXTS_PER_GROUP, ArrowStream, _field, read_columns
from service.bulk.columns import AnswerColumns, ItemColumns
from service.bulk.streams import StreamedAnswer
from service.bulk.terms import StreamTerms
from service.content import ItemReader
from tests.streaming import StreamingCaller

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


@pytest.fixture(autouse=True)
def _nothing_left(service: Any) -> Iterator[None]:
    """No stream may end in a 5xx or leave bytes counted as held or rows queued."""
    yield
    assert service.metric("semid_http_requests_total", status="500") == 0
    service.until(lambda: service.state.gate._held_bytes == 0, "bytes of streams are still counted as held")
    service.until(lambda: service.metric("semid_queue_tokens") == 0, "rows stay in the queue")


# As JSON does --------------------------------------------------------------------------------------------------------

WORDS = ["", "stainless kettle", "a book about whales", "cordless drill, 18 V"]
LIVES: dict[str, list[tuple[dict[str, Any], list[tuple[str, int]]]]] = {
    "new, known, both": [
        ({}, [("a", 1), ("b", 1), ("c", 2)]),
        ({}, [("c", 2), ("a", 1), ("b", 1)]),
        ({}, [("d", 1), ("a", 1)]),
    ],
    "changed and kept": [({}, [("a", 1), ("b", 2)]), ({}, [("a", 3), ("b", 2)]), ({}, [("a", 3)]), ({}, [("a", 1)])],
    "reassigned": [
        ({}, [("a", 1)]),
        ({"on_change": "reassign"}, [("a", 2), ("b", 3)]),
        ({"on_change": "reassign"}, [("a", 2), ("b", 1)]),
        ({}, [("a", 1)]),
        ({"on_change": "reassign"}, [("a", 1)]),
    ],
    "a dry run": [
        ({"assign": False}, [("a", 1), ("b", 1)]),
        ({}, [("a", 1)]),
        ({"assign": False}, [("a", 2), ("b", 1)]),
        ({}, [("a", 2)]),
        ({"assign": False}, [("a", 2)]),
    ],
    "twice in one request": [({}, [("a", 1), ("b", 2), ("a", 1)]), ({}, [("a", 1), ("a", 2), ("c", 3)])],
    "retired": [
        ({}, [("a", 1), ("b", 1)]),
        ({}, [("gone", 0)]),
        ({"assign": False}, [("a", 1), ("b", 2), ("b", 2)]),
        ({}, [("a", 1), ("b", 2)]),
        ({}, [("a", 2)]),
    ],
}


@pytest.mark.parametrize("life", LIVES.values(), ids=LIVES.keys())
@pytest.mark.parametrize("kind", ["text", "embedding"])
def test_every_row_is_answered_as_an_item_of_a_json_body_is(
    service: Any, namespace: str, make_embedding: MakeEmbedding, life: list[Any], kind: str
) -> None:
    for options, items in life:
        if items == [("gone", 0)]:
            for each in (f"{namespace}-json", f"{namespace}-arrow"):
                assert service.http.delete("/assignment/a", params={"namespace": each}).status_code == 200
            continue
        content = [make_embedding(seed) if kind == "embedding" else WORDS[seed] for _, seed in items]
        ids = [item_id for item_id, _ in items]
        entries = service.tokenize(
            *({"item_id": i, kind: value} for i, value in zip(ids, content, strict=True)),
            namespace=f"{namespace}-json",
            **options,
        )

        batch = (embeddings if kind == "embedding" else texts)(*zip(ids, content, strict=True))
        rows = tokenize(service, batch, namespace=f"{namespace}-arrow", **options)

        assert rounded(rows) == rounded([as_row(entry) for entry in entries])


def test_many_rows_are_answered_in_order_and_counted(
    service: Any, namespace: str, make_embedding: MakeEmbedding
) -> None:
    matrix = np.random.default_rng(3).standard_normal((3000, D)).astype(np.float32)
    values = pa.FixedSizeListArray.from_arrays(pa.array(matrix.reshape(-1)), D)
    batch = pa.RecordBatch.from_pydict({"item_id": [f"é{i}" for i in range(3000)], "embedding": values})
    created = service.metric("semid_items_total", outcome="created")
    known = service.metric("semid_items_total", outcome="known")

    first = tokenize(service, *[batch.slice(at, 300) for at in range(0, 3000, 300)], namespace=namespace)
    again = tokenize(service, *[batch.slice(at, 250) for at in range(0, 3000, 250)], namespace=namespace)

    assert [row["item_id"] for row in first] == [f"é{i}" for i in range(3000)]
    assert all(row["created"] for row in first)
    assert len({row["semantic_id"] for row in first}) == 3000
    assert [row["semantic_id"] for row in first] == [
        "-".join(map(str, [*row["codes"], row["suffix"]])) for row in first
    ]
    assert [row["semantic_id"] for row in again] == [row["semantic_id"] for row in first]
    assert service.metric("semid_items_total", outcome="created") == created + 3000
    assert service.metric("semid_items_total", outcome="known") == known + 3000


def test_the_answer_says_whose_ids_these_are(service: Any, namespace: str) -> None:
    answer = post(service, written(texts(("a", "kettle"))), namespace=namespace)
    schema = pa.ipc.open_stream(answer.content).schema

    assert answer.headers["content-type"] == MEDIA_TYPE
    assert schema.metadata[b"namespace"].decode() == namespace == answer.headers["semid-namespace"]
    assert schema.metadata[b"tokenizer"].decode() == answer.headers["semid-tokenizer"]
    assert schema.field("codes").type == pa.list_(pa.int32(), 3)


def test_large_strings_and_streams_without_an_end_are_read(service: Any, namespace: str) -> None:
    large = pa.RecordBatch.from_pydict({name: pa.array(["x"], pa.large_string()) for name in ("item_id", "text")})

    (row,) = rows_of(post(service, written(large)[:-8], namespace=namespace))

    assert row["created"]


def test_no_rows_have_no_answers(service: Any, namespace: str) -> None:
    assert tokenize(service, texts(("a", "x")).slice(0, 0), namespace=namespace) == []


# Pace ----------------------------------------------------------------------------------------------------------------


def test_the_first_batch_is_answered_before_the_last_is_sent(service: Any, namespace: str) -> None:
    first, second = texts(("a", "kettle")), texts(("b", "lamp"), ("c", "lamp"))
    begun, whole = written(first)[:-8], written(first, second)
    with StreamingCaller(service, MEDIA_TYPE, namespace=namespace) as caller:
        caller.send(begun[:100])
        caller.send(begun[100:])
        answers = pa.ipc.open_stream(caller.answer)
        assert answers.read_next_batch().to_pylist()[0]["item_id"] == "a"
        caller.send(whole[len(begun) :])
        assert [row["item_id"] for row in answers.read_next_batch().to_pylist()] == ["b", "c"]
        caller.end()
        with pytest.raises(StopIteration):
            answers.read_next_batch()


# Faults --------------------------------------------------------------------------------------------------------------

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
    "a null in it": ([None, *UNIT[1:]], "invalid_embedding"),  # type: ignore[list-item]
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


# Memory --------------------------------------------------------------------------------------------------------------


async def test_what_is_answered_is_not_held_while_the_caller_thinks(tokenizer: Tokenizer) -> None:
    arriving: asyncio.Queue[Message] = asyncio.Queue()
    answered: list[Message] = []
    body = written(texts(*((f"{i}", "x" * 1000) for i in range(2 * TEXTS_PER_GROUP))))[:-8]

    async def answer(columns: ItemColumns) -> AnswerColumns:
        return AnswerColumns.empty(len(columns), 3)

    async def send(message: Message) -> None:
        answered.append(message)

    stream = ArrowStream(answer, ItemReader(tokenizer, max_text_bytes=2000), 3, {}, max_batch_bytes=2**22)
    gate = BodyGate(max_body_bytes=1, inflight_bytes=2**28, timeout_s=60.0)
    tracemalloc.start()
    try:
        arriving.put_nowait({"type": "http.request", "body": body, "more_body": True})
        exchange = asyncio.create_task(
            StreamedAnswer(stream, gate.allowance(), {}, StreamTerms(60.0))({}, arriving.get, send)
        )
        async with asyncio.timeout(20):
            while len(answered) < 3:  # noqa: ASYNC110 - nobody tells; the head, and two slices
                await asyncio.sleep(0.01)
        held = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, arrow.__file__)])
    finally:
        tracemalloc.stop()
        exchange.cancel()
        await asyncio.wait([exchange])

    assert sum(trace.size for trace in held.traces) < len(body) / 4


@pytest.mark.parametrize(
    "batch",
    [
        lambda _: texts(*((f"{i}", "kettle") for i in range(2 * TEXTS_PER_GROUP + 1))),
        lambda width: embeddings(*((f"{i}", [0.5] * width) for i in range(2 * EMBEDDINGS_PER_GROUP + 1))),
    ],
)
async def test_a_batch_has_its_room_until_its_last_slice_is_answered(
    tokenizer: Tokenizer, batch: Callable[[int], pa.RecordBatch]
) -> None:
    body = written(batch(tokenizer.dimension))
    gate = BodyGate(max_body_bytes=1, inflight_bytes=1, timeout_s=0.05)

    async def chunks() -> AsyncIterator[bytes]:
        yield body

    async def refuse(_columns: ItemColumns) -> AnswerColumns:
        raise AssertionError

    stream = ArrowStream(refuse, ItemReader(tokenizer, max_text_bytes=100), 3, {}, max_batch_bytes=2**26)
    with gate.allowance() as allowance:
        sizes = [size async for _, size in stream.groups(chunks(), allowance)]

        assert (len(sizes), sizes[:2]) == (3, [0, 0])
        assert gate._held_bytes == STREAM_BYTES + sizes[2]

"""`application/vnd.apache.arrow.stream`: record batches are answered while the next ones are still to come."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import AsyncIterator, Callable
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from starlette.types import Message

from models import Tokenizer
from service.bodies import STREAM_BYTES, BodyGate
from service.bulk import arrow, arrow_messages, column_tokenization
from service.bulk.arrow import MEDIA_TYPE, ROWS_AT_ONCE, ArrowStream
from service.bulk.columns import TEXTS_AT_ONCE, AnswerColumns, ItemColumns
from service.bulk.row_thread import RowThread
from service.bulk.streams import StreamedAnswer
from service.bulk.terms import StreamTerms
from service.content import ItemReader
from service.errors import Overloaded
from service.schemas import TokenizeOptions
from tests.service.bulk.arrow_calls import (
    D,
    as_row,
    embeddings,
    post,
    rounded,
    rows_of,
    texts,
    tokenize,
    written,
)
from tests.streaming import StreamingCaller

MakeEmbedding = Callable[[int], list[float]]

pytestmark = pytest.mark.usefixtures("nothing_left")


async def never() -> bool:
    """What comes is new."""
    return False


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
@pytest.mark.parametrize("kind", ["text", "embedding", "embedding of a feed"])
def test_every_row_is_answered_as_an_item_of_a_json_body_is(
    service: Any,
    namespace: str,
    make_embedding: MakeEmbedding,
    monkeypatch: pytest.MonkeyPatch,
    life: list[Any],
    kind: str,
) -> None:
    kind, _, feed = kind.partition(" ")
    monkeypatch.setattr(service.state.columns._novelty, "expected", lambda _record: bool(feed))
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


def test_texts_that_are_likely_known_are_asked_for_many_at_once_and_new_ones_not_encoded_so(
    service: Any, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrow, "ROWS_AT_ONCE", 32)
    for module in (arrow, column_tokenization):
        monkeypatch.setattr(module, "TEXTS_AT_ONCE", 8)
    calls = []

    def told(*names: int) -> list[dict[str, Any]]:
        before = [service.metric("semid_registry_seconds_count", call=call) for call in ("recall", "claim")]
        rows = tokenize(service, texts(*((f"{i}", f"kettle {i}") for i in names)), namespace=namespace)
        after = [service.metric("semid_registry_seconds_count", call=call) for call in ("recall", "claim")]
        calls.append(tuple(b - a for a, b in zip(before, after, strict=True)))
        return rows

    first, *again = (told(*range(64)) for _ in range(3))
    new = told(*range(64, 96))

    assert all(row["created"] for row in [*first, *new])
    assert [[row["semantic_id"] for row in rows] for rows in again] == [[row["semantic_id"] for row in first]] * 2
    assert (calls[0], calls[2], calls[3]) == ((8, 8), (2, 0), (1, 4))


@pytest.fixture
def refusals(service: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[set[int], list[int]]:
    """Which calls of the model find no room, by their number from 1; and of how many texts each call was."""
    monkeypatch.setattr(column_tokenization, "TEXTS_AT_ONCE", 8)
    batcher = service.state.tokenizers.named(None).batcher
    encode, refused, asked = batcher.encode_columns, set[int](), list[int]()

    async def refusing(contents: Any, **options: Any) -> Any:
        asked.append(len(contents))
        if len(asked) in refused:
            raise Overloaded("no room", retry_after_s=0)
        return await encode(contents, **options)

    monkeypatch.setattr(batcher, "encode_columns", refusing)
    return refused, asked


def test_new_texts_that_are_refused_after_others_got_their_ids_are_tried_again_alone(
    service: Any, namespace: str, refusals: Any
) -> None:
    refused, asked = refusals
    refused |= {1, 3}

    rows = tokenize(service, texts(*((f"{i}", f"kettle {i}") for i in range(16))), namespace=namespace)

    assert asked == [8, 8, 8, 8]
    assert all(row["created"] and row["margin"] is not None for row in rows)


def test_changed_texts_that_are_refused_after_new_ones_got_their_ids_are_tried_again_alone(
    service: Any, namespace: str, refusals: Any
) -> None:
    tokenize(service, texts(*((f"{i}", "kettle") for i in range(12))), namespace=namespace)
    refused, asked = refusals
    asked.clear()
    refused |= {2, 4}

    rows = tokenize(service, texts(*((f"{i}", f"lamp {i}") for i in range(16))), namespace=namespace)

    assert asked == [4, 8, 8, 4, 4]
    assert [row["created"] for row in rows] == [False] * 12 + [True] * 4
    assert all(row["margin"] is not None for row in rows)


def test_the_caller_of_a_json_body_hears_that_there_is_no_room(service: Any, namespace: str, refusals: Any) -> None:
    refused, asked = refusals
    refused |= {2}
    items = [{"item_id": f"{i}", "text": f"kettle {i}"} for i in range(24)]

    first, second = (service.http.post("/tokenize", json={"namespace": namespace, "items": items}) for _ in range(2))

    assert (first.status_code, second.status_code) == (429, 200)
    assert asked == [8, 8, 8, 8]
    assert [item["created"] for item in second.json()["items"]] == [False] * 8 + [True] * 16


async def test_texts_that_changed_do_not_count_as_known(service: Any, namespace: str) -> None:
    def batch(word: str) -> pa.RecordBatch:
        return texts(*((f"{i}", f"{word} {i}") for i in range(32)))

    tokenizer = service.state.tokenizers.named(None)
    for word in ("kettle", "lamp", "chair", "table", "mouse", "glove", "cable", "mug", "hose", "jazz"):
        await asyncio.to_thread(tokenize, service, batch(word), namespace=namespace)

    assert not await service.state.columns.knows(tokenizer, TokenizeOptions(namespace=namespace))


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


# Memory --------------------------------------------------------------------------------------------------------------


def held_by(module: ModuleType) -> int:
    """Bytes that were allocated in a module and are still held."""
    traces = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, module.__file__ or "")]).traces
    return sum(trace.size for trace in traces)


async def test_what_is_answered_is_not_held_while_the_caller_thinks(
    tokenizer: Tokenizer, row_thread: RowThread
) -> None:
    arriving: asyncio.Queue[Message] = asyncio.Queue()
    answered: list[Message] = []
    body = written(texts(*((f"{i}", "x" * 1000) for i in range(2 * TEXTS_AT_ONCE))))[:-8]

    async def answer(columns: ItemColumns) -> AnswerColumns:
        return AnswerColumns.empty(len(columns), 3)

    async def send(message: Message) -> None:
        answered.append(message)

    reader = ItemReader(tokenizer, max_text_bytes=2000)
    stream = ArrowStream(answer, row_thread, reader, 3, {}, max_batch_bytes=2**22, knows=never)
    gate = BodyGate(max_body_bytes=1, inflight_bytes=2**28, timeout_s=60.0)
    tracemalloc.start()
    try:
        arriving.put_nowait({"type": "http.request", "body": body, "more_body": True})
        exchange = asyncio.create_task(
            StreamedAnswer(stream, gate.allowance(), {}, StreamTerms(600.0))({}, arriving.get, send)
        )
        async with asyncio.timeout(60):
            while len(answered) < 3:  # noqa: ASYNC110 - nobody tells; the head, and two slices
                await asyncio.sleep(0.01)
            while held_by(arrow_messages) >= len(body) / 4:  # noqa: ASYNC110 - the thread lets go later
                await asyncio.sleep(0.01)
    finally:
        tracemalloc.stop()
        exchange.cancel()
        await asyncio.wait([exchange])


@pytest.mark.parametrize(
    "batch",
    [
        lambda _: texts(*((f"{i}", "kettle") for i in range(2 * TEXTS_AT_ONCE + 1))),
        lambda width: embeddings(*((f"{i}", [0.5] * width) for i in range(2 * ROWS_AT_ONCE + 1))),
    ],
)
async def test_a_batch_has_its_room_until_its_last_slice_is_answered(
    tokenizer: Tokenizer, row_thread: RowThread, batch: Callable[[int], pa.RecordBatch]
) -> None:
    body = written(batch(tokenizer.dimension))
    gate = BodyGate(max_body_bytes=1, inflight_bytes=1, timeout_s=0.05)

    async def chunks() -> AsyncIterator[bytes]:
        yield body

    async def refuse(_columns: ItemColumns) -> AnswerColumns:
        raise AssertionError

    reader = ItemReader(tokenizer, max_text_bytes=100)
    stream = ArrowStream(refuse, row_thread, reader, 3, {}, max_batch_bytes=2**26, knows=never)
    with gate.allowance() as allowance:
        sizes = [size async for _, size in stream.groups(chunks(), allowance)]

        assert (len(sizes), sizes[:2]) == (3, [0, 0])
        assert gate._held_bytes == STREAM_BYTES + sizes[2]

"""`application/vnd.apache.arrow.stream`: record batches of items in, record batches of answers out.

    messages, each whole and within a limit --> record batches --> slices --> columns --use case--> record batches

What ends a stream before its time is its last row: the item id is null, and the error is one of a whole request.
"""

from __future__ import annotations

from base64 import b64encode
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from service.bodies import Allowance
from service.bulk.arrow_messages import messages, read_batch, read_schema
from service.bulk.columns import ROWS_ON_THE_LOOP, TEXTS_AT_ONCE, AnswerColumns, EmbeddingColumn, ItemColumns, Places
from service.bulk.row_thread import RowThread
from service.content import MAX_ITEM_ID_BYTES, ItemReader, digests_of
from service.errors import BrokenStream, InvalidItemId, ItemError, MalformedRequest, SemidError
from service.quoting import bare, listed

MEDIA_TYPE = "application/vnd.apache.arrow.stream"
ROWS_AT_ONCE = 4096  # the more, the less each costs, and the more embeddings share a prefix in the registry

_DISPLAY = "display"
_END = b"\xff\xff\xff\xff\0\0\0\0"
_ERROR = pa.struct([(name, pa.string()) for name in ("type", "title", "detail")])

_BEGINS_SPACE = np.isin(np.arange(256), [*range(33), 0xC2, 0xE1, 0xE2, 0xE3])
"""Whether white space of Unicode may begin with this byte in UTF-8."""

UseCase = Callable[[ItemColumns], Awaitable[AnswerColumns]]


def answer_schema(levels: int, origin: Mapping[str, str]) -> pa.Schema:
    """The columns of the answer; tokenizer and namespace stand in its metadata."""
    columns = [
        ("item_id", pa.string()),
        ("semantic_id", pa.string()),
        ("codes", pa.list_(pa.int32(), levels)),
        ("suffix", pa.int32()),
        ("created", pa.bool_()),
        ("content_changed", pa.bool_()),
        ("overflow", pa.bool_()),
        ("quantization_error", pa.float64()),
        ("margin", pa.float64()),
        ("group_size", pa.int64()),
        ("error", _ERROR),
    ]
    return pa.schema(columns, metadata=dict(origin))


class ArrowStream:
    """Record batches in, record batches out.

    Args:
        use_case: Answers the items of a slice.
        thread: Reads and writes the rows.
        reader: Of the tokenizer.
        levels: L.
        origin: Whose IDs these are.
        max_batch_bytes: Of one record batch.
        knows: Whether what comes is known, most likely, and takes no time of the model.
    """

    media_type = MEDIA_TYPE
    ahead_bytes = 0

    def __init__(
        self,
        use_case: UseCase,
        thread: RowThread,
        reader: ItemReader,
        levels: int,
        origin: Mapping[str, str],
        *,
        max_batch_bytes: int,
        knows: Callable[[], Awaitable[bool]],
    ) -> None:
        self._use_case = use_case
        self._thread = thread
        self._knows = knows
        self._reader = reader
        self._schema = answer_schema(levels, origin)
        self._max_batch_bytes = max_batch_bytes

    def begin(self) -> bytes:
        """The schema of the answer."""
        schema: bytes = self._schema.serialize().to_pybytes()
        return schema

    async def groups(
        self, chunks: AsyncIterator[bytes], allowance: Allowance
    ) -> AsyncIterator[tuple[pa.RecordBatch, int]]:
        """The rows of each record batch that has arrived whole, sliced; the last slice gives its room back.

        Every slice holds the whole message, and nothing here does while the next one is waited for.
        """
        schema = None
        async for message in messages(chunks, allowance, self._max_batch_bytes):
            size, rest = len(message), deque[pa.RecordBatch]()
            if schema is None:
                schema = read_schema(message)
                _check_schema(schema, self._reader)
            else:
                rest.append(await self._thread.run(read_batch, message, schema))
                if not rest[0].num_rows:
                    rest.clear()
            del message
            if not rest:
                allowance.give(size)
            while rest:
                rows = ROWS_AT_ONCE if "text" not in schema.names or await self._knows() else TEXTS_AT_ONCE
                yield _first(rest, rows), 0 if rest else size
        if schema is None:
            raise BrokenStream("it has no schema")

    def together(self, arrived: deque[tuple[pa.RecordBatch, int]]) -> tuple[pa.RecordBatch, int]:
        """The first alone: whoever writes record batches says how large."""
        return arrived.popleft()

    async def answer(self, group: pa.RecordBatch) -> bytes:
        """The answer to each row."""
        item_ids, schema = group.column("item_id"), self._schema
        if group.num_rows < ROWS_ON_THE_LOOP:
            return write_answers(item_ids, await self._use_case(read_columns(group, self._reader)), schema)
        columns = await self._thread.run(read_columns, group, self._reader)
        return await self._thread.run(write_answers, item_ids, await self._use_case(columns), schema)

    def end(self, problem: SemidError | None) -> bytes:
        """The end of the stream; before it a problem's own row."""
        if problem is None:
            return _END
        row = dict.fromkeys(self._schema.names) | {"error": problem.as_error()}
        return _message(pa.RecordBatch.from_pylist([row], schema=self._schema)) + _END


def _first(rest: deque[pa.RecordBatch], rows: int) -> pa.RecordBatch:
    """So many rows of a record batch, which are worked on together; what is left of it stays, if anything."""
    batch = rest.popleft()
    if batch.num_rows > rows:
        rest.append(batch.slice(rows))
    return batch.slice(0, rows)


def _check_schema(schema: pa.Schema, reader: ItemReader) -> None:
    """Raise MalformedRequest unless these are columns of items."""
    names = sorted(schema.names)
    if [name for name in names if name != _DISPLAY] not in (["item_id", "text"], ["embedding", "item_id"]):
        msg = f"the columns are item_id, and text or embedding, and display or not; these are {listed(schema.names)}"
        raise MalformedRequest(msg)
    if names.count(_DISPLAY) > 1:
        raise MalformedRequest("there are two columns display")
    for name in {"item_id", "text", _DISPLAY} & set(names):
        kind = schema.field(name).type
        if kind not in (pa.string(), pa.large_string()):
            raise MalformedRequest(f"{name} is a column of strings; this is {_named(kind)}")
    if "text" in names and not reader.shape.takes_text:
        raise MalformedRequest("this tokenizer takes embeddings only")
    if "embedding" in names:
        kind, wanted = schema.field("embedding").type, pa.list_(pa.float32(), reader.shape.dimension)
        if not pa.types.is_fixed_size_list(kind) or (kind.list_size, kind.value_type) != (
            wanted.list_size,
            wanted.value_type,
        ):
            raise MalformedRequest(f"embedding is a column of {_named(wanted)}; this is {_named(kind)}")


def _named(kind: pa.DataType) -> str:
    return bare(str(kind))


# Record batches -> columns -> record batches -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Texts:
    column: pa.Array
    digests: NDArray[np.uint64]

    def at(self, places: Places) -> list[str]:
        texts: list[str] = self.column.take(pa.array(places)).to_pylist()
        return texts


def read_columns(rows: pa.RecordBatch, reader: ItemReader) -> ItemColumns:
    """The items of a record batch.

    Rows that may be at fault are found by arrays; what is wrong with them, if anything, says the reader of JSON items.
    """
    ids = rows.column("item_id")
    kind = "text" if "text" in rows.schema.names else "embedding"
    column = rows.column(kind)
    item_ids = _binary(ids)
    doubted = np.fromiter((not 1 <= len(item_id) <= MAX_ITEM_ID_BYTES for item_id in item_ids), np.bool_, len(item_ids))
    doubted |= _has_nul(item_ids)
    if kind == "text":
        raw = _binary(column)
        contents: _Texts | EmbeddingColumn = _Texts(column, digests_of("text", raw))
        lengths = np.fromiter(map(len, raw), np.int64, len(raw))
        first = np.frombuffer(b"".join([text[:1] or b" " for text in raw]), np.uint8)
        doubted |= (lengths > reader.max_text_bytes) | _BEGINS_SPACE[first] | _has_nul(raw)
    else:
        matrix, missing = _matrix(column, reader.shape.dimension)
        contents = EmbeddingColumn(matrix)
        doubted |= missing | contents.doubtful
    failures: dict[int, ItemError] = {}
    for i in np.flatnonzero(doubted).tolist():
        try:
            reader.read({"item_id": ids[i].as_py(), kind: _content(column, contents, i)})
        except ItemError as error:
            failures[i] = error
    return ItemColumns(item_ids, contents, failures, _displays(rows, reader))


def _content(column: pa.Array, contents: _Texts | EmbeddingColumn, place: int) -> object:
    """What stands in a row, as in a JSON item; whole embeddings in base64, of which not every number is an object."""
    row = column[place]
    if isinstance(contents, _Texts) or not row.is_valid or row.values.null_count:
        return row.as_py()
    return b64encode(contents.matrix[place].astype("<f4", copy=False)).decode()


def _displays(rows: pa.RecordBatch, reader: ItemReader) -> dict[int, str]:
    """The titles to keep, by their rows; where none are kept, they are not looked at."""
    if not reader.keeps_displays or _DISPLAY not in rows.schema.names:
        return {}
    shown = map(reader.display, rows.column(_DISPLAY).to_pylist())
    return {i: display for i, display in enumerate(shown) if display is not None}


def _binary(column: pa.Array) -> list[bytes]:
    """UTF-8 of each row; nothing where it is null."""
    return [value or b"" for value in column.cast(pa.binary()).to_pylist()]


def _has_nul(values: list[bytes]) -> NDArray[np.bool_] | bool:
    """Which have a NUL byte; it is rare, so all are searched together first."""
    if b"\0" not in b"".join(values):
        return False
    return np.fromiter((b"\0" in value for value in values), np.bool_, len(values))


def _matrix(column: pa.FixedSizeListArray, dimension: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Embeddings (B, D), and which rows (B,) are null or have a null in them; zeros stand there."""
    numbers = column.values.slice(column.offset * dimension, len(column) * dimension)
    missing = np.zeros(len(column), np.bool_)
    if column.null_count:
        missing |= column.is_null().to_numpy(zero_copy_only=False)
    if numbers.null_count:
        missing |= numbers.is_null().to_numpy(zero_copy_only=False).reshape(-1, dimension).any(axis=1)
        numbers = numbers.fill_null(0.0)
    return numbers.to_numpy().reshape(-1, dimension), missing


def write_answers(item_ids: pa.Array, answers: AnswerColumns, schema: pa.Schema) -> bytes:
    """The answers as a record batch's message."""
    failed = np.zeros(len(item_ids), np.bool_)
    failed[list(answers.failures)] = True
    without = failed | (answers.suffixes < 0)
    codes = pa.array(answers.codes.reshape(-1))
    columns = {
        "item_id": _said(item_ids.cast(pa.string()), answers.failures),
        "semantic_id": _semantic_ids(answers, without),
        "codes": pa.FixedSizeListArray.from_arrays(codes, type=schema.field("codes").type, mask=pa.array(failed)),
        "suffix": pa.array(answers.suffixes.astype(np.int32), mask=without),
        "created": pa.array(answers.created, mask=failed),
        "content_changed": pa.array(answers.content_changed, mask=failed),
        "overflow": pa.array(answers.overflow, mask=failed),
        "quantization_error": pa.array(answers.quantization_errors, mask=np.isnan(answers.quantization_errors)),
        "margin": pa.array(answers.margins, mask=np.isnan(answers.margins)),
        "group_size": pa.array(answers.group_sizes, mask=answers.group_sizes < 0),
        "error": _errors(answers.failures, len(item_ids)),
    }
    return _message(pa.RecordBatch.from_arrays([columns[name] for name in schema.names], schema=schema))


def _message(batch: pa.RecordBatch) -> bytes:
    message: bytes = batch.serialize().to_pybytes()
    return message


def _semantic_ids(answers: AnswerColumns, without: NDArray[np.bool_]) -> pa.Array:
    numbers = [pa.array(level).cast(pa.string()) for level in answers.codes.T]
    suffixes = pa.array(answers.suffixes, mask=without).cast(pa.string())  # where it is null, so is the ID
    joined = pc.binary_join_element_wise(*numbers, suffixes, "-")
    if not answers.semantic_ids:
        return joined
    values = joined.to_pylist()
    for place, semantic_id in answers.semantic_ids.items():
        values[place] = semantic_id
    return pa.array(values, pa.string())


def _said(item_ids: pa.Array, failures: Mapping[int, ItemError]) -> pa.Array:
    """The item ids; null where one is none."""
    unsaid = [place for place, error in failures.items() if isinstance(error, InvalidItemId)]
    if not unsaid:
        return item_ids
    mask = np.zeros(len(item_ids), np.bool_)
    mask[unsaid] = True
    return pc.if_else(pa.array(mask), pa.scalar(None, pa.string()), item_ids)


def _errors(failures: Mapping[int, ItemError], rows: int) -> pa.Array:
    if not failures:
        return pa.nulls(rows, _ERROR)
    values: list[dict[str, Any] | None] = [None] * rows
    for place, error in failures.items():
        values[place] = error.as_error()
    return pa.array(values, _ERROR)

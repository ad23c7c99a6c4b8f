"""JSON items as columns: what the items of a large request need by arrays, as Arrow's have it (`columns`).

    entries --read_entries--> columns --use case--> columns --write_entries--> entries

Embeddings are looked at all together. Any other entry is read as one of a small request is, and what is wrong with an
entry says that reader alone. Texts beside embeddings, and few items, go the way of small requests.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
import orjson
from numpy.typing import NDArray

from service.answers import Answer, Entry, failed
from service.batching.lanes import SMALL_ROWS
from service.bulk.column_tokenization import ColumnTokenization
from service.bulk.columns import AnswerColumns, EmbeddingColumn, ItemColumns, TextColumn
from service.bulk.json_rows import write_rows
from service.bulk.row_thread import RowThread
from service.content import MAX_ITEM_ID_BYTES, Item, ItemReader, bytes_of_base64, rows_of_base64
from service.errors import ItemError
from service.schemas import TokenizeOptions, TokenizeRequest
from service.tokenization import Tokenization
from service.tokenizers import LoadedTokenizer

FEW = SMALL_ROWS  # cost less one by one

_Parts = tuple[bytes, bytes, str | None]
"""An item id, little-endian float32, a title."""


class EntryTokenization:
    """`Tokenization` of JSON items, of many by columns."""

    def __init__(self, tokenization: Tokenization, columns: ColumnTokenization, thread: RowThread) -> None:
        self._tokenization = tokenization
        self._columns = columns
        self._thread = thread

    async def tokenize(self, request: TokenizeRequest) -> Answer:
        """Answer `POST /tokenize`: an entry per item, in order.

        Raises:
            ServiceError: A fault of the whole request.
        """
        tokenizer = self._tokenization.admitted(request)
        return {**tokenizer.origin(request.namespace), "items": await self.entries(tokenizer, request, request.items)}

    async def entries(
        self, tokenizer: LoadedTokenizer, options: TokenizeOptions, entries: Sequence[object], *, patient: bool = False
    ) -> Sequence[Entry]:
        """An entry of the answer for each of a request, or of a part of a stream, in order; `patient` is a stream's.

        Raises:
            ServiceError: They all fail.
        """
        columns = None
        if len(entries) > FEW:
            columns = await self._thread.run(read_entries, entries, tokenizer.reader, digests=options.assign)
        if columns is None:
            return await self._tokenization.entries(tokenizer, options, entries)
        answers = await self._columns.answer(tokenizer, options, columns, patient=patient)
        return await self._thread.run(write_entries, entries, columns, answers)


# Entries -> columns --------------------------------------------------------------------------------------------------


def read_entries(entries: Sequence[object], reader: ItemReader, *, digests: bool = False) -> ItemColumns | None:
    """The items of JSON entries; None where there are texts and embeddings.

    Args:
        entries: As parsed.
        reader: Of the tokenizer.
        digests: Whether to compute those of embeddings too.
    """
    plain = _PlainReader(reader.shape.dimension, entries)
    nothing = bytes(plain.width)
    item_ids: list[bytes] = []
    raws: list[bytes] = []
    displays: dict[int, str] = {}
    others: dict[int, Item | ItemError] = {}
    for place, entry in enumerate(entries):
        parts = plain.read(place, entry)
        if parts is None:
            others[place] = item = _read(entry, reader)
            parts = _parts(item, nothing)
        item_id, raw, display = parts
        item_ids.append(item_id)
        raws.append(raw)
        if display is not None and reader.keeps_displays:
            displays[place] = display
    items = [item for item in others.values() if isinstance(item, Item)]
    failures = {place: item for place, item in others.items() if isinstance(item, ItemError)}
    texts = sum(isinstance(item.content, str) for item in items)
    if texts and texts + len(failures) < len(entries):
        return None
    if texts:
        return ItemColumns(item_ids, TextColumn.of(list(others.values())), failures, displays)
    matrix = np.frombuffer(b"".join(raws), "<f4").reshape(len(entries), -1).astype(np.float32, copy=False)
    column = EmbeddingColumn(matrix)
    doubtful = column.doubtful | plain.may_hold_booleans(matrix)
    for place in np.flatnonzero(doubtful).tolist():
        if place not in failures and isinstance(item := _read(entries[place], reader), ItemError):
            failures[place] = item
    if digests:
        _ = column.digests
    return ItemColumns(item_ids, column, failures, displays)


class _PlainReader:
    """Reads those of the entries that have an item id, an embedding of `dimension` numbers, and a title or none."""

    def __init__(self, dimension: int, entries: Sequence[object]) -> None:
        self.width = 4 * dimension
        self._written = 4 * -(-self.width // 3)  # characters of base64
        self._dimension = dimension
        self._floats = struct.Struct(f"<{dimension}f")
        self._lists = False
        self._decoded = self._decode(entries)

    def read(self, place: int, entry: object) -> _Parts | None:
        """The parts of an entry, as parsed; None where it is none of these."""
        if not isinstance(entry, dict):
            return None
        item_id, content, display = entry.get("item_id"), entry.get("embedding"), entry.get("display")
        if len(entry) != 2 and not (len(entry) == 3 and isinstance(display, str)):
            return None
        if not isinstance(item_id, str):
            return None
        try:
            name, raw = item_id.encode(), self._decoded.get(place) or self._raw(content)
        except (ValueError, OverflowError, struct.error):  # lone surrogates, no base64; beyond float32, no numbers
            return None
        if not 1 <= len(name) <= MAX_ITEM_ID_BYTES or b"\0" in name or len(raw) != self.width:
            return None
        return name, raw, display

    def _decode(self, entries: Sequence[object]) -> dict[int, bytes]:
        """Little-endian float32 of those in base64, by their places; of none where one of them is at fault."""
        written: dict[int, str] = {}
        for place, entry in enumerate(entries):
            content = entry.get("embedding") if isinstance(entry, dict) else None
            if isinstance(content, str) and len(content) == self._written:
                written[place] = content
        rows = rows_of_base64(list(written.values()), self.width)
        return {} if rows is None else dict(zip(written, rows, strict=True))

    def _raw(self, content: object) -> bytes:
        """Little-endian float32 of base64 or a list; nothing of anything else."""
        if isinstance(content, str):
            return bytes_of_base64(content) if len(content) == self._written else b""
        if not isinstance(content, list) or len(content) != self._dimension:
            return b""
        self._lists = True
        return self._floats.pack(*content)

    def may_hold_booleans(self, matrix: NDArray[np.float32]) -> NDArray[np.bool_] | bool:
        """Which embeddings (B, D) may come of lists with booleans, which are 0 and 1 here."""
        return self._lists and ((matrix == 0) | (matrix == 1)).any(axis=1)


def _read(entry: object, reader: ItemReader) -> Item | ItemError:
    try:
        return reader.read(entry)
    except ItemError as error:
        return error


def _parts(item: Item | ItemError, nothing: bytes) -> _Parts:
    """The parts of any entry; nothing where it has no embedding."""
    if isinstance(item, ItemError):
        return b"", nothing, None
    raw = nothing if isinstance(item.content, str) else item.content.astype("<f4", copy=False).tobytes()
    return item.item_id.encode(), raw, item.display


# Columns -> entries --------------------------------------------------------------------------------------------------


def write_entries(entries: Sequence[object], columns: ItemColumns, answers: AnswerColumns) -> list[Entry]:
    """An entry for each of the request's: its answer, or its own error."""
    written: list[Entry] = [orjson.Fragment(row) for row in write_rows(columns.item_ids, answers)]
    for place, error in answers.failures.items():
        written[place] = failed(entries[place], error)
    return written

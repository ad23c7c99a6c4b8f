"""JSON items as columns: what the items of a large request need by arrays, as Arrow's have it (`columns`).

    entries --read_entries--> columns --use case--> columns --write_entries--> entries

Embeddings as base64 are looked at all together. Any other entry is read as one of a small request is, and what is wrong
with an entry says that reader alone. Texts beside embeddings, and few items, go the way of small requests.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from service.answers import Answer, in_order
from service.bulk.columns import AnswerColumns, ColumnTokenization, EmbeddingColumn, ItemColumns, Places
from service.content import MAX_ITEM_ID_BYTES, Item, ItemReader, digest_of
from service.errors import ItemError
from service.schemas import TokenizeOptions, TokenizeRequest
from service.semantic_id import SemanticId
from service.tokenization import Tokenization
from service.tokenizers import LoadedTokenizer

FEW = 16  # cost less one by one
_NOTHING = b""


class EntryTokenization:
    """`Tokenization` of JSON items, of many by columns."""

    def __init__(self, tokenization: Tokenization, columns: ColumnTokenization) -> None:
        self._tokenization = tokenization
        self._columns = columns

    async def tokenize(self, request: TokenizeRequest) -> Answer:
        """Answer `POST /tokenize`: an entry per item, in order.

        Raises:
            ServiceError: A fault of the whole request.
        """
        tokenizer = self._tokenization.admitted(request)
        return {**tokenizer.origin(request.namespace), "items": await self.entries(tokenizer, request, request.items)}

    async def entries(
        self, tokenizer: LoadedTokenizer, options: TokenizeOptions, entries: Sequence[object]
    ) -> list[Answer]:
        """An entry of the answer for each of a request, or of a part of a stream, in order.

        Raises:
            ServiceError: They all fail.
        """
        columns = None
        if len(entries) >= FEW:
            columns = await asyncio.to_thread(read_entries, entries, tokenizer.reader)
        if columns is None:
            return await self._tokenization.entries(tokenizer, options, entries)
        answers = await self._columns.answer(tokenizer, options, columns)
        return await asyncio.to_thread(write_entries, entries, columns, answers)


# Entries -> columns --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Texts:
    by_place: Mapping[int, str]

    def at(self, places: Places) -> list[str]:
        return [self.by_place[place] for place in places.tolist()]


class _Columns:
    """Columns while they grow, an entry at a time."""

    def __init__(self) -> None:
        self.item_ids: list[bytes] = []
        self.digests: list[bytes] = []
        self.embeddings: dict[int, bytes] = {}
        self.texts: dict[int, str] = {}
        self.failures: dict[int, ItemError] = {}
        self.displays: dict[int, str] = {}

    def add(self, item: Item) -> None:
        self._show(item.display)
        if isinstance(item.content, str):
            self.texts[len(self.item_ids)] = item.content
        else:
            self.embeddings[len(self.item_ids)] = item.content.astype("<f4", copy=False).tobytes()
        self.item_ids.append(item.item_id.encode())
        self.digests.append(item.digest)

    def add_embedding(self, item_id: bytes, raw: bytes, display: str | None) -> None:
        self._show(display)
        self.embeddings[len(self.item_ids)] = raw
        self.item_ids.append(item_id)
        self.digests.append(digest_of("embedding", raw))

    def _show(self, display: str | None) -> None:
        if display is not None:
            self.displays[len(self.item_ids)] = display

    def fail(self, error: ItemError) -> None:
        self.failures[len(self.item_ids)] = error
        self.item_ids.append(_NOTHING)
        self.digests.append(bytes(8))


def read_entries(entries: Sequence[object], reader: ItemReader) -> ItemColumns | None:
    """The items of JSON entries; None where there are texts and embeddings."""
    found, width = _Columns(), 4 * reader.shape.dimension
    written = len(base64.b64encode(bytes(width)))
    for entry in entries:
        if raw := _embedding(entry, written, width):
            found.add_embedding(raw.item_id, raw.raw, reader.display(raw.display))
            continue
        try:
            found.add(reader.read(entry))
        except ItemError as error:
            found.fail(error)
    if found.texts and found.embeddings:
        return None
    digests = np.frombuffer(b"".join(found.digests), np.uint64)
    if found.texts:
        return ItemColumns(found.item_ids, digests, _Texts(found.texts), found.failures, found.displays)
    data = b"".join([found.embeddings.get(place) or bytes(width) for place in range(len(entries))])
    column = EmbeddingColumn(np.frombuffer(data, "<f4").reshape(len(entries), -1).astype(np.float32, copy=False))
    for place in np.flatnonzero(column.doubtful).tolist():
        if place not in found.failures:
            try:
                reader.read(entries[place])
            except ItemError as error:
                found.failures[place] = error
    return ItemColumns(found.item_ids, digests, column, found.failures, found.displays)


class _Embedding(NamedTuple):
    item_id: bytes
    raw: bytes
    display: str | None


def _embedding(entry: object, written: int, width: int) -> _Embedding | None:
    """The item id and the little-endian float32 of an entry that has just these, and a title or none; else None.

    Args:
        entry: As parsed.
        written: The characters of base64 that an embedding has.
        width: Its bytes.
    """
    if not isinstance(entry, dict):
        return None
    item_id, content, display = entry.get("item_id"), entry.get("embedding"), entry.get("display")
    if len(entry) != 2 and not (len(entry) == 3 and isinstance(display, str)):
        return None
    if not isinstance(content, str) or len(content) != written or not isinstance(item_id, str):
        return None
    try:
        name, raw = item_id.encode(), binascii.a2b_base64(content, strict_mode=True)
    except ValueError:  # lone surrogates, no base64
        return None
    if not 1 <= len(name) <= MAX_ITEM_ID_BYTES or b"\0" in name or len(raw) != width:
        return None
    return _Embedding(name, raw, display)


# Columns -> entries --------------------------------------------------------------------------------------------------


def write_entries(entries: Sequence[object], columns: ItemColumns, answers: AnswerColumns) -> list[Answer]:
    """An entry for each of the request's: its answer, or its own error."""
    levels = answers.codes.shape[1]
    tokens = " ".join(SemanticId((0,) * levels, 0).tokens).replace("_0>", "_%d>")
    semantic_id = "-".join(["%d"] * (levels + 1))
    rows = zip(
        columns.item_ids,
        answers.codes.tolist(),
        answers.suffixes.tolist(),
        answers.created.tolist(),
        answers.content_changed.tolist(),
        answers.quantization_errors.tolist(),
        answers.margins.tolist(),
        strict=True,
    )
    found: dict[int, Answer] = {}
    for place, (item_id, codes, suffix, created, content_changed, error, margin) in enumerate(rows):
        numbers = (*codes, suffix)
        found[place] = {
            "item_id": item_id.decode(),
            "semantic_id": semantic_id % numbers,
            "codes": codes,
            "suffix": suffix,
            "tokens": (tokens % numbers).split(" "),
            "created": created,
            "content_changed": content_changed,
            "quantization_error": error if error == error else None,  # noqa: PLR0124 - NaN where nothing was computed
            "margin": margin if margin == margin else None,  # noqa: PLR0124
        }
    for place in np.flatnonzero(answers.overflow).tolist():
        found[place]["overflow"] = True
    for place in np.flatnonzero(answers.suffixes < 0).tolist():
        found[place] |= {"semantic_id": None, "suffix": None, "tokens": None}
    for place in np.flatnonzero(answers.group_sizes >= 0).tolist():
        found[place]["group_size"] = int(answers.group_sizes[place])
    for place, text in answers.semantic_ids.items():
        names = (tokens % tuple(map(int, text.split("-")))).split(" ") if text else None
        found[place] |= {"semantic_id": text, "tokens": names}
    for place in answers.failures:
        del found[place]
    return in_order(entries, found, answers.failures)

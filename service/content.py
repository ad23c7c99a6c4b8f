"""One entry of a request -> an item with its content, or the error that says what is wrong with it (P7)."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Protocol

import numpy as np
import pybase64
from numpy.typing import NDArray

from models import TextTemplate
from models.catalogue import CatalogueItem
from service.errors import InvalidContent, InvalidEmbedding, InvalidItem, InvalidItemId, InvalidText, ItemError
from service.quoting import listed

MAX_ITEM_ID_BYTES = 256
DIGEST_BYTES = 8
KINDS = ("text", "fields", "embedding")
MEMBERS = frozenset({"item_id", "display", *KINDS})

_FLOAT32, _LITTLE_FLOAT32 = np.dtype(np.float32), np.dtype("<f4")
_DIGESTS = {kind: blake2b(digest_size=DIGEST_BYTES, person=kind.encode()) for kind in ("text", "embedding")}


class ContentShape(Protocol):
    """What content a tokenizer takes."""

    @property
    def template(self) -> TextTemplate:
        """Puts fields together."""

    @property
    def dimension(self) -> int:
        """D, the width of an embedding."""

    @property
    def takes_text(self) -> bool:
        """Whether there is a text encoder."""


@dataclass(frozen=True, slots=True)
class Item:
    """A valid item.

    Attributes:
        item_id: 1 to 256 bytes of UTF-8.
        content: The text, or the embedding (D,) float32.
        digest: Of the content; equal content of equal kind has an equal digest, fields count as their text.
        display: The title to keep; an empty one is none from now on. None: that which there is stands.
    """

    item_id: str
    content: str | NDArray[np.float32]
    digest: bytes
    display: str | None = None


class ItemReader:
    """Reads entries for one tokenizer.

    Attributes:
        shape: What content the tokenizer takes.
        max_text_bytes: UTF-8 bytes of one text, at most.
        keeps_displays: Whether titles are kept.
    """

    def __init__(self, shape: ContentShape, *, max_text_bytes: int, keeps_displays: bool = False) -> None:
        self.shape = shape
        self.max_text_bytes = max_text_bytes
        self.keeps_displays = keeps_displays

    def read(self, entry: object) -> Item:
        """The item of a JSON entry; what could not even be parsed is its own error.

        Raises:
            ItemError: What is wrong with it.
        """
        if isinstance(entry, ItemError):
            raise entry
        if not isinstance(entry, dict):
            msg = f"an item is an object, this is {_kind_of(entry)}"
            raise InvalidItem(msg)
        if not entry.keys() <= MEMBERS:
            msg = f"unknown members: {listed(sorted(entry.keys() - MEMBERS))}"
            raise InvalidItem(msg)
        item_id = read_item_id(entry.get("item_id"))
        given = [kind for kind in KINDS if entry.get(kind) is not None]
        if len(given) != 1:
            msg = f"given: {' and '.join(given)}" if given else "none is given"
            raise InvalidContent(msg)
        content = self._embedding(entry["embedding"]) if given == ["embedding"] else self._text(entry)
        return Item(item_id, content, _digest(content), self.display(entry.get("display")))

    def display(self, value: object) -> str | None:
        """A title to keep; None where none are kept.

        Raises:
            InvalidItem: It is no text.
        """
        if value is None:
            return None
        if not isinstance(value, str):
            msg = f"display is a string, this is {_kind_of(value)}"
            raise InvalidItem(msg)
        return value if self.keeps_displays else None

    def _text(self, entry: Mapping[str, Any]) -> str:
        if not self.shape.takes_text:
            msg = "this tokenizer takes embeddings only"
            raise InvalidText(msg)
        text = entry.get("text")
        if text is None:
            text = self.shape.template.render(_fields(entry["fields"], self.shape.template))
        if not isinstance(text, str):
            msg = f"text is a string, this is {_kind_of(text)}"
            raise InvalidText(msg)
        if not text.strip():
            known = ", ".join(self.shape.template.fields)
            msg = "it is empty" if entry.get("text") is not None else f"none of the fields {known} has content"
            raise InvalidText(msg)
        size = len(_utf8(text, InvalidText))
        if size > self.max_text_bytes:
            msg = f"it has {size} bytes of UTF-8, at most {self.max_text_bytes} are taken"
            raise InvalidText(msg)
        return text

    def _embedding(self, value: object) -> NDArray[np.float32]:
        vector = _from_base64(value) if isinstance(value, str) else _from_list(value)
        if vector.shape != (self.shape.dimension,):
            msg = f"it has {vector.size} numbers, this tokenizer takes {self.shape.dimension}"
            raise InvalidEmbedding(msg)
        if 0 < float(np.vdot(vector, vector)) < math.inf:  # a fraction of the time that the two questions take
            return vector
        if not np.isfinite(vector).all():
            msg = "it has NaN or infinity, or a number beyond float32"
            raise InvalidEmbedding(msg)
        if not vector.any():
            msg = "it is the zero vector"
            raise InvalidEmbedding(msg)
        return vector


def entry_of(item: CatalogueItem) -> dict[str, Any]:
    """A catalogue's row as an entry, of which `ItemReader` makes an item."""
    if item.text is not None:
        return {"item_id": item.item_id, "text": item.text}
    return {"item_id": item.item_id, "fields": dict(item.fields)}


def read_item_id(value: object) -> str:
    """An item id as given.

    Raises:
        InvalidItemId: It is not 1 to 256 bytes of UTF-8 text.
    """
    if value is None:
        msg = "it is missing"
        raise InvalidItemId(msg)
    if not isinstance(value, str):
        msg = f"it is {_kind_of(value)}, not a string"
        raise InvalidItemId(msg)
    size = len(_utf8(value, InvalidItemId))
    if not 1 <= size <= MAX_ITEM_ID_BYTES:
        msg = f"it has {size} bytes of UTF-8, an item id has 1 to {MAX_ITEM_ID_BYTES}"
        raise InvalidItemId(msg)
    return value


def _fields(value: object, template: TextTemplate) -> dict[str, str | Sequence[str] | None]:
    """The fields of an item, each a string or a list of strings."""
    if not isinstance(value, dict):
        msg = f"fields is an object, this is {_kind_of(value)}"
        raise InvalidText(msg)
    for name in template.fields:
        field = value.get(name)
        is_list = isinstance(field, list) and all(isinstance(part, str) for part in field)
        if not (field is None or isinstance(field, str) or is_list):
            msg = f"the field {name} is {_kind_of(field)}, not a string or a list of strings"
            raise InvalidText(msg)
    return value


def _utf8(text: str, error: type[InvalidText | InvalidItemId]) -> bytes:
    if "\0" in text:
        msg = "it has a NUL byte"
        raise error(msg)
    try:
        return text.encode()
    except UnicodeEncodeError as fault:
        msg = f"it has a lone surrogate at position {fault.start}"
        raise error(msg) from fault


def _from_base64(value: str) -> NDArray[np.float32]:
    try:
        raw = bytes_of_base64(value)
    except ValueError as fault:
        msg = f"it is not base64: {fault}"
        raise InvalidEmbedding(msg) from fault
    if len(raw) % 4:
        msg = f"its base64 holds {len(raw)} bytes, not a multiple of 4"
        raise InvalidEmbedding(msg)
    return np.frombuffer(raw, _LITTLE_FLOAT32).astype(_FLOAT32, copy=False)


def bytes_of_base64(value: str) -> bytes:
    """What base64 stands for.

    Raises:
        ValueError: It is none, or not all of it.
    """
    try:
        raw: bytes = pybase64.b64decode(value, None, True)
    except ValueError:
        return base64.b64decode(value, validate=True)  # which says what is wrong in the standard library's words
    return raw


def rows_of_base64(values: Sequence[str], width: int) -> list[bytes] | None:
    """What base64 of `width` bytes each stands for, decoded at once; None where any is no such.

    At each call the decoder gives the interpreter to other threads, which may keep it for longer than it takes.
    """
    padding, length = -width % 3, 4 * -(-width // 3)
    if any(len(value) != length for value in values):
        return None
    if padding:
        if not all(value.endswith("=" * padding) for value in values):
            return None
        values = [value[:-padding] + "A" * padding for value in values]
    try:
        data: bytes = pybase64.b64decode("".join(values), None, True)
    except ValueError:
        return None
    step = width + padding
    if len(data) != len(values) * step:
        return None
    return [data[start : start + width] for start in range(0, len(data), step)]


def _from_list(value: object) -> NDArray[np.float32]:
    if not isinstance(value, list):
        msg = f"it is {_kind_of(value)}, not a list of numbers or base64"
        raise InvalidEmbedding(msg)
    if not {*map(type, value)} <= {float, int}:
        msg = "it has members that are not numbers"
        raise InvalidEmbedding(msg)
    try:
        with np.errstate(over="ignore"):
            return np.array(value, dtype=np.float64).astype(np.float32)
    except OverflowError as fault:
        msg = "it has a number beyond float32"
        raise InvalidEmbedding(msg) from fault


def _digest(content: str | NDArray[np.float32]) -> bytes:
    if isinstance(content, str):
        return digest_of("text", content.encode())
    return digest_of("embedding", content.astype(_LITTLE_FLOAT32, copy=False).data)


def digest_of(kind: str, raw: bytes | memoryview) -> bytes:
    """The digest of content of one kind: of UTF-8, or of little-endian float32."""
    digest = _DIGESTS[kind].copy()
    digest.update(raw)
    return digest.digest()


def digests_of(kind: str, raws: Iterable[bytes | memoryview]) -> NDArray[np.uint64]:
    """The digests (B,) of contents of one kind, in the bytes' own order."""
    return np.frombuffer(b"".join([digest_of(kind, raw) for raw in raws]), np.uint64)


def _kind_of(value: object) -> str:
    """A JSON value's kind, for error texts."""
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list"}
    return names.get(type(value), "an object")

"""Items and their answers as columns: an array for each of their parts, so that many cost no object each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from service.answers import Answer
from service.batching.jobs import Contents
from service.content import DIGEST_BYTES, Item, digests_of
from service.errors import ItemError

Places = NDArray[np.int64]

ROWS_ON_THE_LOOP = 16  # a thread costs as much as reading these
TEXTS_AT_ONCE = 1024  # some seconds of a processor's time; they have their IDs before the next ones are queued

_NO_DIGEST = bytes(DIGEST_BYTES)


class ContentColumn(Protocol):
    """The content of many items."""

    @property
    def digests(self) -> NDArray[np.uint64]:
        """Of each (B,), in the bytes' own order."""

    def at(self, places: Places) -> Contents:
        """The texts, or the embeddings (n, D) float32, at these places."""


@dataclass(frozen=True)
class TextColumn:
    """Texts, and their digests (B,); nothing of an item that failed."""

    texts: Sequence[str]
    digests: NDArray[np.uint64]

    @classmethod
    def of(cls, read: Sequence[Item | ItemError]) -> TextColumn:
        """Those of items of texts."""
        items = [item if isinstance(item, Item) else None for item in read]
        texts = [str(item.content) if item else "" for item in items]
        return cls(texts, np.frombuffer(b"".join([item.digest if item else _NO_DIGEST for item in items]), np.uint64))

    def at(self, places: Places) -> list[str]:
        """Those at these places."""
        return [self.texts[place] for place in places.tolist()]


@dataclass(frozen=True)
class EmbeddingColumn:
    """Embeddings (B, D) float32."""

    matrix: NDArray[np.float32]

    @cached_property
    def digests(self) -> NDArray[np.uint64]:
        """Of each (B,): half of the time that reading them takes, and few of a dry run's are needed."""
        data = np.ascontiguousarray(self.matrix, "<f4").data.cast("B")
        width = 4 * self.matrix.shape[1]
        return digests_of("embedding", (data[start : start + width] for start in range(0, len(data), width)))

    @property
    def doubtful(self) -> NDArray[np.bool_]:
        """Which (B,) have to be looked at alone: all that cannot be tokenized are among them.

        That are those with a number that is not finite, and zero vectors. The squares tell in one look; float32 cannot
        hold those of tiny and huge numbers, so that sound rows of such are doubtful too.
        """
        with np.errstate(all="ignore"):
            squares = np.einsum("ij,ij->i", self.matrix, self.matrix)
        sound: NDArray[np.bool_] = (squares > 0) & (squares < np.inf)
        return ~sound

    def at(self, places: Places) -> NDArray[np.float32]:
        """Those at these places; all of them as they are."""
        return self.matrix if len(places) == len(self.matrix) else self.matrix[places]


@dataclass(frozen=True)
class ItemColumns:
    """Items, by their places; where one failed, its other columns say nothing.

    Attributes:
        item_ids: UTF-8.
        contents: What is tokenized.
        failures: What is wrong with items.
        displays: The titles to keep, of items that have one.
    """

    item_ids: Sequence[bytes]
    contents: ContentColumn
    failures: Mapping[int, ItemError]
    displays: Mapping[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        """B."""
        return len(self.item_ids)

    @property
    def digests(self) -> NDArray[np.uint64]:
        """(B,). Of the contents, in the bytes' own order; computed when they are first asked for."""
        return self.contents.digests

    @property
    def has_digests(self) -> bool:
        """Whether they are computed, or were given."""
        return "digests" in vars(self.contents)

    def items(self, places: Places) -> dict[int, Item]:
        """The items at these places, one by one."""
        contents = self.contents.at(places)
        return {
            i: Item(self.item_ids[i].decode(), content, self.digests[i].tobytes())
            for i, content in zip(places.tolist(), contents, strict=True)
        }

    def named(self, displays: Mapping[int, str]) -> dict[bytes, str]:
        """Titles by item id; the last of an item that stands twice."""
        return {self.item_ids[place]: display for place, display in displays.items()}

    def once(self) -> NDArray[np.bool_]:
        """Which places have a valid item whose id stands at no other."""
        valid = np.ones(len(self), np.bool_)
        valid[list(self.failures)] = False
        if len(set(self.item_ids)) < len(self):
            _, inverse, counts = np.unique(
                np.array(self.item_ids, dtype=object), return_inverse=True, return_counts=True
            )
            valid &= counts[inverse] == 1
        return valid


@dataclass
class AnswerColumns:
    """The answers to items, by their places; where an item failed, its other columns say nothing.

    Attributes:
        codes: (B, L) int32.
        suffixes: (B,) int64; -1 in a dry run of an item without one.
        created: (B,) bool.
        content_changed: (B,) bool.
        overflow: (B,) bool.
        quantization_errors: (B,) float64; NaN where nothing had to be computed.
        margins: (B,) float64; the same.
        group_sizes: (B,) int64; -1 but for a dry run.
        semantic_ids: Those of a dry run, whose codes may be others.
        failures: What is wrong with items.
    """

    codes: NDArray[np.int32]
    suffixes: NDArray[np.int64]
    created: NDArray[np.bool_]
    content_changed: NDArray[np.bool_]
    overflow: NDArray[np.bool_]
    quantization_errors: NDArray[np.float64]
    margins: NDArray[np.float64]
    group_sizes: NDArray[np.int64]
    semantic_ids: dict[int, str | None] = field(default_factory=dict)
    failures: dict[int, ItemError] = field(default_factory=dict)

    @classmethod
    def empty(cls, rows: int, levels: int) -> AnswerColumns:
        """Nothing yet."""
        return cls(
            codes=np.zeros((rows, levels), np.int32),
            suffixes=np.full(rows, -1),
            created=np.zeros(rows, np.bool_),
            content_changed=np.zeros(rows, np.bool_),
            overflow=np.zeros(rows, np.bool_),
            quantization_errors=np.full(rows, np.nan),
            margins=np.full(rows, np.nan),
            group_sizes=np.full(rows, -1),
        )

    def put(self, place: int, answer: Answer) -> None:
        """One answer, as a JSON body's."""
        self.codes[place] = answer["codes"]
        self.suffixes[place] = -1 if answer["suffix"] is None else answer["suffix"]
        self.created[place] = answer["created"]
        self.content_changed[place] = answer["content_changed"]
        self.overflow[place] = answer.get("overflow", False)
        self.quantization_errors[place] = _or_nan(answer["quantization_error"])
        self.margins[place] = _or_nan(answer["margin"])
        self.group_sizes[place] = answer.get("group_size", -1)
        if "group_size" in answer:  # of a dry run: the ID may have other codes
            self.semantic_ids[place] = answer["semantic_id"]


def _or_nan(value: Any) -> float:
    return np.nan if value is None else float(value)

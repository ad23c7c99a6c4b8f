"""What is trained on: catalogue files and their embeddings, or arrays of embeddings, row by row in the files' order.

Files of any size: rows are read, and texts embedded, batch by batch into a file that is then mapped. Memory holds a
batch and some bytes of each row: where its text lies, its weight, its item id where that is asked for.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from models import catalogue
from models.embedding_cache import embed_stream
from models.embedding_files import embedding_batches
from models.left_out import is_left_out, left_out_rows, text_digest
from models.template import TextTemplate
from models.text_encoder import TextEncoder, TextEncoderConfig
from models.training.spool import RowSpool, TextSpool


@dataclass(frozen=True)
class Reading:
    """How catalogues are read for training.

    Attributes:
        template: Fields -> text.
        balance_by: A column of the catalogue; rows are weighted so that a value with n rows counts n^balance. A file
            without the column counts as one value. None: all rows alike.
        balance: 1 leaves big sources their weight, 0 makes all sources equal.
        embedding_cache: A directory that keeps embeddings of texts between runs.
        keep_ids: Whether `TrainingData.item_ids` is wanted.
        spool: Where rows lie while they are trained on, see `models.training.spool`.
        left_out: Share of all contents that is not read, by their digest, see `models.left_out`.
    """

    template: TextTemplate = field(default_factory=TextTemplate)
    balance_by: str | None = None
    balance: float = 0.5
    embedding_cache: Path | None = None
    keep_ids: bool = False
    spool: Path | None = None
    left_out: float = 0.0


class TrainingData(NamedTuple):
    """What is trained on.

    Attributes:
        embeddings: (N, D) float32, mapped: they lie on disk. Work on them chunk by chunk, see `models.chunks`.
        texts: Of each row, on disk too; empty where embeddings were given.
        weights: (N,) float32 of mean 1, or None where rows count alike.
        notes: Of each file: name, rows, digest.
        item_ids: Of each row (N,), where they were asked for; else None. `pyarrow.compute.index_in` finds rows by them.
    """

    embeddings: Tensor
    texts: Sequence[str]
    weights: Tensor | None
    notes: Sequence[Mapping[str, Any]]
    item_ids: pa.LargeStringArray | None = None

    def files(self) -> Iterator[tuple[str, slice]]:
        """Each file's name and its rows."""
        start = 0
        for note in self.notes:
            yield note["file"], slice(start, start := start + note["items"])


def read_training_data(
    sources: Sequence[Path],
    reading: Reading,
    encoder: TextEncoder | None,
    say: Callable[[str], None] = print,
) -> TrainingData:
    """Read catalogue files and embed their texts, or read arrays of embeddings.

    Args:
        sources: Catalogue files (see `models.catalogue.read_items`), or arrays of embeddings of one width; not both.
        reading: How.
        encoder: Of the texts; None where embeddings are given.
        say: Takes lines for the user.

    Raises:
        ValueError: There is nothing to read, kinds or widths are mixed, a file is faulty, no file has the column to
            balance by, or item ids are wanted of one that has none.
    """
    check_sources(sources, reading)
    if catalogue.has_embeddings(sources[0]):
        return _read_arrays(sources, reading, encoder)
    if encoder is None:
        msg = "texts need a text encoder"
        raise ValueError(msg)
    return _read_texts(sources, reading, encoder, say)


def check_sources(sources: Sequence[Path], reading: Reading) -> None:
    """Refuse what the files' heads tell already, before texts are embedded.

    Raises:
        ValueError: There is nothing to read, kinds are mixed, no file has the column to balance by, or item ids are
            wanted of one that has none.
    """
    if not sources:
        msg = "training needs at least one catalogue file"
        raise ValueError(msg)
    if len({catalogue.has_embeddings(path) for path in sources}) > 1:
        msg = "catalogues of texts and arrays of embeddings cannot be mixed in one training"
        raise ValueError(msg)
    arrays = catalogue.has_embeddings(sources[0])
    if arrays and reading.keep_ids:
        for path in sources:
            catalogue.read_item_ids(path)
    if arrays and reading.balance_by:
        msg = f"arrays of embeddings have no column {reading.balance_by!r} to balance by"
        raise ValueError(msg)
    heads = [catalogue.columns_of(path) for path in sources] if reading.balance_by else []
    if heads and all(head is not None and reading.balance_by not in head for head in heads):
        msg = f"no file has a column {reading.balance_by!r} to balance by"
        raise ValueError(msg)


def width_of(sources: Sequence[Path], encoder: TextEncoder | None) -> int:
    """D of the embeddings to come, as far as the first of the files tells."""
    return encoder.dimension if encoder else next(embedding_batches(sources[0])).shape[1]


def balanced_weights(groups: Sequence[str] | Sequence[int], balance: float) -> Tensor:
    """Weights (N,) float32 of mean 1 by which a group of n rows counts n^balance in all."""
    counts = Counter(groups)
    weights = torch.from_numpy(np.fromiter((counts[group] ** (balance - 1.0) for group in groups), np.float64))
    return (weights / weights.mean()).float()


def text_encoder_of(sources: Sequence[Path], source: str | None, device: str) -> TextEncoder | None:
    """The text encoder for sources: the one that is named, all-MiniLM-L6-v2 for texts, none for embeddings."""
    if source is None and sources and catalogue.has_embeddings(sources[0]):
        return None
    return TextEncoder(TextEncoderConfig(source) if source else TextEncoderConfig(), device)


def _read_arrays(sources: Sequence[Path], reading: Reading, encoder: TextEncoder | None) -> TrainingData:
    spool: RowSpool | None = None
    widths: list[int] = [encoder.dimension] if encoder else []
    notes = []
    kept: list[Tensor] = []
    for path in sources:
        items = 0
        for batch in embedding_batches(path):
            kept.append(~left_out_rows(batch, reading.left_out))
            rows = batch[kept[-1]] if reading.left_out else batch
            if rows.shape[1] not in widths:
                widths.append(rows.shape[1])
            if len(widths) > 1:
                msg = f"embeddings of different widths: {widths}"
                raise ValueError(msg)
            spool = spool or RowSpool(rows.shape[1], reading.spool)
            spool.append(rows)
            items += len(rows)
        notes.append(_file_note(path, items))
    assert spool is not None
    pa.default_memory_pool().release_unused()
    ids = pa.concat_arrays([catalogue.read_item_ids(path) for path in sources]) if reading.keep_ids else None
    if ids is not None:
        if len(ids) != sum(map(len, kept)):
            msg = "a file changed while it was read"
            raise ValueError(msg)
        ids = ids.filter(pa.array(torch.cat(kept).numpy()))
    return TrainingData(spool.tensor(), (), None, notes, ids)


def _read_texts(
    sources: Sequence[Path], reading: Reading, encoder: TextEncoder, say: Callable[[str], None]
) -> TrainingData:
    rows = _TextRows(sources, reading, say)
    spool = RowSpool(encoder.dimension, reading.spool)
    embed_stream(encoder, rows, spool.scatter, reading.embedding_cache)
    if not rows.texts:
        msg = f"there is no item with a text in {', '.join(map(str, sources))}"
        raise ValueError(msg)
    if reading.balance_by and not rows.has_column:
        msg = f"no file has a column {reading.balance_by!r} to balance by"
        raise ValueError(msg)
    weights = balanced_weights(rows.groups, reading.balance) if reading.balance_by else None
    ids = pa.concat_arrays(rows.item_ids) if reading.keep_ids else None
    return TrainingData(spool.tensor(), rows.texts, weights, rows.notes, ids)


class _TextRows:
    """Iterates over the texts of catalogues and keeps what else is needed of each row, in little room.

    Rows without any text are left out and counted.

    Attributes:
        texts: Those that were seen so far.
        groups: The number of each row's balance group; empty where none are asked for.
        has_column: Whether any row has a value in the column to balance by.
        item_ids: Of each batch, where they are asked for.
        notes: Of each file that was read.
    """

    def __init__(self, sources: Sequence[Path], reading: Reading, say: Callable[[str], None]) -> None:
        self._sources = sources
        self._reading = reading
        self._say = say
        self._numbers: dict[str, int] = {}
        lengths = [catalogue.rows_of(path) for path in sources]
        self._rows = None if None in lengths else sum(length or 0 for length in lengths)
        self._skipped = 0
        self.texts = TextSpool(reading.spool)
        self.groups = array("i")
        self.has_column = False
        self.item_ids: list[pa.LargeStringArray] = []
        self.notes: list[dict[str, Any]] = []

    def __length_hint__(self) -> int:
        """As far as the files tell without being read; 0 where they do not."""
        return 0 if self._rows is None else max(0, self._rows - self._skipped)

    def __iter__(self) -> Iterator[str]:
        column, share = self._reading.balance_by, self._reading.left_out
        for number, path in enumerate(self._sources):
            read = kept = left_out = 0
            for batch in catalogue.read_items(path, keep=(column,) if column else ()):
                rows = [(item, text) for item in batch if (text := item.content(self._reading.template))]
                if share:
                    texts_read = len(rows)
                    rows = [(item, text) for item, text in rows if not is_left_out(text_digest(text), share)]
                    left_out += texts_read - len(rows)
                read, kept = read + len(batch), kept + len(rows)
                self._skipped += len(batch) - len(rows)
                texts = [text for _, text in rows]
                self.texts.extend(texts)
                if column:
                    self.has_column |= any(item.kept.get(column) for item, _ in rows)
                    names = (item.kept.get(column) or f"file {number}" for item, _ in rows)
                    self.groups.extend(self._numbers.setdefault(name, len(self._numbers)) for name in names)
                if self._reading.keep_ids:
                    self.item_ids.append(pa.array([item.item_id for item, _ in rows], pa.large_string()))
                yield from texts
            if kept + left_out < read:
                self._say(f"{path}: {read - kept - left_out:,} of {read:,} items have no text and are left out")
            self.notes.append(_file_note(path, kept))


def _file_note(path: Path, rows: int) -> dict[str, Any]:
    """Names a file by its last two parts: what lies above is the machine's business."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"file": "/".join(path.parts[-2:]), "items": rows, "sha256": digest}

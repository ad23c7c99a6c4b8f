"""What is trained on: catalogue files and their embeddings, or arrays of embeddings, row by row in the files' order."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import torch
from torch import Tensor

from models import catalogue
from models.embedding_cache import embed_texts
from models.template import TextTemplate
from models.text_encoder import MINILM, TextEncoder, TextEncoderConfig


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
    """

    template: TextTemplate = field(default_factory=TextTemplate)
    balance_by: str | None = None
    balance: float = 0.5
    embedding_cache: Path | None = None
    keep_ids: bool = False


class TrainingData(NamedTuple):
    """What is trained on.

    Attributes:
        embeddings: (N, D) float32.
        texts: Of each row; empty where embeddings were given.
        files: File number (N,) int64 of each row.
        weights: (N,) float32 of mean 1, or None where rows count alike.
        notes: Of each file: name, rows, digest.
        item_ids: Of each row (N,), where they were asked for; else None. `pyarrow.compute.index_in` finds rows by them.
    """

    embeddings: Tensor
    texts: Sequence[str]
    files: Tensor
    weights: Tensor | None
    notes: Sequence[Mapping[str, Any]]
    item_ids: pa.LargeStringArray | None = None


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
        ValueError: There is nothing to read, kinds or widths are mixed, a file is faulty, or item ids are wanted of one
            that has none.
    """
    if not sources:
        msg = "training needs at least one catalogue file"
        raise ValueError(msg)
    if len({catalogue.has_embeddings(path) for path in sources}) > 1:
        msg = "catalogues of texts and arrays of embeddings cannot be mixed in one training"
        raise ValueError(msg)
    if catalogue.has_embeddings(sources[0]):
        return _read_arrays(sources, reading, encoder)
    if encoder is None:
        msg = "texts need a text encoder"
        raise ValueError(msg)
    texts, groups, numbers, notes, item_ids = _read_texts(sources, reading, say)
    embeddings = embed_texts(encoder, texts, reading.embedding_cache)
    weights = balanced_weights(groups, reading.balance) if reading.balance_by else None
    ids = pa.array(item_ids, pa.large_string()) if reading.keep_ids else None
    return TrainingData(embeddings, texts, torch.tensor(numbers), weights, notes, ids)


def balanced_weights(groups: Sequence[str], balance: float) -> Tensor:
    """Weights (N,) float32 of mean 1 by which a group of n rows counts n^balance in all."""
    counts = Counter(groups)
    weights = torch.tensor([counts[group] ** (balance - 1.0) for group in groups], dtype=torch.float64)
    return (weights / weights.mean()).float()


def text_encoder_of(sources: Sequence[Path], source: str | None, device: str) -> TextEncoder | None:
    """The text encoder for sources: the one that is named, all-MiniLM-L6-v2 for texts, none for embeddings."""
    if source is None and sources and catalogue.has_embeddings(sources[0]):
        return None
    return TextEncoder(TextEncoderConfig(source or MINILM), device)


def _read_arrays(sources: Sequence[Path], reading: Reading, encoder: TextEncoder | None) -> TrainingData:
    arrays = [catalogue.read_embeddings(path) for path in sources]
    if len({array.shape[1] for array in arrays}) > 1 or (encoder and encoder.dimension != arrays[0].shape[1]):
        widths = [array.shape[1] for array in arrays] + ([encoder.dimension] if encoder else [])
        msg = f"embeddings of different widths: {widths}"
        raise ValueError(msg)
    files = torch.cat([torch.full((len(array),), number) for number, array in enumerate(arrays)])
    notes = [_file_note(path, len(array)) for path, array in zip(sources, arrays, strict=True)]
    ids = pa.concat_arrays([catalogue.read_item_ids(path) for path in sources]) if reading.keep_ids else None
    return TrainingData(torch.cat(arrays), (), files, None, notes, ids)


def _read_texts(
    sources: Sequence[Path], reading: Reading, say: Callable[[str], None]
) -> tuple[list[str], list[str], list[int], list[dict[str, Any]], list[str]]:
    """Texts, balance groups, file numbers, notes and item ids; rows without any text are left out and counted."""
    texts: list[str] = []
    groups: list[str] = []
    numbers: list[int] = []
    item_ids: list[str] = []
    notes = []
    keep = (reading.balance_by,) if reading.balance_by else ()
    for number, path in enumerate(sources):
        read = empty = 0
        for batch in catalogue.read_items(path, keep=keep):
            for item in batch:
                read += 1
                text = item.content(reading.template)
                if not text:
                    empty += 1
                    continue
                texts.append(text)
                groups.append(item.kept.get(reading.balance_by or "") or f"file {number}")
                numbers.append(number)
                if reading.keep_ids:
                    item_ids.append(item.item_id)
        if empty:
            say(f"{path}: {empty:,} of {read:,} items have no text and are left out")
        notes.append(_file_note(path, read - empty))
    if not texts:
        msg = f"there is no item with a text in {', '.join(map(str, sources))}"
        raise ValueError(msg)
    return texts, groups, numbers, notes, item_ids


def _file_note(path: Path, rows: int) -> dict[str, Any]:
    """Names a file by its last two parts: what lies above is the machine's business."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"file": "/".join(path.parts[-2:]), "items": rows, "sha256": digest}

"""Collaborative item embeddings, for an objective that draws together what the same users choose (LETTER, eq. 7).

They are trained from the training part of each user's sequence alone, s[:-2] of the leave-one-out split: whoever tests
a generator on s[-1], and chooses it by s[-2], would otherwise find these choices in the Semantic IDs already. The
epoch that is kept is chosen inside the training part for the same reason.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from models.catalogue import read_item_ids
from models.embedding_files import embedding_batches, read_embeddings
from models.interactions import Split, in_rows, leave_one_out, read_interactions
from models.recommendation.ranking import Ranking
from models.training.cooccurrence import PPMIConfig, ppmi_embeddings
from models.training.data import TrainingData
from models.training.limits import check_settings
from models.training.sasrec import SASRecConfig, evaluate_split, fit_sasrec
from models.whole_files import write_whole

METHODS: Mapping[str, SASRecConfig | PPMIConfig] = {"sasrec": SASRecConfig(), "ppmi": PPMIConfig()}
NOTES = b"semid"

# What `semid train` takes where embeddings are given and no weight is; docs/families.md has what it did.
WEIGHT = 0.1


class ItemEmbeddings(NamedTuple):
    """Embeddings of items, each item once.

    Attributes:
        item_ids: (M,) large_string.
        embeddings: (M, c) float32, finite.
        notes: How they were made: method, hyper-parameters, the interactions' digest; nothing of users.
    """

    item_ids: pa.Array
    embeddings: Tensor
    notes: Mapping[str, Any]


class Aligned(NamedTuple):
    """Collaborative embeddings in the order of the training data.

    Attributes:
        embeddings: (N, c) float32; rows of NaN where an item has none.
        notes: Where they are from, and the share of the items that have one.
    """

    embeddings: Tensor
    notes: Mapping[str, Any]


def train_item_embeddings(
    interactions: Path,
    config: SASRecConfig | PPMIConfig,
    catalogue: Iterable[str] | None = None,
    device: str = "cpu",
    say: Callable[[str], None] = print,
) -> ItemEmbeddings:
    """Train item embeddings from the training part of each user's sequence.

    Args:
        interactions: See `models.interactions.read_interactions`.
        config: Hyper-parameters, and by their kind the method.
        catalogue: Item ids; other items are left out before the sequences are split, as a generator for this
            catalogue splits them. None: all items of the file.
        device: Where SASRec is trained.
        say: Takes lines for the user.

    Raises:
        ValueError: A setting is out of its range, the file cannot be read, it has none of the catalogue's items, there
            is too little to learn from, or training diverged.
    """
    check_settings(config)
    item_ids, split = _read_split(interactions, catalogue, say)
    # Only these can be learnt. Their order, too, is that of the training parts: it decides what is drawn for which.
    known = list(dict.fromkeys(row for sequence in split.training for row in sequence))
    say(
        f"{interactions}: {len(split.training):,} users of at least 3 interactions; {len(known):,} items before the "
        "last two of each"
    )
    split = _renumbered(split, known)
    notes: dict[str, Any] = {"interactions": _file_note(interactions), "config": asdict(config)}
    if isinstance(config, SASRecConfig):
        fitted = fit_sasrec(split.training, len(known), config, device)
        embeddings = fitted.model.items.weight.detach().cpu().float()
        ranking = evaluate_split(fitted.model, split, repeats=False)
        say(
            f"SASRec, epoch {fitted.epoch}: the last item of {ranking.users:,} users, ranked among all not chosen "
            f"before: Recall@10 {ranking.recall[10]:.4f}, NDCG@10 {ranking.ndcg[10]:.4f}"
        )
        notes |= {"method": "sasrec", "epoch": fitted.epoch, "held_out": _ranking_note(fitted.held_out)}
        notes |= {"test": _ranking_note(ranking)}
    else:
        embeddings = ppmi_embeddings(split.training, len(known), config)
        notes |= {"method": "ppmi"}
    learnt = embeddings.abs().sum(dim=1) > 0
    if not bool(learnt.any()):
        raise ValueError(f"{interactions} tells no item from another: none has an embedding")
    ids = pa.array([item_ids[row] for row, kept in zip(known, learnt.tolist(), strict=True) if kept], pa.large_string())
    return ItemEmbeddings(ids, embeddings[learnt], notes)


def aligned(found: ItemEmbeddings, item_ids: pa.Array, say: Callable[[str], None] = print) -> Aligned:
    """Bring embeddings into the order of item ids (N,); what they have of other items is left out.

    Raises:
        ValueError: Not one of the items has an embedding.
    """
    rows = pc.index_in(item_ids.cast(pa.large_string()), value_set=found.item_ids)
    places = torch.from_numpy(np.array(rows.fill_null(-1), dtype=np.int64))
    there = places >= 0
    if not bool(there.any()):
        msg = (
            f"none of the {len(item_ids):,} items has a collaborative embedding: the catalogue's item ids are such as "
            f"{_examples(item_ids)}, those of the collaborative embeddings such as {_examples(found.item_ids)}"
        )
        raise ValueError(msg)
    embeddings = found.embeddings.new_full((len(places), found.embeddings.shape[1]), torch.nan)
    embeddings[there] = found.embeddings[places[there]]
    say(f"{int(there.sum()):,} of {len(item_ids):,} items have a collaborative embedding")
    return Aligned(embeddings, {**found.notes, **_measures(embeddings)})


def align(
    data: TrainingData,
    *,
    file: Path | None = None,
    interactions: Path | None = None,
    seed: int = 0,
    device: str = "cpu",
    say: Callable[[str], None] = print,
) -> Aligned | None:
    """Collaborative embeddings of the training data, read or trained; None where neither is asked for.

    Args:
        data: With item ids where `needs_item_ids`.
        file: `.parquet` as `read_item_embeddings` takes it, or `.npy` with a row for each item in their order.
        interactions: Of which SASRec is trained.
        seed: Of SASRec.
        device: Where SASRec is trained.
        say: Takes lines for the user.

    Raises:
        ValueError: A file is of another kind, is faulty, or does not fit the items; or training failed.
    """
    if interactions is not None and data.item_ids is not None:
        config = SASRecConfig(seed=seed)
        return aligned(
            train_item_embeddings(interactions, config, data.item_ids.to_pylist(), device, say), data.item_ids, say
        )
    if file is None:
        return None
    if data.item_ids is not None:
        found = read_item_embeddings(file)
        return aligned(found._replace(notes={**found.notes, "file": _file_note(file)}), data.item_ids, say)
    embeddings = read_embeddings(file)
    if len(embeddings) != len(data.embeddings):
        msg = (
            f"{file} has {len(embeddings):,} rows for {len(data.embeddings):,} items; an array has a row for each in "
            "their order. Parquet with item_id and embedding may leave items out"
        )
        raise ValueError(msg)
    return Aligned(embeddings, {"method": "given", "file": _file_note(file), **_measures(embeddings)})


def needs_item_ids(file: Path | None, interactions: Path | None) -> bool:
    """Whether these are brought to the items by item id.

    Raises:
        ValueError: Both are given, or the file is of neither kind.
    """
    if file is not None and interactions is not None:
        raise ValueError("collaborative embeddings are read from a file or trained from interactions, not both")
    if file is not None and file.suffix not in (".parquet", ".npy"):
        msg = f"{file}: collaborative embeddings are .parquet with item_id and embedding, or .npy in the items' order"
        raise ValueError(msg)
    return interactions is not None or (file is not None and file.suffix == ".parquet")


def check_collaborative(file: Path | None, interactions: Path | None) -> None:
    """Refuse a file that is none of its kind, as far as its head tells, before items are embedded.

    Raises:
        ValueError: As of `read_interactions`, `read_item_embeddings` and `models.embedding_files.read_embeddings`.
    """
    if interactions is not None:
        next(read_interactions(interactions), None)
    if file is not None and file.suffix == ".parquet":
        read_item_embeddings(file)
    elif file is not None:
        next(embedding_batches(file))


def read_item_embeddings(path: Path) -> ItemEmbeddings:
    """Item embeddings from Parquet: `item_id` (string or integer) and `embedding` (lists of floats, all of one width).

    Raises:
        ValueError: The file cannot be read, a column is missing or of another type, an item comes twice, widths
            differ, or a number is not finite.
    """
    item_ids = read_item_ids(path)
    if not len(item_ids):
        raise ValueError(f"{path} has no rows")
    counts = item_ids.value_counts()
    twice = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(twice):
        raise ValueError(f"{path} has {len(twice):,} items more than once, such as {twice[0]['values'].as_py()!r}")
    schema = pq.read_schema(path)
    if "embedding" not in schema.names:
        raise ValueError(f"{path} has no column 'embedding'; its columns are {schema.names}")
    embeddings = _matrix(pq.read_table(path, columns=["embedding"]).column("embedding").combine_chunks(), path)
    bad = (~embeddings.isfinite().all(dim=1)).nonzero().flatten().tolist()
    if bad:
        item = item_ids[bad[0]].as_py()
        raise ValueError(f"{path} has numbers that are not finite in {len(bad):,} rows, first of item {item!r}")
    return ItemEmbeddings(item_ids, embeddings, _notes(schema.metadata or {}))


def _notes(metadata: Mapping[bytes, bytes]) -> Mapping[str, Any]:
    """What a file says of how its embeddings were made; what is none of our notes says nothing."""
    try:
        notes = json.loads(metadata[NOTES])
    except (KeyError, ValueError):
        notes = None
    return notes if isinstance(notes, dict) and "method" in notes else {"method": "given"}


def write_item_embeddings(path: Path, found: ItemEmbeddings) -> None:
    """Write Parquet as `read_item_embeddings` takes it, whole or not at all; the notes go with it.

    Raises:
        OSError: It cannot be written.
    """
    width = found.embeddings.shape[1]
    column = pa.FixedSizeListArray.from_arrays(pa.array(found.embeddings.numpy().ravel()), width)
    table = pa.table({"item_id": found.item_ids, "embedding": column})
    content = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata({NOTES: json.dumps(dict(found.notes))}), content)
    write_whole(path, content.getvalue().to_pybytes())


def _read_split(
    interactions: Path, catalogue: Iterable[str] | None, say: Callable[[str], None]
) -> tuple[list[str], Split]:
    """Item ids by row, and the sequences in these rows."""
    if catalogue is None:
        found = dict.fromkeys(item for user in read_interactions(interactions) for item in user.item_ids)
    else:
        found = dict.fromkeys(catalogue)
    item_ids = list(found)
    rows = {item: row for row, item in enumerate(item_ids)}
    sequences, unknown = in_rows(read_interactions(interactions), rows)
    if unknown:
        total = unknown + sum(map(len, sequences))
        say(f"{interactions}: {unknown:,} of {total:,} interactions are with items that the catalogue does not have")
        if unknown == total:
            raise ValueError(f"{interactions} has none of the catalogue's items, such as {_examples(item_ids)}")
    split = leave_one_out(sequences)
    if not split.training:
        raise ValueError(f"{interactions} has no user with three interactions, the last two of which are left out")
    return item_ids, split


def _renumbered(split: Split, known: list[int]) -> Split:
    """The split with rows numbered by their place in `known`; rows that are not there come after."""
    place = {row: number for number, row in enumerate(known)}

    def number(row: int) -> int:
        return place.get(row, len(known))

    training = [tuple(map(number, sequence)) for sequence in split.training]
    return Split(training, list(map(number, split.validation)), list(map(number, split.test)))


def _matrix(column: pa.Array, path: Path) -> Tensor:
    """(M, c) float32 of lists of one width."""
    kind = column.type
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not lists or not pa.types.is_floating(kind.value_type):
        raise ValueError(f"{path}: embedding is {kind}, expected lists of floats")
    values = column.flatten()
    if column.null_count or values.null_count:
        raise ValueError(f"{path} has nulls among its embeddings; leave out the rows of items that have none")
    widths = pc.unique(pc.list_value_length(column)).to_pylist()
    if len(widths) > 1 or not widths[0]:
        raise ValueError(
            f"{path} has embeddings of {' and '.join(map(str, sorted(widths)[:5]))} numbers, not of one width"
        )
    numbers = values.cast(pa.float32()).to_numpy(zero_copy_only=False)
    return torch.from_numpy(np.array(numbers.reshape(-1, widths[0])))


def _ranking_note(found: Ranking) -> dict[str, float]:
    return {"users": found.users, "recall_10": found.recall[10], "ndcg_10": found.ndcg[10]}


def _measures(embeddings: Tensor) -> dict[str, Any]:
    return {"width": embeddings.shape[1], "share_of_items": float(embeddings.isfinite().all(dim=1).float().mean())}


def _file_note(path: Path) -> dict[str, Any]:
    """Names a file by its last two parts: what lies above is the machine's business."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"file": "/".join(path.parts[-2:]), "sha256": digest}


def _examples(item_ids: Any) -> str:
    first = item_ids[:3].to_pylist() if isinstance(item_ids, pa.Array) else item_ids[:3]
    return ", ".join(map(repr, first))

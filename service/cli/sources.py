"""Where the Semantic IDs of a catalogue come from: a checkpoint, a running service, an exported record."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models import Tokenizer, Trie, load
from models.catalogue import read_item_ids
from models.embedding_files import read_embeddings
from models.evaluation.material import Embedder, read_catalogue
from models.recommendation.task import Identified
from service.backup.record_table import LIVE, Description, read_groups
from service.client import FailedItem, TokenizerClient
from service.follower import Follower


class CatalogueFile:
    """A catalogue and its embeddings, each made once.

    Args:
        path: See `models.catalogue.read_items`; or Parquet with `item_id` and `embedding`.
        embedding_cache: A directory that keeps embeddings of texts between runs.

    Attributes:
        item_ids: (N,) by row.
        rows: Item id -> row.

    Raises:
        ValueError: The file cannot be read, or an item id comes twice.
    """

    def __init__(self, path: Path, embedding_cache: Path | None = None) -> None:
        catalogue = read_catalogue(path)
        if not catalogue.takes_text:
            # Row numbers would do for an array, but users' sequences do not mean them.
            read_item_ids(path)
        self._catalogue = catalogue
        self._embedder = Embedder(catalogue, embedding_cache)
        self.item_ids = catalogue.item_ids
        self.rows: Mapping[str, int] = {item_id: row for row, item_id in enumerate(self.item_ids)}

    def embeddings(self, tokenizer: Tokenizer) -> Tensor:
        """(N, D) float32, of every item.

        Raises:
            ValueError: The tokenizer takes what the catalogue does not have, or an item has no content.
        """
        space = self._embedder.space(tokenizer)
        if missing := len(self.item_ids) - len(space.rows):
            raise ValueError(f"{missing} items of {self._catalogue.path} have no text: they cannot be tokenized")
        return space.embeddings

    def entries(self) -> Iterator[dict[str, Any]]:
        """The items as `POST /tokenize` takes them."""
        if not self._catalogue.takes_text:
            for item_id, embedding in zip(self.item_ids, read_embeddings(self._catalogue.path), strict=True):
                yield {"item_id": item_id, "embedding": embedding.tolist()}
            return
        for item in self._catalogue.items():
            content = {"fields": dict(item.fields)} if item.text is None else {"text": item.text}
            yield {"item_id": item.item_id, **content}


def of_checkpoint(directory: Path, device: torch.device, catalogue: CatalogueFile) -> Identified:
    """The IDs that a tokenizer gives a catalogue: equal codes get the suffixes 0, 1, ... in its order.

    Raises:
        CheckpointError: The checkpoint cannot be loaded.
        ValueError: It does not take what the catalogue has.
    """
    tokenizer = load(directory, device)
    embeddings = catalogue.embeddings(tokenizer)
    codes = tokenizer.encode(embeddings).codes
    semantic_ids = torch.cat([codes, _suffixes(codes)[:, None]], dim=1)
    trie = Trie.of(semantic_ids, tokenizer.codebook_sizes)
    return Identified(tokenizer.full_name, semantic_ids, tokenizer.codebook_sizes, lambda: trie, embeddings)


def of_service(
    url: str, namespace: str, tokenizer: str | None, catalogue: CatalogueFile, follower: Follower
) -> Identified:
    """The IDs that a running service gives a catalogue, and its live trie.

    Args:
        url: The service's base.
        namespace: The catalogue's namespace there.
        tokenizer: One that is loaded there; None: the default one.
        catalogue: The items; they are assigned.
        follower: Of the same record; advanced whenever the trie is asked for.

    Raises:
        TokenizerError: The service refused, or stayed away.
        ValueError: It rejected an item.
    """
    rows: list[list[int]] = []
    with TokenizerClient(url, namespace=namespace, tokenizer=tokenizer) as client:
        for answer in client.tokenize(catalogue.entries()):
            if isinstance(answer, FailedItem):
                msg = f"the service rejected {answer.item_id!r}: {answer.error.detail}"
                raise ValueError(msg)  # noqa: TRY004 - one kind of error for what a catalogue holds
            assert answer.suffix is not None  # it is assigned
            rows.append([*answer.codes, answer.suffix])
    trie = follower.advance()
    name = f"{tokenizer or 'default tokenizer'} of {url}, namespace {namespace}"
    return Identified(name, torch.tensor(rows), trie.codebook_sizes, follower.advance, None)


def of_record(path: Path, catalogue: CatalogueFile) -> Identified:
    """The live IDs of a table that `semid export` wrote.

    Raises:
        NotARecordTable: The file is none.
        ValueError: An item of the catalogue has no live ID in it.
    """
    origin = Description.of(path).origin
    found: dict[str, list[int]] = {}
    for group in read_groups(path, ["item_id", "codes", "suffix", "state"]):
        for row in group.to_pylist():
            if row["state"] == LIVE:
                found[row["item_id"]] = [*row["codes"], row["suffix"]]
    if missing := [item_id for item_id in catalogue.item_ids if item_id not in found]:
        raise ValueError(f"{len(missing)} items of the catalogue have no live ID in {path}, such as {missing[0]!r}")
    trie = Trie.of(torch.tensor(list(found.values())), origin.codebook_sizes)
    semantic_ids = torch.tensor([found[item_id] for item_id in catalogue.item_ids])
    return Identified(origin.tokenizer, semantic_ids, origin.codebook_sizes, lambda: trie, None)


def named_apart(tokenizers: Sequence[Identified]) -> list[Identified]:
    """The same, a number behind each name that an earlier one has."""
    names = [identified.name for identified in tokenizers]
    return [
        identified._replace(name=f"{identified.name} ({count})")
        if (count := names[: place + 1].count(name)) > 1
        else identified
        for place, (name, identified) in enumerate(zip(names, tokenizers, strict=True))
    ]


def _suffixes(codes: Tensor) -> Tensor:
    """(N,) int64: how many earlier rows have the same codes."""
    seen: dict[tuple[int, ...], int] = {}
    suffixes = []
    for row in codes.tolist():
        suffixes.append(seen.get(tuple(row), 0))
        seen[tuple(row)] = suffixes[-1] + 1
    return torch.tensor(suffixes, dtype=torch.int64)

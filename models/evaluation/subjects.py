"""Checkpoints and index files -> their codes of one catalogue, and of its texts paraphrased."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from models.checkpoint import load, read_manifest
from models.embedding_files import read_embeddings
from models.evaluation.figures import Subject
from models.evaluation.index_file import read_index
from models.evaluation.material import Catalogue, Embedder, Space
from models.evaluation.paraphrases import PARAPHRASES, paraphrase
from models.evaluation.unseen import Unseen, unseen_items
from models.tokenizer import Tokenizer

CHUNK_ROWS = 8192


@dataclass(frozen=True)
class Inputs:
    """What is compared on.

    Attributes:
        catalogue: A catalogue file, or an array of embeddings.
        interactions: What users chose; None leaves the figures on users out.
        embeddings: An array by row of the catalogue, for tokenizers that take embeddings only.
        unseen: Ids of items that no tokenizer saw, said by the caller; None: what the manifests tell.
        all_unseen: The caller's word that no tokenizer saw any item.
        key_column: The catalogue's column by which index files name items.
        embedding_cache: A directory that keeps embeddings of texts.
        device: Where the tokenizers run.
    """

    catalogue: Path
    interactions: Path | None = None
    embeddings: Path | None = None
    unseen: frozenset[str] | None = None
    all_unseen: bool = False
    key_column: str | None = None
    embedding_cache: Path | None = None
    device: str = "cpu"


class Read(NamedTuple):
    """A source, encoded: its codes, and what encodes further texts, where anything does."""

    subject: Subject
    tokenizer: Tokenizer | None = None
    space: Space | None = None


class Reader:
    """Turns sources into codes of one catalogue.

    Args:
        catalogue: Whose items.
        inputs: What else is given of them.
        say: Takes lines for the user.

    Raises:
        ValueError: What is said of items never seen does not fit the catalogue, or embeddings cannot be read.
    """

    def __init__(self, catalogue: Catalogue, inputs: Inputs, say: Callable[[str], None]) -> None:
        given = read_embeddings(inputs.embeddings) if inputs.embeddings else None
        self.catalogue = catalogue
        self.embedder = Embedder(catalogue, inputs.embedding_cache, given)
        self._device = inputs.device
        self._asserted = _asserted(catalogue, inputs, say)

    def read(self, source: Path) -> Read:
        """A checkpoint's directory, or an index file."""
        return self._index(source) if source.is_file() else self._checkpoint(source)

    def _checkpoint(self, source: Path) -> Read:
        manifest = read_manifest(source)
        tokenizer = load(source, self._device)
        space = self.embedder.space(tokenizer)
        codes, misses, errors = [], [], []
        for rows in space.embeddings.split(CHUNK_ROWS):
            encoding = tokenizer.encode(rows)
            codes.append(encoding.codes)
            errors.append(encoding.quantization_error)
            misses.append((rows.double() - tokenizer.decode(encoding.codes)).square().sum(dim=1))
        subject = Subject(
            name=manifest.name,
            manifest=manifest,
            rows=space.rows,
            codes=torch.cat(codes),
            codebook_sizes=tuple(manifest.codebook_sizes),
            unseen=self._asserted or unseen_items(manifest, self.catalogue.sha256, space.digests),
            embeddings=space.embeddings,
            misses=torch.cat(misses),
            errors=torch.cat(errors),
        )
        return Read(subject, tokenizer.for_embeddings(), space)

    def _index(self, source: Path) -> Read:
        index = read_index(source)
        named = set(index.keys)
        places = [(key, row) for row, key in enumerate(self.catalogue.keys) if key in named]
        row_of = dict(places)
        if not places:
            raise ValueError(f"{source} names no item of the catalogue; its first is {index.keys[0]!r}")
        if len(row_of) < len(places):
            raise ValueError(f"{source} names items by a key that several of the catalogue's have")
        known = [number for number, key in enumerate(index.keys) if key in row_of]
        unknown = Unseen(None, "not known: an index file does not tell what its tokenizer was trained on")
        subject = Subject(
            name=source.name,
            manifest=None,
            rows=torch.tensor([row_of[index.keys[number]] for number in known]),
            codes=index.codes[known],
            codebook_sizes=index.codebook_sizes,
            unseen=self._asserted or unknown,
        )
        return Read(subject)


class Paraphraser:
    """Paraphrases the same items for every tokenizer: those that none of them saw first, then others, by lot.

    Args:
        reader: Of the catalogue.
        common: (N,) bool, the items that no tokenizer saw; None where they are not known.
        count: How many items, at most.
        seed: Of the lot and of the paraphrases.
    """

    def __init__(self, reader: Reader, common: Tensor | None, *, count: int, seed: int) -> None:
        self._embedder = reader.embedder
        self._seed = seed
        order = torch.randperm(len(reader.catalogue.item_ids), generator=torch.Generator().manual_seed(seed))
        if common is not None:
            order = order[(~common[order]).int().argsort(stable=True)]
        rows = sorted(order[:count].tolist()) if reader.catalogue.takes_text else []
        self._items = list(zip(rows, reader.catalogue.chosen(rows), strict=True)) if rows else []

    def applied(self, read: Read) -> Subject:
        """The subject with the codes of its paraphrased items."""
        subject, tokenizer, space = read
        if not self._items or tokenizer is None or space is None or space.template is None:
            return subject
        position = {row: number for number, row in enumerate(subject.rows.tolist())}
        items = [(position[row], item) for row, item in self._items if row in position]
        changed = [
            (kind, number, text)
            for kind in PARAPHRASES
            for number, item in items
            if (text := paraphrase(kind, item, space.template, self._seed)) != item.content(space.template)
        ]
        if not changed:
            return subject
        codes = tokenizer.encode(self._embedder.embed(space, [text for _, _, text in changed])).codes
        found = {}
        for kind in dict.fromkeys(kind for kind, _, _ in changed):
            places = [place for place, (other, _, _) in enumerate(changed) if other == kind]
            found[kind] = (torch.tensor([changed[place][1] for place in places]), codes[places])
        return replace(subject, paraphrased=found)


def _asserted(catalogue: Catalogue, inputs: Inputs, say: Callable[[str], None]) -> Unseen | None:
    """The caller's word on which items no tokenizer saw; ids that the catalogue does not have are told of."""
    if inputs.all_unseen and inputs.unseen is not None:
        raise ValueError("either all items are unseen or those of a list: both were said")
    if inputs.all_unseen:
        return Unseen(torch.ones(len(catalogue.item_ids), dtype=torch.bool), "all, said by the caller")
    if inputs.unseen is None:
        return None
    missing = sorted(inputs.unseen.difference(catalogue.item_ids))
    such = f", such as {', '.join(map(repr, missing[:3]))}" if missing else ""
    total = len(inputs.unseen)
    if len(missing) == total:
        raise ValueError(f"none of the {total:,} items said to be unseen is in {catalogue.path.name}{such}")
    how = "said by the caller"
    if missing:
        how += f"; {len(missing):,} of these {total:,} item ids are not in the catalogue"
        say(f"{len(missing):,} of {total:,} items said to be unseen are not in {catalogue.path.name}{such}")
    return Unseen(torch.tensor([item in inputs.unseen for item in catalogue.item_ids]), how)

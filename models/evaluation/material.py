"""What tokenizers are measured on: a catalogue, its categories and embeddings, and what users chose of it."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow.parquet as pq
import torch
from torch import Tensor

from models.catalogue import CatalogueItem, has_embeddings, read_item_ids, read_items
from models.embedding_cache import embed_texts
from models.embedding_files import embedding_batches, read_embeddings
from models.evaluation.prefixes import consecutive_pairs
from models.interactions import in_rows, read_interactions
from models.left_out import embedding_digests, text_digest
from models.template import TextTemplate
from models.text_encoder import TextEncoder
from models.tokenizer import Tokenizer

# Levels of a category path that are measured, from the root; the whole path is measured besides.
CATEGORY_LEVELS = 4


@dataclass(frozen=True)
class Catalogue:
    """N items on disk. Texts are read again where they are needed: memory holds ids and categories.

    Attributes:
        path: The file.
        sha256: Its digest.
        item_ids: (N,) by row.
        keys: (N,) by what index files name the items; the item ids, where no column was named for it.
        categories: Name of a category level -> each item's number in it (N,) int64, -1 where it has none. A level
            whose items are all alike, or nearly all different, is left out.
        takes_text: Whether the items have texts; else they are embeddings.
    """

    path: Path
    sha256: str
    item_ids: Sequence[str]
    keys: Sequence[str]
    categories: Mapping[str, Tensor]
    takes_text: bool

    def items(self) -> Iterator[CatalogueItem]:
        """The items in the file's order, read anew."""
        for batch in read_items(self.path):
            yield from batch

    def chosen(self, rows: Sequence[int]) -> list[CatalogueItem]:
        """The items of some rows, in the rows' order."""
        wanted = set(rows)
        found = {row: item for row, item in enumerate(self.items()) if row in wanted}
        return [found[row] for row in rows]


@dataclass(frozen=True)
class Space:
    """The embeddings of a catalogue's items under one text encoder and template.

    Attributes:
        rows: (n,) int64, the catalogue's rows that have a content.
        embeddings: (n, D) float32, theirs.
        digests: Of the contents (see `models.left_out`), by row of the catalogue; None where there is none.
        text_encoder: What embedded them; None where they were given.
        template: Fields -> text, likewise.
    """

    rows: Tensor
    embeddings: Tensor
    digests: Sequence[bytes | None]
    text_encoder: TextEncoder | None = None
    template: TextTemplate | None = None


def read_catalogue(path: Path, key_column: str | None = None) -> Catalogue:
    """A catalogue file, or an array of embeddings, whose items are named by their row numbers where it has no item ids.

    Args:
        path: See `models.catalogue.read_items` and `models.embedding_files.read_embeddings`.
        key_column: The column by which index files name the items; `item_id` if None.

    Raises:
        ValueError: It cannot be read, is empty, or names an item twice.
    """
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if has_embeddings(path):
        if key_column:
            raise ValueError(
                f"{path} has embeddings, of which no other column than item_id is read: not {key_column!r}"
            )
        names = _names_of_embeddings(path)
        _check_once(path, names)
        return Catalogue(path, sha256, names, names, {}, takes_text=False)
    item_ids: list[str] = []
    keys: list[str] = []
    paths: list[tuple[str, ...]] = []
    for batch in read_items(path, keep=(key_column,) if key_column else ()):
        for item in batch:
            item_ids.append(item.item_id)
            keys.append(item.kept[key_column] if key_column else item.item_id)
            paths.append(_category_path(item))
    if not item_ids:
        raise ValueError(f"{path} has no items")
    if key_column and not any(keys):
        raise ValueError(f"{path} has nothing in a column {key_column!r}, by which index files would name the items")
    _check_once(path, item_ids)
    return Catalogue(path, sha256, item_ids, keys, category_levels(paths), takes_text=True)


def _names_of_embeddings(path: Path) -> list[str]:
    if path.suffix == ".parquet" and "item_id" in pq.read_schema(path).names:
        names: list[str] = read_item_ids(path).to_pylist()
        return names
    return [str(row) for row in range(sum(map(len, embedding_batches(path))))]


def _check_once(path: Path, item_ids: Sequence[str]) -> None:
    if len(set(item_ids)) < len(item_ids):
        repeated, _ = Counter(item_ids).most_common(1)[0]
        raise ValueError(f"{path} names item {repeated!r} more than once")


def category_levels(paths: Sequence[tuple[str, ...]]) -> dict[str, Tensor]:
    """Category numbers by level of the paths, and of the whole paths ("leaf"); see `Catalogue.categories`.

    A category is the path to it: equal names under different parents are different categories.
    """
    levels = {
        f"level {depth}": [path[:depth] if len(path) >= depth else () for path in paths]
        for depth in range(1, CATEGORY_LEVELS + 1)
    }
    levels["leaf"] = list(paths)
    found: dict[str, Tensor] = {}
    for name, prefixes in levels.items():
        numbers: dict[tuple[str, ...], int] = {}
        column = torch.tensor([numbers.setdefault(prefix, len(numbers)) if prefix else -1 for prefix in prefixes])
        if len(numbers) - (() in numbers) > 1 and len(numbers) <= len(paths) / 2:
            found[name] = column
    return found


def read_pairs(path: Path, item_ids: Sequence[str]) -> tuple[Tensor, int, int]:
    """Consecutive items of users as rows (P, 2); how many users; how many interactions name an unknown item.

    Raises:
        ValueError: The file cannot be read, or names no item of the catalogue.
    """
    sequences, unknown = in_rows(read_interactions(path), {name: row for row, name in enumerate(item_ids)})
    if not any(sequences):
        raise ValueError(f"no interaction in {path} names an item of the catalogue")
    return consecutive_pairs(sequences), len(sequences), unknown


class Embedder:
    """Embeds a catalogue for tokenizers; those of one text encoder and template share the work and the memory.

    Args:
        catalogue: The items.
        cache: A directory that keeps embeddings of texts, see `models.embedding_cache`.
        embeddings: (N, D) float32 by row of the catalogue, for tokenizers that take embeddings only.

    Raises:
        ValueError: There is not one embedding for each item.
    """

    def __init__(self, catalogue: Catalogue, cache: Path | None = None, embeddings: Tensor | None = None) -> None:
        self._catalogue = catalogue
        self._cache = cache
        self._spaces: dict[str, Space] = {}
        self._further: dict[int, dict[str, Tensor]] = {}
        if embeddings is None and not catalogue.takes_text:
            embeddings = read_embeddings(catalogue.path)
        if embeddings is not None and len(embeddings) != len(catalogue.item_ids):
            raise ValueError(f"there are {len(embeddings):,} embeddings for {len(catalogue.item_ids):,} items")
        self._given = embeddings

    def space(self, tokenizer: Tokenizer) -> Space:
        """The catalogue as this tokenizer sees it.

        Raises:
            ValueError: The tokenizer takes what the catalogue does not have.
        """
        encoder, given = tokenizer.text_encoder, self._given
        if encoder is not None and self._catalogue.takes_text:
            key = json.dumps([encoder.components, asdict(tokenizer.template)], sort_keys=True)
            if key not in self._spaces:
                self._spaces[key] = self._of_texts(encoder, tokenizer.template)
            return self._spaces[key]
        if given is None:
            raise ValueError(
                f"{tokenizer.full_name} takes embeddings only, and the catalogue has texts: give the items' embeddings"
            )
        if given.shape[1] != tokenizer.dimension:
            raise ValueError(
                f"{tokenizer.full_name} takes embeddings of {tokenizer.dimension} numbers, these have {given.shape[1]}"
            )
        if "" not in self._spaces:
            self._spaces[""] = Space(torch.arange(len(given)), given, embedding_digests(given))
        return self._spaces[""]

    def embed(self, space: Space, texts: Sequence[str]) -> Tensor:
        """The embeddings (n, D) of other texts than the catalogue's, such as paraphrases, in a space of texts."""
        assert space.text_encoder is not None
        known = self._further.setdefault(id(space), {})
        if missing := [text for text in dict.fromkeys(texts) if text not in known]:
            known.update(zip(missing, embed_texts(space.text_encoder, missing, self._cache), strict=True))
        return torch.stack([known[text] for text in texts])

    def _of_texts(self, encoder: TextEncoder, template: TextTemplate) -> Space:
        texts = [item.content(template) for item in self._catalogue.items()]
        rows = torch.tensor([row for row, text in enumerate(texts) if text], dtype=torch.int64)
        if not len(rows):
            raise ValueError(f"no item of {self._catalogue.path} has a text")
        embeddings = embed_texts(encoder, [text for text in texts if text], self._cache)
        digests = [text_digest(text) if text else None for text in texts]
        return Space(rows, embeddings, digests, encoder, template)


def _category_path(item: CatalogueItem) -> tuple[str, ...]:
    value = item.fields.get("categories") or ()
    parts = value.split(">") if isinstance(value, str) else value
    return tuple(part.strip() for part in parts if part.strip())

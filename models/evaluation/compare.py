"""Tokenizers side by side on one catalogue: load each, encode, measure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.catalogue import read_embeddings
from models.checkpoint import load, read_manifest
from models.evaluation.cold_start import ColdStart, cold_start
from models.evaluation.figures import Material, Measurement, Result, Subject, growth_of, resolved
from models.evaluation.index_file import read_index
from models.evaluation.material import Catalogue, Embedder, Space, read_catalogue, read_pairs
from models.evaluation.paraphrases import PARAPHRASES, paraphrase
from models.evaluation.unseen import Unseen, unseen_items
from models.tokenizer import Tokenizer

CHUNK_ROWS = 8192

# Unseen items in common below which each tokenizer is measured on its own.
FEWEST_IN_COMMON = 100


@dataclass(frozen=True)
class CompareConfig:
    """What is drawn, and how much of it.

    Attributes:
        seed: Of every sample.
        queries: Items whose neighbours are searched, of all and of unseen ones each.
        paraphrased: Items whose text is paraphrased, unseen ones first; 0 leaves stability out.
    """

    seed: int = 0
    queries: int = 1000
    paraphrased: int = 300


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


@dataclass(frozen=True)
class Comparison:
    """The report.

    Attributes:
        catalogue: File, digest and number of items.
        interactions: File, users, pairs; None where there are none.
        config: What was drawn.
        unseen_in_common: Items that no tokenizer saw, on which all are measured; None where each is measured on its own
            unseen items, and the figures on them do not compare.
        results: A tokenizer each, in the order given.
    """

    catalogue: dict[str, Any]
    interactions: dict[str, Any] | None
    config: CompareConfig
    unseen_in_common: int | None
    results: tuple[Result, ...]

    def as_dict(self) -> dict[str, Any]:
        """JSON types only."""
        content = {"format": 1, **asdict(self)}
        for result in content["results"]:
            sizes = result["collisions"]["group_sizes"]
            result["collisions"]["group_sizes"] = {str(size): count for size, count in sizes.items()}
        return content


def compare(
    sources: Sequence[Path], inputs: Inputs, config: CompareConfig | None = None, say: Callable[[str], None] = print
) -> Comparison:
    """Measure checkpoints and index files on a catalogue.

    Args:
        sources: Directories of checkpoints, and index files (`.json`).
        inputs: What they are measured on.
        config: What is drawn.
        say: Takes lines for the user.

    Raises:
        ValueError: Something cannot be read, or does not fit the catalogue.
        CheckpointError: A checkpoint cannot be loaded.
    """
    config = config or CompareConfig()
    catalogue = read_catalogue(inputs.catalogue, inputs.key_column)
    pairs, notes = torch.empty(0, 2, dtype=torch.int64), None
    if inputs.interactions:
        pairs, users, unknown = read_pairs(inputs.interactions, catalogue.item_ids)
        notes = {"file": _short(inputs.interactions), "users": users, "pairs": len(pairs), "unknown": unknown}
    reader = _Reader(catalogue, inputs, say)
    sources_read = []
    for source in sources:
        say(f"encoding the catalogue with {source.name}")
        sources_read.append(reader.read(source))
    common = _in_common([read.subject for read in sources_read])
    paraphraser = _Paraphraser(reader, common, config)
    material = Material(len(catalogue.item_ids), catalogue.categories, pairs, config.queries, config.seed)
    results = []
    for read in _named_apart(sources_read):
        say(f"measuring {read.subject.name}")
        results.append(_measure(paraphraser.applied(read), material, common))
    return Comparison(
        catalogue={"file": _short(inputs.catalogue), "sha256": catalogue.sha256, "items": len(catalogue.item_ids)},
        interactions=notes,
        config=config,
        unseen_in_common=None if common is None else int(common.sum()),
        results=tuple(results),
    )


class Read(NamedTuple):
    """A source, encoded: its codes, and what encodes further texts, where anything does."""

    subject: Subject
    tokenizer: Tokenizer | None = None
    space: Space | None = None


class _Reader:
    """Turns sources into codes of one catalogue."""

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


class _Paraphraser:
    """Paraphrases the same items for every tokenizer: those that none of them saw first, then others, by lot."""

    def __init__(self, reader: _Reader, common: Tensor | None, config: CompareConfig) -> None:
        self._embedder = reader.embedder
        self._seed = config.seed
        count = len(reader.catalogue.item_ids)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(config.seed))
        if common is not None:
            order = order[(~common[order]).int().argsort(stable=True)]
        rows = sorted(order[: config.paraphrased].tolist()) if reader.catalogue.takes_text else []
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


def _in_common(subjects: Sequence[Subject]) -> Tensor | None:
    """(N,) bool, the items that none of those that know it saw; None where these are too few."""
    known = [subject.unseen.rows for subject in subjects if subject.unseen.rows is not None]
    if not known:
        return None
    common = torch.stack(known).all(dim=0)
    alike = all(torch.equal(rows, common) for rows in known)
    return common if alike or int(common.sum()) >= FEWEST_IN_COMMON else None


def _measure(subject: Subject, material: Material, common: Tensor | None) -> Result:
    measurement = Measurement(subject, material)
    found = measurement.collisions
    manifest, unseen = subject.manifest, subject.unseen
    rows = unseen.rows if common is None or unseen.rows is None else common
    mask = None if rows is None else rows[subject.rows]
    return Result(
        name=subject.name,
        kind="checkpoint" if manifest else "index",
        family=manifest.family if manifest else None,
        codebook_sizes=subject.codebook_sizes,
        prefix_is_coarse_to_fine=manifest.prefix_is_coarse_to_fine if manifest else None,
        items=len(subject.rows),
        collisions=found,
        collisions_by_depth=tuple(measurement.groups.collisions_by_depth()),
        resolved=resolved(found, manifest.max_suffix if manifest else None),
        growth=growth_of(found),
        on_all=measurement.figures(torch.ones(len(subject.rows), dtype=torch.bool)),
        unseen_items=None if unseen.rows is None else int(unseen.rows[subject.rows].sum()),
        unseen_how=unseen.how,
        on_unseen=measurement.figures(mask) if mask is not None and bool(mask.any()) else None,
        cold_start=_cold_start(measurement, material),
    )


def _cold_start(measurement: Measurement, material: Material) -> ColdStart | None:
    subject = measurement.subject
    if subject.manifest is None or subject.unseen.rows is None or subject.embeddings is None or subject.errors is None:
        return None
    quantiles = subject.manifest.report.get("quantization_error", {})
    return cold_start(
        measurement.groups,
        subject.embeddings,
        subject.errors,
        subject.unseen.rows[subject.rows],
        sample=material.queries,
        training_q95=quantiles.get("q95"),
        seed=material.seed,
    )


def _named_apart(sources: Sequence[Read]) -> list[Read]:
    """Checkpoints of one name get their fingerprint, and what is then still alike a number."""
    names = [read.subject.name for read in sources]
    taken: list[str] = []
    found = []
    for read in sources:
        manifest = read.subject.manifest
        name = manifest.full_name if manifest and names.count(manifest.name) > 1 else read.subject.name
        taken.append(name)
        name = name if taken.count(name) == 1 else f"{name} ({taken.count(name)})"
        found.append(read._replace(subject=replace(read.subject, name=name)))
    return found


def _short(path: Path) -> str:
    """A file's last two parts: what lies above is the machine's business."""
    return "/".join(path.parts[-2:])

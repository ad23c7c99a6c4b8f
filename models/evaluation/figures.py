"""The figures of one tokenizer on one catalogue: on all items, and on those that it never saw."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from models.checkpoint import Manifest
from models.evaluation.cold_start import ColdStart
from models.evaluation.measures import Collisions, LevelUsage, collisions, usage
from models.evaluation.neighbours import NeighboursKept, nearest, neighbours_kept
from models.evaluation.paraphrases import Kept, kept
from models.evaluation.prefixes import (
    Consecutive,
    GrowthPoint,
    PrefixGroups,
    Purity,
    consecutive,
    growth,
    purity_by_depth,
)
from models.evaluation.unseen import Unseen

CHUNK_ROWS = 8192


@dataclass(frozen=True)
class Subject:
    """A tokenizer's codes of a catalogue, and what else is known of them.

    Attributes:
        name: By which the report calls it.
        manifest: The checkpoint's; None for a published index file, of which nothing but its codes is known.
        rows: (n,) int64, the catalogue's rows that have codes.
        codes: (n, L) int64.
        codebook_sizes: K_l for each level.
        unseen: What is known of the items never seen.
        embeddings: (n, D) float32; None for an index file.
        misses: (n,) float, |x - x^|^2; likewise.
        errors: (n,) float, |z - q|^2; likewise.
        paraphrased: Kind -> the positions (m,) int64 in `rows` of items that the kind changes, and their codes (m, L)
            after the change.
    """

    name: str
    manifest: Manifest | None
    rows: Tensor
    codes: Tensor
    codebook_sizes: tuple[int, ...]
    unseen: Unseen
    embeddings: Tensor | None = None
    misses: Tensor | None = None
    errors: Tensor | None = None
    paraphrased: Mapping[str, tuple[Tensor, Tensor]] | None = None


@dataclass(frozen=True)
class Material:
    """What figures are computed from besides a subject; everything by row of the catalogue.

    Attributes:
        items: N.
        categories: Name of a category level -> (N,) int64, -1 where an item has none.
        pairs: Consecutive items of users (P, 2) int64.
        queries: Items, at most, whose neighbours are searched.
        seed: Of every sample.
    """

    items: int
    categories: Mapping[str, Tensor]
    pairs: Tensor
    queries: int = 1000
    seed: int = 0


@dataclass(frozen=True)
class Figures:
    """Figures on some of the items. Their groups, neighbours and most frequent categories are those of the catalogue.

    Attributes:
        items: How many.
        colliding: Share of them that share all codes with another item of the catalogue.
        levels: Usage of each level's codewords by them.
        reconstruction_error: |x - x^|^2 as a share of their variance; None where they have none, as a single item.
        purity: By name of the category level.
        consecutive: Of pairs with at least one of them.
        neighbours: Of a sample of them.
        stability: By kind of paraphrase, of a sample of them.
    """

    items: int
    colliding: float
    levels: tuple[LevelUsage, ...]
    reconstruction_error: float | None
    purity: Mapping[str, Purity]
    consecutive: Consecutive | None
    neighbours: NeighboursKept | None
    stability: Mapping[str, Kept]


@dataclass(frozen=True)
class Resolved:
    """Collisions after the suffix, which tells the items of a group apart: 0 for its first, 1 for its second, ...

    Attributes:
        with_suffix: Share of the items whose suffix is above 0; as large as the raw rate.
        largest_suffix: The largest one.
        max_suffix: The largest one that the tokenizer allows; None without bound.
        beyond: Items whose suffix would exceed it: they are refused, or moved to the next-nearest codeword.
    """

    with_suffix: float
    largest_suffix: int
    max_suffix: int | None
    beyond: int


@dataclass(frozen=True)
class Result:
    """All that is measured of one tokenizer.

    Attributes:
        name: See `Subject`.
        kind: "checkpoint" or "index".
        family: The tokenizer's; None for an index.
        codebook_sizes: K_l for each level.
        prefix_is_coarse_to_fine: The manifest's word; None for an index.
        items: Items of the catalogue that have codes.
        collisions: Raw, of all of them.
        collisions_by_depth: 1 - distinct prefixes / N of 1, 2, ..., L codes.
        resolved: After the suffix.
        growth: Raw collisions as the catalogue grows.
        on_all: Figures on all items.
        unseen_items: How many the tokenizer never saw; None where that is not known.
        unseen_how: How that is known, or why not.
        on_unseen: Figures on them; None where there are none or nothing is known.
        cold_start: Unseen items beside seen ones.
    """

    name: str
    kind: str
    family: str | None
    codebook_sizes: tuple[int, ...]
    prefix_is_coarse_to_fine: bool | None
    items: int
    collisions: Collisions
    collisions_by_depth: tuple[float, ...]
    resolved: Resolved
    growth: tuple[GrowthPoint, ...]
    on_all: Figures
    unseen_items: int | None
    unseen_how: str
    on_unseen: Figures | None
    cold_start: ColdStart | None


class Measurement:
    """Computes figures of one subject; what several of them need is computed once.

    Args:
        subject: Whose codes.
        material: What they are measured on.
    """

    def __init__(self, subject: Subject, material: Material) -> None:
        self.subject = subject
        self.groups = PrefixGroups(subject.codes)
        self._material = material
        position = torch.full((material.items,), -1, dtype=torch.int64)
        position[subject.rows] = torch.arange(len(subject.rows))
        pairs = position[material.pairs]
        self._pairs = pairs[(pairs >= 0).all(dim=1)]
        self._categories = {name: numbers[subject.rows] for name, numbers in material.categories.items()}

    @property
    def collisions(self) -> Collisions:
        """Raw, of all items."""
        return collisions(self.subject.codes, self.subject.embeddings)

    def figures(self, counted: Tensor) -> Figures:
        """Figures on the items of a mask (n,) bool, at least one."""
        rows = counted.nonzero().flatten()
        codes = self.subject.codes
        purities = {
            name: purity_by_depth(self.groups, numbers, rows, self._material.seed)
            for name, numbers in self._categories.items()
        }
        return Figures(
            items=len(rows),
            colliding=float((self.groups.sizes(self.groups.depths)[rows] > 1).double().mean()),
            levels=usage(codes[rows], self.subject.codebook_sizes),
            reconstruction_error=self._reconstruction(rows),
            purity={name: purity for name, purity in purities.items() if purity},
            consecutive=consecutive(self.groups, self._pairs[counted[self._pairs].any(dim=1)]),
            neighbours=self._neighbours(rows),
            stability=self._stability(counted),
        )

    def _reconstruction(self, rows: Tensor) -> float | None:
        embeddings, misses = self.subject.embeddings, self.subject.misses
        if embeddings is None or misses is None:
            return None
        parts = rows.split(CHUNK_ROWS)
        centre = torch.stack([embeddings[part].double().sum(dim=0) for part in parts]).sum(dim=0) / len(rows)
        variance = sum(float((embeddings[part] - centre).square().sum()) for part in parts)
        # Equal embeddings have a little of it all the same, from rounding.
        squares = sum(float(embeddings[part].double().square().sum()) for part in parts)
        return float(misses[rows].sum()) / variance if variance > 1e-12 * squares else None

    def _neighbours(self, rows: Tensor) -> NeighboursKept | None:
        if self.subject.embeddings is None or len(self.subject.rows) < 2:
            return None
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self._material.seed))
        queries = rows[order[: self._material.queries]]
        return neighbours_kept(self.groups, queries, nearest(self.subject.embeddings, queries))

    def _stability(self, counted: Tensor) -> dict[str, Kept]:
        found = {}
        for kind, (rows, after) in (self.subject.paraphrased or {}).items():
            chosen = counted[rows]
            if bool(chosen.any()):
                found[kind] = kept(self.subject.codes[rows[chosen]], after[chosen])
        return found


def growth_of(found: Collisions) -> tuple[GrowthPoint, ...]:
    """Raw collisions as the catalogue grows."""
    return tuple(growth(found.group_sizes))


def resolved(found: Collisions, max_suffix: int | None) -> Resolved:
    """What the suffix makes of raw collisions."""
    room = None if max_suffix is None else max_suffix + 1
    beyond = 0 if room is None else sum(max(0, size - room) * count for size, count in found.group_sizes.items())
    return Resolved(found.rate, found.largest_group - 1, max_suffix, beyond)

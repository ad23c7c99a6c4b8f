"""The live Semantic IDs as a trie: what a decoder may say next.

Level by level in compressed sparse rows. A node of depth l is a prefix of l numbers that leads to a live ID; depth 0
has one node, the root. The numbers that may follow a node are an edge each, and edge e of level l leads to node e of
depth l + 1, so the edges need no pointers. The last level, L, holds the collision suffixes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from safetensors.torch import load, save
from torch import Tensor

from models.trie_levels import Levels, compressed, places, settled, updated

FORMAT = 1


class DeadPrefix(ValueError):
    """A prefix leads to no live ID; to go on from it would disable the constraint."""


@dataclass(frozen=True)
class Trie:
    """A trie of live Semantic IDs.

    Attributes:
        codebook_sizes: K_l for each of the L levels.
        revision: Of the record, up to which all changes are in it.
        offsets: For each level 0 to L, (nodes of depth l + 1,) int64: the edges of node n are `offsets[n]` up to
            `offsets[n + 1]`.
        numbers: For each level 0 to L, (edges,) int64: codes, and suffixes on the last level; ascending at each node.
    """

    codebook_sizes: tuple[int, ...]
    revision: int
    offsets: tuple[Tensor, ...]
    numbers: tuple[Tensor, ...]

    @classmethod
    def of(cls, semantic_ids: Tensor, codebook_sizes: Sequence[int], revision: int = 0) -> Trie:
        """The trie of semantic_ids (N, L + 1) int64, in any order; the same one twice counts once.

        Raises:
            ValueError: The shape does not fit the codebooks, or a number is out of range.
        """
        _check(semantic_ids, codebook_sizes)
        rows, _ = settled(semantic_ids, torch.ones_like(semantic_ids[:, 0], dtype=torch.bool))
        return cls(tuple(codebook_sizes), revision, *compressed(rows))

    def updated(self, semantic_ids: Tensor, live: Tensor, revision: int) -> Trie:
        """The trie after changes, in the order they were made: the last one of an ID counts.

        Costs a search for each change, and a copy of each level in which something came or went: so apply many changes
        at once.

        Args:
            semantic_ids: (C, L + 1) int64, the IDs that came or went.
            live: (C,) bool, whether it came.
            revision: Of the last change.

        Raises:
            ValueError: The shape does not fit the codebooks, or a number is out of range.
        """
        _check(semantic_ids, self.codebook_sizes)
        device = self.numbers[0].device
        rows, live = settled(semantic_ids.to(device), live.to(device))
        return Trie(self.codebook_sizes, revision, *updated(self._levels, rows, live))

    def semantic_ids(self) -> Tensor:
        """All live IDs, (N, L + 1) int64, in order."""
        return self._rows(torch.arange(len(self.numbers[-1]), device=self.numbers[-1].device))

    def holds(self, semantic_ids: Tensor) -> Tensor:
        """Which IDs (B, L + 1) int64, on the trie's device, are live: (B,) bool."""
        self._check_depth(semantic_ids, len(self.numbers), len(self.numbers))
        return places(semantic_ids, self._levels)[-1].found

    def allowed(self, prefixes: Tensor) -> Tensor:
        """Which numbers may follow each prefix.

        Args:
            prefixes: (B, t) int64, t from 0 to L, on the trie's device.

        Returns:
            (B, V) bool; V is the size of the next codebook, after L codes one more than the highest live suffix.

        Raises:
            DeadPrefix: One leads to no live ID.
            ValueError: The shape is wrong.
        """
        mask = self.reachable(prefixes)
        live = mask.any(dim=1)
        if not bool(live.all()):
            row = int((~live).nonzero()[0])
            msg = f"prefix {row} of the batch, {prefixes[row].tolist()}, leads to no live Semantic ID"
            raise DeadPrefix(msg)
        return mask

    def reachable(self, prefixes: Tensor) -> Tensor:
        """As `allowed`, but nothing follows a dead prefix: its row has no True. For callers who raise themselves."""
        self._check_depth(prefixes, 0, len(self.codebook_sizes))
        level = prefixes.shape[1]
        offsets, numbers = self.offsets[level], self.numbers[level]
        mask = torch.zeros(len(prefixes), self._vocabulary(level), dtype=torch.bool, device=prefixes.device)
        if not len(prefixes) or not len(numbers):
            return mask
        if level:
            nodes, live = places(prefixes, self._levels)[-1]
            nodes = nodes.clamp(max=len(offsets) - 2)
        else:
            nodes, live = torch.zeros_like(mask[:, 0], dtype=torch.int64), torch.ones_like(mask[:, 0])
        first, end = offsets[nodes], offsets[nodes + 1]
        # Rows with fewer edges than the widest repeat their last one.
        edges = first[:, None] + torch.arange(int((end - first).max()), device=nodes.device)
        edges = torch.minimum(edges, end[:, None] - 1)
        return mask.scatter_(1, numbers[edges], value=True) & live[:, None]

    @cached_property
    def suffixes(self) -> int:
        """One more than the highest live suffix."""
        return int(self.numbers[-1].max()) + 1 if len(self.numbers[-1]) else 0

    def with_suffixes_below(self, suffixes: int) -> Trie:
        """The trie without the IDs that so few suffixes cannot say; made once, and itself where there are none."""
        if self.suffixes <= suffixes:
            return self
        if suffixes not in self._narrower:
            beyond = self._rows((self.numbers[-1] >= suffixes).nonzero().flatten())
            gone = torch.zeros(len(beyond), dtype=torch.bool, device=beyond.device)
            self._narrower[suffixes] = self.updated(beyond, gone, self.revision)
        return self._narrower[suffixes]

    def to(self, device: torch.device | str) -> Trie:
        """The same trie on a device."""
        offsets = tuple(tensor.to(device) for tensor in self.offsets)
        return Trie(self.codebook_sizes, self.revision, offsets, tuple(tensor.to(device) for tensor in self.numbers))

    def to_bytes(self) -> bytes:
        """As safetensors: `offsets.<l>` and `numbers.<l>`, int32, l from 0 to L; facts as JSON in the metadata."""
        tensors = {f"offsets.{level}": tensor for level, tensor in enumerate(self.offsets)}
        tensors |= {f"numbers.{level}": tensor for level, tensor in enumerate(self.numbers)}
        facts = {"format": FORMAT, "revision": self.revision, "codebook_sizes": list(self.codebook_sizes)}
        # In one member, as safetensors writes several in any order: equal tries are equal bytes.
        return save(
            {name: tensor.to("cpu", torch.int32) for name, tensor in tensors.items()}, {"trie": json.dumps(facts)}
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> Trie:
        """What `to_bytes` wrote, and `GET /trie` answers.

        Raises:
            ValueError: It is of another format.
        """
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        facts = json.loads(header.get("__metadata__", {}).get("trie", "{}"))
        if facts.get("format") != FORMAT:
            msg = f"the trie has format {facts.get('format')!r}; this version reads format {FORMAT}"
            raise ValueError(msg)
        sizes = tuple(facts["codebook_sizes"])
        levels = range(len(sizes) + 1)
        offsets = tuple(tensors[f"offsets.{level}"].long() for level in levels)
        return cls(sizes, facts["revision"], offsets, tuple(tensors[f"numbers.{level}"].long() for level in levels))

    @cached_property
    def _narrower(self) -> dict[int, Trie]:
        return {}

    def _rows(self, edges: Tensor) -> Tensor:
        """The IDs (E, L + 1) to which edges (E,) of the last level lead."""
        columns = []
        for offsets, numbers in zip(reversed(self.offsets), reversed(self.numbers), strict=True):
            columns.append(numbers[edges])
            edges = torch.searchsorted(offsets, edges, right=True) - 1
        return torch.stack(columns[::-1], dim=1)

    @property
    def _levels(self) -> Levels:
        return Levels(self.offsets, self.numbers)

    def _vocabulary(self, level: int) -> int:
        return self.codebook_sizes[level] if level < len(self.codebook_sizes) else self.suffixes

    def _check_depth(self, rows: Tensor, least: int, most: int) -> None:
        if rows.ndim != 2 or not least <= rows.shape[1] <= most or rows.dtype != torch.int64:
            msg = f"prefixes are {tuple(rows.shape)} {rows.dtype}, expected (B, {least} to {most}) int64"
            raise ValueError(msg)


def _check(semantic_ids: Tensor, codebook_sizes: Sequence[int]) -> None:
    levels = len(codebook_sizes)
    if semantic_ids.ndim != 2 or semantic_ids.shape[1] != levels + 1 or semantic_ids.dtype != torch.int64:
        msg = f"semantic_ids are {tuple(semantic_ids.shape)} {semantic_ids.dtype}, expected (N, {levels + 1}) int64"
        raise ValueError(msg)
    highest = torch.tensor([*codebook_sizes, 2**31], device=semantic_ids.device)
    if bool(((semantic_ids < 0) | (semantic_ids >= highest)).any()):
        msg = f"a number is out of range; codebook sizes are {tuple(codebook_sizes)}"
        raise ValueError(msg)

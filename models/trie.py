"""The live Semantic IDs as a trie: what a decoder may say next.

Level by level in compressed sparse rows. A node of depth l is a prefix of l numbers that leads to a live ID; depth 0
has one node, the root. The numbers that may follow a node are an edge each, and edge e of level l leads to node e of
depth l + 1, so the edges need no pointers. The last level, L, holds the collision suffixes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from safetensors.torch import load, save
from torch import Tensor

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
        live = torch.ones(len(semantic_ids), dtype=torch.bool, device=semantic_ids.device)
        return cls(tuple(codebook_sizes), revision, *_compressed(_settled(semantic_ids, live)))

    def updated(self, semantic_ids: Tensor, live: Tensor, revision: int) -> Trie:
        """The trie after changes, in the order they were made: the last one of an ID counts.

        Costs a sort of all IDs, so apply many changes at once.

        Args:
            semantic_ids: (C, L + 1) int64, the IDs that came or went.
            live: (C,) bool, whether it came.
            revision: Of the last change.

        Raises:
            ValueError: The shape does not fit the codebooks, or a number is out of range.
        """
        _check(semantic_ids, self.codebook_sizes)
        before = self.semantic_ids()
        all_live = torch.cat([torch.ones_like(before[:, 0], dtype=torch.bool), live.to(before.device)])
        rows = torch.cat([before, semantic_ids.to(before.device)])
        return Trie(self.codebook_sizes, revision, *_compressed(_settled(rows, all_live)))

    def semantic_ids(self) -> Tensor:
        """All live IDs, (N, L + 1) int64, in order."""
        nodes = torch.arange(len(self.numbers[-1]), device=self.numbers[-1].device)
        columns = []
        for offsets, numbers in zip(reversed(self.offsets), reversed(self.numbers), strict=True):
            columns.append(numbers[nodes])
            nodes = torch.searchsorted(offsets, nodes, right=True) - 1
        return torch.stack(columns[::-1], dim=1)

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
        if prefixes.ndim != 2 or prefixes.shape[1] >= len(self.numbers) or prefixes.dtype != torch.int64:
            levels = len(self.codebook_sizes)
            msg = f"prefixes are {tuple(prefixes.shape)} {prefixes.dtype}, expected (B, 0 to {levels}) int64"
            raise ValueError(msg)
        nodes = self._nodes(prefixes)
        level = prefixes.shape[1]
        first, end = self.offsets[level][nodes], self.offsets[level][nodes + 1]
        self._require_live(end > first, prefixes)
        width = int((end - first).max()) if len(nodes) else 0
        edges = first[:, None] + torch.arange(width, device=nodes.device)
        # Rows with fewer edges repeat their last one.
        numbers = self.numbers[level][torch.minimum(edges, end[:, None] - 1)]
        mask = torch.zeros(len(prefixes), self._vocabulary(level), dtype=torch.bool, device=nodes.device)
        return mask.scatter_(1, numbers, value=True)

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

    def _nodes(self, prefixes: Tensor) -> Tensor:
        """The node (B,) of each prefix, a binary search a level."""
        nodes = torch.zeros(len(prefixes), dtype=torch.int64, device=prefixes.device)
        for level, codes in enumerate(prefixes.unbind(dim=1)):
            nodes = self._step(level, nodes, codes, prefixes)
        return nodes

    def _step(self, level: int, nodes: Tensor, codes: Tensor, prefixes: Tensor) -> Tensor:
        """The edge, and so the next node, by each code: the edge's number is searched for among its node's only."""
        offsets, numbers = self.offsets[level], self.numbers[level]
        first, end = offsets[nodes], offsets[nodes + 1]
        last = end.clone()
        for _ in range(self.codebook_sizes[level].bit_length()):
            middle = (first + last) // 2
            open_ = first < last
            below = open_ & (numbers[middle.clamp(max=len(numbers) - 1)] < codes) if len(numbers) else open_
            first = torch.where(below, middle + 1, first)
            last = torch.where(open_ & ~below, middle, last)
        found = first < end
        if len(numbers):
            found &= numbers[first.clamp(max=len(numbers) - 1)] == codes
        self._require_live(found, prefixes)
        return first

    def _require_live(self, live: Tensor, prefixes: Tensor) -> None:
        if not bool(live.all()):
            row = int((~live).nonzero()[0])
            msg = f"prefix {row} of the batch, {prefixes[row].tolist()}, leads to no live Semantic ID"
            raise DeadPrefix(msg)

    def _vocabulary(self, level: int) -> int:
        if level < len(self.codebook_sizes):
            return self.codebook_sizes[level]
        return int(self.numbers[level].max()) + 1 if len(self.numbers[level]) else 0


def _check(semantic_ids: Tensor, codebook_sizes: Sequence[int]) -> None:
    levels = len(codebook_sizes)
    if semantic_ids.ndim != 2 or semantic_ids.shape[1] != levels + 1 or semantic_ids.dtype != torch.int64:
        msg = f"semantic_ids are {tuple(semantic_ids.shape)} {semantic_ids.dtype}, expected (N, {levels + 1}) int64"
        raise ValueError(msg)
    highest = torch.tensor([*codebook_sizes, 2**31], device=semantic_ids.device)
    if bool(((semantic_ids < 0) | (semantic_ids >= highest)).any()):
        msg = f"a number is out of range; codebook sizes are {tuple(codebook_sizes)}"
        raise ValueError(msg)


def _settled(semantic_ids: Tensor, live: Tensor) -> Tensor:
    """The live rows, sorted, each once: of equal rows the last says whether it is live."""
    order = torch.arange(len(semantic_ids), device=semantic_ids.device)
    for column in reversed(range(semantic_ids.shape[1])):
        order = order[torch.argsort(semantic_ids[order, column], stable=True)]
    rows = semantic_ids[order]
    last = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    last[:-1] = (rows[1:] != rows[:-1]).any(dim=1)
    return rows[last & live[order]]


def _compressed(rows: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Offsets and numbers of each level, of sorted distinct rows (N, L + 1)."""
    begins = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    begins[:1] = True
    parents = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    offsets, numbers = [], []
    nodes = 1
    for column in rows.unbind(dim=1):
        begins = begins.clone()
        begins[1:] |= column[1:] != column[:-1]
        ends = torch.bincount(parents[begins], minlength=nodes).cumsum(dim=0)
        offsets.append(torch.cat([ends.new_zeros(1), ends]))
        numbers.append(column[begins])
        parents = begins.cumsum(dim=0) - 1
        nodes = len(numbers[-1])
    return tuple(offsets), tuple(numbers)

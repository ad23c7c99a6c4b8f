"""The whole live trie of a record at one revision, taken while writes go on.

    revision --> scan of all buckets, a few at a time --> the changes since that revision --> trie

What was acknowledged before the scan began is found by it, or is told by the changes if it has moved since; what the
changes tell is right whatever the scan saw of it. So the trie is that of the last change it has.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from models import Trie
from service.decoding.change_tensors import as_tensors
from service.errors import ChangesGone, RegistryUnavailable
from service.registry.changes import Change
from service.registry.record import Record
from service.semantic_id import CodeLayout

ATTEMPTS = 3
SNAPSHOTS_KEPT = 4
CHANGES_PER_READ = 10_000


class Snapshot(NamedTuple):
    """A trie as it is sent, and of what."""

    record: Record
    revision: int
    data: bytes


class Snapshots:
    """Takes one snapshot at a time, and keeps those of the records last asked for."""

    def __init__(self) -> None:
        self._last: deque[Snapshot] = deque(maxlen=SNAPSHOTS_KEPT)
        self._taking = asyncio.Lock()

    async def of(self, record: Record) -> Snapshot:
        """The live trie of a record, with everything acknowledged before this call.

        Raises:
            RegistryUnavailable: The registry cannot be reached, or changes faster than it can be read.
        """
        async with self._taking:
            last = next((one for one in self._last if one.record is record), None)
            if last is not None:
                self._last.remove(last)
            if last is None or last.revision != await record.changes.revision():
                trie = await take(record)
                last = Snapshot(record, trie.revision, await asyncio.to_thread(trie.to_bytes))
            self._last.append(last)
            return last


async def take(record: Record) -> Trie:
    """The live trie of a record.

    Raises:
        RegistryUnavailable: The registry cannot be reached, or changes faster than it can be read.
    """
    for _ in range(ATTEMPTS):
        try:
            trie = await _scanned(record)
            await record.flush()  # what the scan saw
            return await follow(record, trie)
        except ChangesGone:
            continue
    msg = "The record changes faster than it can be read: keep more changes (SID_CHANGES_KEPT)."
    raise RegistryUnavailable(msg)


async def follow(record: Record, trie: Trie) -> Trie:
    """The trie after all changes since its revision.

    Raises:
        ChangesGone: They are no longer kept.
    """
    changes: list[Change] = []
    revision = trie.revision
    while True:
        found = (await record.changes.after(revision, CHANGES_PER_READ)).changes
        changes += found
        revision = changes[-1].revision if changes else revision
        if len(found) < CHANGES_PER_READ:
            break
    if revision:
        await record.settle()
    if not changes:
        return trie
    told = as_tensors([(change.kind, change.semantic_id) for change in changes], len(trie.codebook_sizes))
    return await asyncio.to_thread(trie.updated, *told, revision)


async def _scanned(record: Record) -> Trie:
    """All IDs that are live during a scan, and perhaps some that were for a part of it."""
    revision = await record.changes.revision()
    levels = len(record.layout.codebook_sizes)
    rows = [torch.empty((0, levels + 1), dtype=torch.int64)]
    if revision:  # else there is nothing, and no bucket to look for it in
        rows += [await asyncio.to_thread(_rows, packed, record.layout) async for packed in record.tree.scan()]
    return await asyncio.to_thread(lambda: Trie.of(torch.cat(rows), record.layout.codebook_sizes, revision))


def _rows(packed: Sequence[bytes], layout: CodeLayout) -> torch.Tensor:
    """Packed IDs as numbers, (N, L + 1) int64."""
    kind = ">u1" if layout.bytes_per_code == 1 else ">u2"
    codes = np.frombuffer(b"".join(field[: layout.width] for field in packed), dtype=kind)
    codes = codes.reshape(-1, len(layout.codebook_sizes)).astype(np.int64)
    suffixes = np.array([int(field[layout.width :]) for field in packed], dtype=np.int64)
    return torch.from_numpy(np.column_stack([codes, suffixes]))

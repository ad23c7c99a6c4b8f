"""Rows on disk for as long as they are trained on, read as if they were in memory.

A spool is a file without a name: it goes when the last who reads it goes, however the process ends. Its rows are
mapped, so the memory they take is the system's page cache, which gives way to whoever needs memory.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import overload

import numpy as np
import torch
from torch import Tensor

from models.chunks import sorted_in_place

# Derived rows up to this size stay in memory.
MEMORY_BYTES = 2**26

# Rows beyond this size are read in the file's order where the order is free.
SEEKING_BYTES = 2**28
PAGE_BYTES = 4096


class RowSpool:
    """Rows of float32, written in any order, then read as one tensor.

    Args:
        width: D.
        directory: Where the file lies, made where it does not exist; the system's directory for temporary files where
            None.
    """

    def __init__(self, width: int, directory: Path | None = None) -> None:
        self._width = width
        self._file = _nameless(self, directory)
        self._rows = 0

    def append(self, rows: Tensor) -> None:
        """Write rows (n, D) after the last one."""
        self.write(self._rows, rows)

    def write(self, first: int, rows: Tensor) -> None:
        """Write rows (n, D) from a row number on."""
        content = np.ascontiguousarray(rows.detach().cpu().numpy(), dtype=np.float32)
        # Writing instead of changing the mapping: a full disk is an OSError, not a signal.
        _write(self._file, content.data.cast("B"), first * 4 * self._width)
        self._rows = max(self._rows, first + len(rows))

    def scatter(self, rows: Sequence[int], values: Tensor) -> None:
        """Write values (n, D) to rows of increasing numbers."""
        numbers = np.asarray(rows)
        breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
        for start, end in pairwise([0, *breaks.tolist(), len(numbers)]):
            self.write(int(numbers[start]), values[start:end])

    def tensor(self) -> Tensor:
        """All rows so far, (N, D) float32, mapped; not to be written to."""
        if not self._rows:
            return torch.empty(0, self._width)
        size = self._rows * 4 * self._width
        # Shared, not private: a private mapping larger than memory is refused by a careful kernel.
        mapping = mmap.mmap(self._file, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        return torch.frombuffer(mapping, dtype=torch.float32).view(self._rows, self._width)


class TextSpool(Sequence[str]):
    """Texts on disk; memory holds where each one begins, 8 bytes.

    Args:
        directory: As of `RowSpool`.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self._file = _nameless(self, directory)
        self._ends = np.zeros(1024, np.int64)
        self._count = 0

    def extend(self, texts: Iterable[str]) -> None:
        """Add texts after the last one."""
        encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
        needed = self._count + len(encoded) + 1
        if needed > len(self._ends):
            self._ends.resize(max(needed, len(self._ends) * 5 // 4), refcheck=False)
        start = self._ends[self._count]
        self._ends[self._count + 1 : needed] = start + np.cumsum([len(text) for text in encoded], dtype=np.int64)
        _write(self._file, memoryview(b"".join(encoded)), int(start))
        self._count += len(encoded)

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | slice) -> str | list[str]:
        if isinstance(row, slice):
            return [self[number] for number in range(*row.indices(self._count))]
        row = range(self._count)[row]
        start, end = int(self._ends[row]), int(self._ends[row + 1])
        return os.pread(self._file, end - start, start).decode("utf-8", "surrogatepass")


def held(parts: Iterable[Tensor], rows: int, width: int, directory: Path | None = None) -> Tensor:
    """The rows of all parts (n, width) float32 as one tensor (rows, width): in memory, or spooled where they are many.

    Args:
        parts: In order; each is let go of before the next one is asked for.
        rows: How many rows they have in all.
        width: Of a row.
        directory: As of `RowSpool`.
    """
    if rows * width * 4 <= MEMORY_BYTES:
        return torch.cat(list(parts))
    spool = RowSpool(width, directory)
    for part in parts:
        spool.append(part)
    return spool.tensor()


def in_reading_order(rows: Tensor, embeddings: Tensor) -> Tensor:
    """Row numbers (n,) as they are; sorted where the embeddings may not fit into memory and a disk has to seek."""
    return sorted_in_place(rows) if embeddings.numel() * 4 > SEEKING_BYTES else rows


def block_rows(embeddings: Tensor) -> int:
    """How many rows that follow each other are read at once in a random order: a page of the disk, or one in memory."""
    return max(1, PAGE_BYTES // (4 * embeddings.shape[1])) if embeddings.numel() * 4 > SEEKING_BYTES else 1


def _nameless(owner: object, directory: Path | None) -> int:
    """The descriptor of a file that no directory lists, closed with its owner."""
    if directory:
        directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=directory) as file:
        descriptor = os.dup(file.fileno())
    weakref.finalize(owner, os.close, descriptor)
    return descriptor


def _write(descriptor: int, content: memoryview, place: int) -> None:
    while content:
        written = os.pwrite(descriptor, content, place)
        content, place = content[written:], place + written

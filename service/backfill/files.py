"""Parquet files, here or in an object store, by paths, patterns and directories."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileType, LocalFileSystem

BUFFER_BYTES = 2**20
"""Bytes of a column that are read at once: a row group may have a million rows."""


class SourceFile(NamedTuple):
    """A file as it was when it was found; what is read later has to be the same.

    Attributes:
        path: Absolute, or a URI.
        size: Bytes.
        changed_ns: When it was changed last, in nanoseconds.
    """

    path: str
    size: int
    changed_ns: int


def find_files(paths: Sequence[str]) -> list[SourceFile]:
    """The files, in the order of the paths; of a pattern or a directory by name. Each stands once.

    Args:
        paths: Files, patterns (`*`, `?`, `[...]` in the last part), directories (all `*.parquet` below them); of this
            machine, or URIs such as `s3://bucket/items/*.parquet`.

    Raises:
        ValueError: Something is not there.
    """
    found: dict[str, SourceFile] = {}
    for path in paths:
        files = list(_find(path))
        if not files:
            raise ValueError(f"{path}: there is no Parquet file")
        for file in files:
            found.setdefault(file.path, file)
    return list(found.values())


def open_parquet(path: str) -> pq.ParquetFile:
    """A file, to be read in bounded memory; the caller closes it.

    Raises:
        ValueError: It cannot be read.
    """
    try:
        filesystem, inner = _located(path)
        return pq.ParquetFile(filesystem.open_input_file(inner), buffer_size=BUFFER_BYTES, pre_buffer=False)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path} cannot be read as Parquet: {error}") from error


def _find(path: str) -> Iterator[SourceFile]:
    head, slash, last = path.rpartition("/")
    is_pattern = re.search(r"[*?\[]", last) is not None
    try:
        filesystem, inner = _located((head + slash or ".") if is_pattern else path)
        prefix = "" if isinstance(filesystem, LocalFileSystem) else path[: path.index("://") + 3]
        if is_pattern:
            entries = [
                entry
                for entry in filesystem.get_file_info(FileSelector(inner))
                if fnmatch(entry.base_name, last) and entry.type == FileType.File
            ]
        else:
            (entry,) = filesystem.get_file_info([inner])
            entries = [entry] if entry.type == FileType.File else []
            if entry.type == FileType.Directory:
                entries = _below(filesystem, inner)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path} cannot be looked at: {error}") from error
    for entry in sorted(entries, key=lambda entry: entry.path):
        yield SourceFile(prefix + entry.path, entry.size, entry.mtime_ns or 0)


def _below(filesystem: FileSystem, directory: str) -> list[FileInfo]:
    """The Parquet files below a directory; what is hidden is another program's."""
    entries = filesystem.get_file_info(FileSelector(directory, recursive=True))
    return [
        entry
        for entry in entries
        if entry.type == FileType.File
        and entry.extension == "parquet"
        and not re.search(r"(^|/)[._]", entry.path[len(directory) :])
    ]


def _located(path: str) -> tuple[FileSystem, str]:
    if "://" in path:
        filesystem, inner = FileSystem.from_uri(path)
        return filesystem, inner
    return LocalFileSystem(), str(Path(path).absolute())

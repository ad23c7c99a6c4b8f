"""Parquet files, here or in an object store, by paths, patterns and directories."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

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
        tag: The object store's ETag of this content; empty where there is none.
    """

    path: str
    size: int
    changed_ns: int
    tag: str


class Location(NamedTuple):
    """A path as its file system has it.

    Attributes:
        filesystem: Of this machine, or an object store.
        path: There.
        scheme: `s3://` and the like; empty on this machine.
        options: The URI's query with its question mark, such as `?region=eu-west-1`.
    """

    filesystem: FileSystem
    path: str
    scheme: str = ""
    options: str = ""

    @classmethod
    def of(cls, path: str) -> Location:
        """Of a path, or a URI.

        Raises:
            ValueError: It is no URI that can be read, or has credentials, which the table would tell.
            OSError: The object store refuses.
        """
        if "://" not in path:
            return cls(LocalFileSystem(), str(Path(path).absolute()))
        if urlsplit(path).username is not None:
            raise ValueError(f"{urlsplit(path).hostname}: credentials go into the environment, not into a path")
        head, question, options = path.partition("?")
        filesystem, inner = FileSystem.from_uri(path)
        if isinstance(filesystem, LocalFileSystem):
            return cls(filesystem, inner)
        return cls(filesystem, inner, head[: head.index("://") + 3], question + options)

    def named(self, path: str) -> str:
        """Another path of this file system, as `of` takes it."""
        return f"{self.scheme}{path}{self.options}"


def find_files(paths: Sequence[str]) -> list[str]:
    """The files, in the order of the paths; of a pattern or a directory by name. Each stands once.

    Args:
        paths: Files, patterns (`*`, `[...]` and, on this machine, `?` in the last part), directories (all `*.parquet`
            below them); of this machine, or URIs such as `s3://bucket/items/*.parquet?region=eu-west-1`.

    Raises:
        ValueError: Something is not there.
    """
    found: dict[str, None] = {}
    for path in paths:
        files = _find(path)
        if not files:
            raise ValueError(f"{path}: there is no Parquet file")
        found.update(dict.fromkeys(files))
    return list(found)


def look_at(path: str) -> SourceFile:
    """A file as it is now.

    Raises:
        ValueError: It cannot be looked at.
    """
    try:
        location = Location.of(path)
        (entry,) = location.filesystem.get_file_info([location.path])
        tag = b""
        if location.scheme:
            with location.filesystem.open_input_file(location.path) as file:
                tag = file.metadata().get("ETag", b"")
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path} cannot be looked at: {error}") from error
    return SourceFile(path, entry.size or 0, entry.mtime_ns or 0, tag.decode(errors="replace"))


def open_parquet(path: str) -> pq.ParquetFile:
    """A file, to be read in bounded memory; the caller closes it.

    Raises:
        ValueError: It cannot be read.
    """
    try:
        location = Location.of(path)
        file = location.filesystem.open_input_file(location.path)
        return pq.ParquetFile(file, buffer_size=BUFFER_BYTES, pre_buffer=False)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path} cannot be read as Parquet: {error}") from error


def _find(path: str) -> list[str]:
    """The files of one path, by name."""
    body, options = path, ""
    if "://" in path:
        body, question, options = path.partition("?")
        options = question + options
    head, slash, last = body.rpartition("/")
    is_pattern = re.search(r"[*?\[]", last) is not None
    try:
        location = Location.of((head + slash or ".") + options if is_pattern else path)
        if is_pattern:
            inside = location.filesystem.get_file_info(FileSelector(location.path))
            entries = [entry for entry in inside if fnmatch(entry.base_name, last)]
        else:
            entries = location.filesystem.get_file_info([location.path])
            if entries[0].type == FileType.Directory:
                entries = _below(location.filesystem, location.path)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path} cannot be looked at: {error}") from error
    return [location.named(entry.path) for entry in sorted(entries, key=lambda entry: entry.path) if entry.is_file]


def _below(filesystem: FileSystem, directory: str) -> list[FileInfo]:
    """The Parquet files below a directory; what is hidden is another program's."""
    return [
        entry
        for entry in filesystem.get_file_info(FileSelector(directory, recursive=True))
        if entry.extension == "parquet" and not re.search(r"(^|/)[._]", entry.path[len(directory) :])
    ]

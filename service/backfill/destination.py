"""Where the table goes: a directory, or a place in an object store. Files appear there whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
from pyarrow.fs import FileSelector, FileType, LocalFileSystem

from models.whole_files import whole_file
from service.backfill.files import Location


class Destination:
    """A place for files.

    Args:
        place: A directory, or the URI of one in an object store.

    Attributes:
        directory: The directory; None in an object store.

    Raises:
        ValueError: It is no URI that can be read, or there is a file.
    """

    def __init__(self, place: str) -> None:
        self._place = place
        try:
            self._location = Location.of(place)
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"{place} cannot be looked at: {error}") from error
        here = isinstance(self._location.filesystem, LocalFileSystem)
        self.directory = Path(self._location.path) if here else None
        if self.directory is not None:
            require_directory(self.directory)

    def __str__(self) -> str:
        return self._place

    def names(self) -> set[str]:
        """What is there: files, and directories too."""
        selector = FileSelector(self._location.path, allow_not_found=True)
        return {entry.base_name for entry in self._location.filesystem.get_file_info(selector)}

    def read(self, name: str) -> bytes | None:
        """What a file says; None where there is none."""
        (entry,) = self._location.filesystem.get_file_info([self._inner(name)])
        if entry.type != FileType.File:
            return None
        with self._location.filesystem.open_input_file(entry.path) as file:
            content: bytes = file.read()
        return content

    @contextmanager
    def writing(self, name: str) -> Iterator[IO[bytes] | Any]:
        """A file to be written bit by bit, which is there when all of it is.

        Raises:
            OSError: It cannot be written.
        """
        if self.directory is not None:
            with whole_file(self.directory / name) as draft, draft.open("wb") as file:
                yield file
        else:
            with self._location.filesystem.open_output_stream(self._inner(name)) as stream:
                yield stream

    def write(self, name: str, content: bytes) -> None:
        """Writes a file.

        Raises:
            OSError: It cannot be written.
        """
        with self.writing(name) as file:
            file.write(content)

    def remove(self, name: str) -> None:
        """Removes a file that is there."""
        self._location.filesystem.delete_file(self._inner(name))

    def _inner(self, name: str) -> str:
        return f"{self._location.path}/{name}"


def require_directory(path: Path) -> None:
    """Raise ValueError where there is a file, and can be no directory."""
    there = next((place for place in (path, *path.parents) if place.exists()), path)
    if there.exists() and not there.is_dir():
        raise ValueError(f"{there} is a file; a directory is needed")

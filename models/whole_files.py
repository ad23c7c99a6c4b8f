"""Files and directories that are there whole or not at all, whatever happens while they are written.

They are written beside their place as a draft, `.NAME-xxxxxxxx.draft`, synced, and renamed. Whoever writes a draft has
its lock for as long, which goes with the process; so a draft that nobody has locked is what a kill left, and goes when
the same place is written again. A draft in use is never touched.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file, whole or not at all, in the place of the one that is there.

    Args:
        path: Its directory is made where it does not exist.
        content: Bytes, or a text as UTF-8.

    Raises:
        OSError: It cannot be written; the file before it is untouched.
    """
    with whole_file(path) as draft:
        draft.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """The same of a file that is written bit by bit, into the draft that this yields.

    Raises:
        OSError: As in `write_whole`.
    """
    with _draft(path, lambda draft: draft.touch(exist_ok=False)) as draft:
        yield draft
        sync(draft)


def stamp_of(path: Path) -> tuple[int, ...] | None:
    """What is another one whenever a file has been written whole again; None where none is to be seen."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size


@contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """A new directory to write files into, which takes its place at the end, whole or not at all.

    Args:
        path: Its place, where there may be an empty directory; the one above is made where it does not exist.

    Raises:
        OSError: It cannot be written, or its place is taken; what is there is untouched.
    """
    with _draft(path, Path.mkdir) as draft:
        yield draft
        for file in draft.iterdir():
            sync(file)
        sync(draft)


def remove_abandoned(path: Path) -> int:
    """Remove the drafts of a file or directory that nobody writes any more; how many there were."""
    name = re.compile(rf"\.{re.escape(path.name)}-[0-9a-f]{{8}}\.draft")
    count = 0
    for draft in path.parent.iterdir() if path.parent.is_dir() else ():
        if not name.fullmatch(draft.name):
            continue
        with suppress(OSError):
            descriptor = os.open(draft, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(draft)
                count += 1
            finally:
                os.close(descriptor)
    return count


def sync(path: Path) -> None:
    """A file's content, or a directory's names, are on disk: the state of a training goes once its result is there."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _draft(path: Path, make: Callable[[Path], None]) -> Iterator[Path]:
    """A locked draft, which at the end takes the place of `path`; of an error it leaves nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(path)
    draft, lock = _locked_draft(path, make)
    try:
        yield draft
        draft.replace(path)
        sync(path.parent)
    except BaseException as error:
        # A full disk names nothing; an error without a number would lose its words to a name.
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(path)
        _remove(draft)
        raise
    finally:
        os.close(lock)


def _locked_draft(path: Path, make: Callable[[Path], None]) -> tuple[Path, int]:
    """A draft, and the descriptor that has its lock."""
    while True:
        draft = path.with_name(f".{path.name}-{secrets.token_hex(4)}.draft")
        make(draft)
        try:
            descriptor = os.open(draft, os.O_RDONLY)
        except FileNotFoundError:  # taken for abandoned before it could be locked
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), draft.stat()):
                return draft, descriptor
        except (BlockingIOError, FileNotFoundError):
            pass
        except OSError:
            # A file system without such locks: nobody can take one to remove the draft either.
            return draft, descriptor
        os.close(descriptor)


def _remove(draft: Path) -> None:
    if draft.is_dir():
        shutil.rmtree(draft, ignore_errors=True)
    else:
        with suppress(OSError):
            draft.unlink()

"""Which directories a checkpoint may be loaded from while the service runs."""

from __future__ import annotations

import stat
from collections.abc import Iterable
from pathlib import Path

from models import CHECKPOINT_FILES, DEFAULT_CHECKPOINT
from service.errors import CheckpointRefused
from service.quoting import quoted


class Directories:
    """Finds checkpoints below roots, wherever links and dots would lead.

    Args:
        roots: Directories below which any checkpoint may be loaded; those that ship lie below a root of their own.
        checkpoints: Further directories, each of one checkpoint.
    """

    def __init__(self, roots: Iterable[Path], checkpoints: Iterable[Path] = ()) -> None:
        self._roots = tuple(root.resolve() for root in (*roots, DEFAULT_CHECKPOINT.parent))
        self._checkpoints = frozenset(directory.resolve() for directory in checkpoints)

    def find(self, checkpoint: str) -> Path:
        """The directory of a checkpoint, resolved.

        Args:
            checkpoint: An absolute path, or one below a root.

        Raises:
            CheckpointRefused: It lies elsewhere, or has not the files of a checkpoint. What lies elsewhere is not
                looked at: the refusal does not tell whether it is there.
        """
        try:
            if ".." in Path(checkpoint).parts:
                raise CheckpointRefused("the path has '..' in it")
            for root in self._roots:  # an absolute path stands for itself, whatever it is joined to
                directory = (root / checkpoint).resolve()
                if self._may(directory) and directory.is_dir():
                    _require_files(directory)
                    return directory
        except (OSError, RuntimeError, ValueError) as error:  # too long, a loop of links, a character no path has
            raise CheckpointRefused(f"{quoted(checkpoint)} is no path that can be read") from error
        raise CheckpointRefused(
            f"there is no directory {quoted(checkpoint)} where checkpoints may be loaded from: below a directory of "
            "SID_CHECKPOINT_DIRS, or those that ship"
        )

    def _may(self, directory: Path) -> bool:
        """Whether a resolved directory lies strictly below a root, or is one of the checkpoints."""
        return directory in self._checkpoints or any(root in directory.parents for root in self._roots)


def _require_files(directory: Path) -> None:
    """Raise CheckpointRefused unless a checkpoint's files are plain files in it: a link may lead out, a pipe nowhere.

    Raises:
        OSError: They cannot be looked at.
    """
    for name in CHECKPOINT_FILES:
        try:
            mode = (directory / name).lstat().st_mode
        except FileNotFoundError:
            pickled = "; what is pickled is never loaded" if _pickled(directory) else ""
            raise CheckpointRefused(f"{name} is missing{pickled}") from None
        if not stat.S_ISREG(mode):
            raise CheckpointRefused(f"{name} is no plain file")


def _pickled(directory: Path) -> bool:
    return any(file.suffix in {".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt"} for file in directory.iterdir())

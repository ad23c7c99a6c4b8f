"""How far each process of a service has followed the plan.

SID_DATA_DIR/tokenizers/process-XXXXXXXX.json    one for each process, which has its lock for as long as it lives
"""

from __future__ import annotations

import fcntl
import os
import secrets
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError


class Report(BaseModel):
    """What a process says.

    Attributes:
        settings: The full names of the tokenizers that its settings name.
        revision: The plan that it follows.
        failures: What it could not load, by full name: why.
    """

    model_config = ConfigDict(frozen=True)

    settings: tuple[str, ...]
    revision: int
    failures: dict[str, str] = {}


class Reports:
    """The reports of the processes that share a data directory; this one's own is there from its first on."""

    def __init__(self, directory: Path) -> None:
        """Nothing is said yet."""
        self._directory = directory
        self._path = directory / f"process-{secrets.token_hex(4)}.json"
        self._descriptor: int | None = None

    def say(self, report: Report) -> None:
        """Say something new."""
        said = report.model_dump_json().encode()
        if self._descriptor is None:
            self._directory.mkdir(parents=True, exist_ok=True)
            draft = self._path.with_suffix(".draft")
            self._descriptor = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
            os.pwrite(self._descriptor, said, 0)
            draft.rename(self._path)  # with its lock: whoever finds it finds it in use
        else:
            os.pwrite(self._descriptor, said, 0)
            os.ftruncate(self._descriptor, len(said))

    def living(self) -> list[Report | None]:
        """What the living processes say; None of one that is just saying something. Those of the dead are removed."""
        return [_said(path) for path in sorted(self._directory.glob("process-*.json")) if _lives(path)]

    def close(self) -> None:
        """Say nothing more."""
        if self._descriptor is not None:
            self._path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None


def _said(path: Path) -> Report | None:
    try:
        return Report.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def _lives(path: Path) -> bool:
    """Whether the process of a report lives; the report of a dead one is removed."""
    with suppress(FileNotFoundError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # as others may ask at the same time
        except BlockingIOError:
            return True
        else:
            path.unlink(missing_ok=True)
        finally:
            os.close(descriptor)
    return False

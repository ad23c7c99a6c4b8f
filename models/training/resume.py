"""The state of an unfinished training, kept in a directory beside the checkpoint to be, so that a kill costs minutes.

`.OUT-training/state.safetensors` holds the weights, the best weights so far, the optimiser's moments and the random
generator's state, and under `state` of its metadata, as JSON, the rest: the stage, the epoch, the schedule, every
record, and the identity of the training, which is what its result is a function of. The file is replaced as a whole
after it was synced, so that a kill, a full disk or a lost power line leave the state before or the state after.

All draws of a training come from one generator, so a training that goes on from a state ends where it would have ended.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from models.training.history import EpochRecord, Measure, record_of
from models.whole_files import remove_abandoned, write_whole

STATE = "state.safetensors"
FORMAT = 1

# Seconds between two writes, so that short epochs do not cost a sync each.
KEEP_EVERY_S = 30.0

_OPTIMISER = "optimiser."


@dataclass(frozen=True)
class Snapshot:
    """A training after one of its epochs.

    Attributes:
        stage: A stage of `models.training.history`.
        epoch: Finished epochs of it.
        model: The state of all modules.
        optimiser: Its `state_dict`.
        schedule: The learning rate's `state_dict`.
        generator: State of the random generator.
        best: The best measurement so far, None before there is one.
        best_state: The state of all modules then; empty before.
        records: So far.
    """

    stage: str
    epoch: int
    model: Mapping[str, Tensor]
    optimiser: Mapping[str, Any]
    schedule: Mapping[str, Any]
    generator: Tensor
    best: Measure | None
    best_state: Mapping[str, Tensor]
    records: tuple[EpochRecord, ...]


class StateDirectory:
    """The directory of one unfinished training, and the lock that keeps a second one out.

    A context manager: at its end the lock is given back, and a directory without any state is removed.

    Args:
        directory: Made where it does not exist.
        keep_every_s: `offer` writes no more often.

    Attributes:
        identity: What the result is a function of, JSON types only: data, settings, versions. To be set before a state
            is read or written.

    Raises:
        OSError: It cannot be made or written to, or another process is at work in it.
    """

    def __init__(self, directory: Path, keep_every_s: float = KEEP_EVERY_S) -> None:
        self.directory = directory
        self.identity: Mapping[str, Any] = {}
        self._keep_every_s = keep_every_s
        self._written = time.monotonic()
        self._lock = _locked(directory)

    def read(self) -> Snapshot | None:
        """The state to go on from, None where there is none.

        Raises:
            ValueError: It is of another training (says what differs), or cannot be read.
        """
        path = self.directory / STATE
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                content = json.loads(file.metadata()["state"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            _require_format(content)
            differences = _differences(content["identity"], json.loads(json.dumps(self.identity)))
            snapshot = _unpacked(tensors, content)
        except (SafetensorError, OSError, RuntimeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} cannot be read: {error}; start over with --fresh") from error
        if differences:
            raise ValueError(
                f"{self.directory} holds the unfinished state of another training (--fresh starts over):\n  "
                + "\n  ".join(differences)
            )
        return snapshot

    def offer(self, snapshot: Snapshot) -> bool:
        """Write the state unless one was written moments ago; whether it was.

        Raises:
            OSError: It cannot be written; the state before it is untouched.
        """
        if time.monotonic() - self._written < self._keep_every_s:
            return False
        self.write(snapshot)
        return True

    def write(self, snapshot: Snapshot) -> None:
        """Write the state.

        Raises:
            OSError: It cannot be written; the state before it is untouched.
        """
        tensors, content = _packed(snapshot)
        metadata = {"state": json.dumps({"format": FORMAT, "identity": self.identity, **content})}
        try:
            write_whole(self.directory / STATE, save(tensors, metadata))
        except OSError as error:
            raise OSError(
                f"the state after {snapshot.stage} epoch {snapshot.epoch} cannot be kept in {self.directory}: "
                f"{error.strerror}; what was kept before is untouched, and the same command goes on from it"
            ) from error
        self._written = time.monotonic()

    def clear(self) -> None:
        """Forget the state: the training starts over, or it is done."""
        (self.directory / STATE).unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        remove_abandoned(self.directory / STATE)
        if not (self.directory / STATE).exists():
            shutil.rmtree(self.directory, ignore_errors=True)
        self._lock.close()


def _locked(directory: Path) -> IO[str]:
    """The open lock of a directory, which is made where it does not exist.

    Raises:
        OSError: It cannot be made or written to, or another process has the lock.
    """
    try:
        while (lock := _lock_of(directory)) is None:
            pass
    except BlockingIOError as error:
        raise OSError(f"another training is at work in {directory}") from error
    except OSError as error:
        raise OSError(f"the state of the training cannot be kept in {directory}: {error.strerror}") from error
    return lock


def _lock_of(directory: Path) -> IO[str] | None:
    """The open lock, or None where the directory went with whoever had it just now."""
    path = directory / "lock"
    with suppress(FileExistsError):
        directory.mkdir(parents=True)
    with ExitStack() as stack:
        try:
            lock = stack.enter_context(path.open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A lock that no directory lists any more keeps nobody out.
            if not os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                return None
        except FileNotFoundError:
            return None
        stack.pop_all()
    return lock


def _packed(snapshot: Snapshot) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name on the CPU, and the rest in JSON types."""
    tensors = {"generator": snapshot.generator}
    for prefix, state in (("model.", snapshot.model), ("best.", snapshot.best_state)):
        tensors |= {prefix + name: tensor for name, tensor in state.items()}
    for place, moments in snapshot.optimiser["state"].items():
        tensors |= {f"{_OPTIMISER}{place}.{name}": tensor for name, tensor in moments.items()}
    content = {
        "stage": snapshot.stage,
        "epoch": snapshot.epoch,
        "parameter_groups": snapshot.optimiser["param_groups"],
        "schedule": snapshot.schedule,
        "best": snapshot.best._asdict() if snapshot.best else None,
        "records": [record.as_dict() for record in snapshot.records],
    }
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, content


def _unpacked(tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> Snapshot:
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith(_OPTIMISER):
            place, kind = name.removeprefix(_OPTIMISER).split(".", 1)
            moments.setdefault(int(place), {})[kind] = tensor
    return Snapshot(
        stage=content["stage"],
        epoch=content["epoch"],
        model=_under("model.", tensors),
        optimiser={"state": moments, "param_groups": content["parameter_groups"]},
        schedule=content["schedule"],
        generator=tensors["generator"],
        best=Measure(**content["best"]) if content["best"] else None,
        best_state=_under("best.", tensors),
        records=tuple(record_of(record) for record in content["records"]),
    )


def _require_format(content: Mapping[str, Any]) -> None:
    if content["format"] != FORMAT:
        raise ValueError(f"it has format {content['format']!r}; this version reads format {FORMAT}")


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _differences(before: Any, now: Any, path: str = "") -> list[str]:
    """One line for each leaf that differs."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        return [
            line
            for key in sorted({*before, *now})
            for line in _differences(before.get(key), now.get(key), f"{path}.{key}" if path else key)
        ]
    return [] if before == now else [f"{path}: {before!r} then, {now!r} now"]

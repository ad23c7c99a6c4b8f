"""Checkpoints that are not what was frozen, and paths that lead to none."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from models.checkpoint import MANIFEST, WEIGHTS
from tests.service.admin.calls import copied


class Bomb:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self._mark,)


def mark_of(directory: Path) -> Path:
    """There once a bomb of this checkpoint has gone off."""
    return directory.with_suffix(".unpickled")


class Bad(NamedTuple):
    """A way to be bad.

    Attributes:
        make: A good checkpoint, a place -> what is offered.
        words: Of the refusal.
    """

    make: Callable[[Path, Path], Path | str]
    words: str


def other_weights(checkpoint: Path, to: Path) -> Path:
    weights = load_file(copied(checkpoint, to) / WEIGHTS)
    name = next(name for name in weights if "codebook" in name)
    weights[name] = weights[name] + np.float32(1e-3)
    save_file(weights, to / WEIGHTS)
    return to


def other_fingerprint(checkpoint: Path, to: Path) -> Path:
    manifest = json.loads((copied(checkpoint, to) / MANIFEST).read_text())
    manifest["fingerprint"] = "0123456789abcdef"
    (to / MANIFEST).write_text(json.dumps(manifest))
    return to


def another_ones_weights(checkpoint: Path, to: Path) -> Path:
    """Of the same shapes, and whole."""
    weights = load_file(copied(checkpoint, to) / WEIGHTS)
    save_file({name: value.ravel()[::-1].reshape(value.shape).copy() for name, value in weights.items()}, to / WEIGHTS)
    return to


def other_dimension(checkpoint: Path, to: Path) -> Path:
    manifest = json.loads((copied(checkpoint, to) / MANIFEST).read_text())
    manifest["widths"][0] = 100
    (to / MANIFEST).write_text(json.dumps(manifest))
    return to


def cut_off(checkpoint: Path, to: Path) -> Path:
    content = (copied(checkpoint, to) / WEIGHTS).read_bytes()
    (to / WEIGHTS).write_bytes(content[: len(content) // 2])
    return to


def pickled(checkpoint: Path, to: Path) -> Path:
    (copied(checkpoint, to) / WEIGHTS).write_bytes(pickle.dumps({"network": Bomb(mark_of(to))}))
    return to


def pickled_by_torch(checkpoint: Path, to: Path) -> Path:
    """As `torch.save` writes it: a zip file with a pickle in it."""
    torch.save({"network": Bomb(mark_of(to))}, copied(checkpoint, to) / WEIGHTS)
    assert zipfile.is_zipfile(to / WEIGHTS)
    return to


def pickled_manifest(checkpoint: Path, to: Path) -> Path:
    (copied(checkpoint, to) / MANIFEST).write_bytes(pickle.dumps(Bomb(mark_of(to))))
    return to


def pickled_beside(checkpoint: Path, to: Path) -> Path:
    (copied(checkpoint, to) / WEIGHTS).unlink()
    torch.save({"network": Bomb(mark_of(to))}, to / "pytorch_model.bin")
    return to


def linked_out(checkpoint: Path, to: Path) -> Path:
    to.symlink_to(checkpoint)
    return to


def weights_linked_out(checkpoint: Path, to: Path) -> Path:
    (copied(checkpoint, to) / WEIGHTS).unlink()
    (to / WEIGHTS).symlink_to(checkpoint / WEIGHTS)
    return to


def through_dots(checkpoint: Path, to: Path) -> Path:
    return to.parent / ".." / checkpoint.parent.name / checkpoint.name


NOT_WHAT_WAS_FROZEN = {
    "weights that are not those of the fingerprint": Bad(other_weights, "quantizer"),
    "a fingerprint that is not that of the weights": Bad(other_fingerprint, "fingerprint"),
    "the weights of another": Bad(another_ones_weights, "sha256"),
    "weights of another shape than the manifest says": Bad(other_dimension, "cannot be loaded"),
    "weights that are cut off": Bad(cut_off, "cannot be loaded"),
    "a pickle in the place of the weights": Bad(pickled, "cannot be loaded"),
    "a pickle of torch in the place of the weights": Bad(pickled_by_torch, "cannot be loaded"),
    "a pickle in the place of the manifest": Bad(pickled_manifest, "manifest"),
    "a pickle beside": Bad(pickled_beside, WEIGHTS),
}
ELSEWHERE = {
    "a link that leads out": Bad(linked_out, "no directory"),
    "weights linked from elsewhere": Bad(weights_linked_out, "no plain file"),
    "dots that lead out": Bad(through_dots, "'..'"),
    "an absolute path elsewhere": Bad(lambda checkpoint, _: checkpoint, "no directory"),
    "a file that is no checkpoint": Bad(lambda *_: Path("/etc/passwd"), "no directory"),
    "the root itself": Bad(lambda _, to: to.parent, "no directory"),
    "a character that no path has": Bad(lambda *_: "a\0b", "no path"),
    "a path without end": Bad(lambda *_: "a/" * 2000, "no"),
}

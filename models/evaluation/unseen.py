"""Which items of a catalogue a tokenizer never saw, and how that is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.checkpoint import Manifest
from models.left_out import is_left_out


@dataclass(frozen=True)
class Unseen:
    """What is known of a catalogue's N items.

    Attributes:
        rows: (N,) bool, True where an item was certainly not trained on; None where nothing is known.
        how: How that is known, or why it is not, in words.
    """

    rows: Tensor | None
    how: str

    @property
    def items(self) -> int | None:
        """How many; None where nothing is known."""
        return None if self.rows is None else int(self.rows.sum())


def unseen_items(manifest: Manifest, digest: str, contents: Sequence[bytes | None]) -> Unseen:
    """What a checkpoint's manifest tells.

    An item that was held out of the training to choose the state counts as unseen unless an equal content was
    trained on.

    Args:
        manifest: The checkpoint's.
        digest: sha256 of the catalogue file, hexadecimal.
        contents: Of each row the digest (see `models.left_out`), None where it has no content.
    """
    training = manifest.training
    present = torch.tensor([content is not None for content in contents])
    share = training.get("left_out") or 0.0
    left_out = torch.tensor([content is not None and is_left_out(content, share) for content in contents])
    trained = (present & ~left_out).nonzero().flatten()
    held_out, how = _held_out(training, digest, len(trained))
    if held_out is None and not share:
        return Unseen(None, how)
    rows = left_out.clone()
    if held_out is not None:
        rows[trained[held_out]] = True
        known = {contents[row] for row in (present & ~rows).nonzero().flatten().tolist()}
        rows &= torch.tensor([content not in known for content in contents])
    if share:
        how = f"{share:.0%} of all contents were left out of the training by their digest" + (
            f"; {how}" if held_out is not None else ""
        )
    return Unseen(rows, how)


def _held_out(training: Mapping[str, Any], digest: str, count: int) -> tuple[Tensor | None, str]:
    """Positions among the trained file's `count` items, drawn again from the seed as the fit drew them."""
    files: Sequence[Mapping[str, Any]] = training.get("files", ())
    number = next((number for number, file in enumerate(files) if file.get("sha256") == digest), None)
    if number is None:
        return None, "not known: the manifest names the files trained on by their digest, and this catalogue is none"
    config = training.get("config", {}).get("fit", {})
    total = sum(int(file["items"]) for file in files)
    held_out = min(5_000, round(config.get("held_out", 0.0) * total))
    if held_out != training.get("held_out_items") or int(files[number]["items"]) != count:
        return None, "not known: the catalogue was trained on, and the manifest does not tell which items were held out"
    if not held_out:
        return None, "none: the catalogue was trained on whole"
    order = torch.randperm(total, generator=torch.Generator().manual_seed(int(config.get("seed", 0))))
    before = sum(int(file["items"]) for file in files[:number])
    drawn = order[:held_out] - before
    return drawn[(drawn >= 0) & (drawn < count)], "held out of the training, which its seed tells again"

"""Changes of a record as what `Trie.updated` takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from service.semantic_id import SemanticId

COMES = {"assigned": True, "returned": True, "retired": False, "replaced": False}


class ChangeTensors(NamedTuple):
    """The IDs of changes, in order, and whether each came or went.

    Attributes:
        semantic_ids: (C, L + 1) int64.
        live: (C,) bool.
    """

    semantic_ids: Tensor
    live: Tensor


def as_tensors(changes: Sequence[tuple[str, SemanticId]], levels: int) -> ChangeTensors:
    """What changes say, each of its own ID alone.

    Args:
        changes: The kind of each, and its ID.
        levels: L.

    Raises:
        ValueError: A kind is not known: what it does to its ID is not to be guessed.
    """
    unknown = {kind for kind, _ in changes} - COMES.keys()
    if unknown:
        msg = f"changes of an unknown kind: {', '.join(sorted(unknown))}"
        raise ValueError(msg)
    rows = [(*semantic_id.codes, semantic_id.suffix) for _, semantic_id in changes]
    live = [COMES[kind] for kind, _ in changes]
    return ChangeTensors(
        torch.tensor(rows, dtype=torch.int64).reshape(-1, levels + 1), torch.tensor(live, dtype=torch.bool)
    )

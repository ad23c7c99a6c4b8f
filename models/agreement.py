"""How far two tokenizers agree on the same items: equal codes, and groups that stay together.

Equal codes mean something where the numbering of one was aligned to the other's, see `models.alignment`; whether groups
stay together does not depend on the numbering.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LevelAgreement:
    """Two tokenizers on N items, at one level. Groups are the items of one prefix up to it.

    With n_op the items of the old group o and the new group p, n_o and n_p the items of either, and pairs(n) =
    n (n - 1) / 2:

    Attributes:
        level: From 1.
        equal_codes: Share of the items whose codes at this level are equal; by what they are numbered.
        equal_prefixes: Share of the items whose codes are equal up to this level; the same.
        old_groups: How many prefixes the old tokenizer uses.
        new_groups: How many the new one does.
        together: Sum over o of max over p of n_op, over N: share of the items that stay in the largest part of their
            old group (the weighted purity of the old groups).
        pairs_kept: Sum of pairs(n_op) over sum of pairs(n_o): share of the pairs of one old group that are in one new
            group too; None where no old group has two items.
        pairs_by_chance: Sum of pairs(n_p) over pairs(N): what `pairs_kept` would be, on average, if the new groups of
            these sizes were drawn at random; None where there are no two items.
    """

    level: int
    equal_codes: float
    equal_prefixes: float
    old_groups: int
    new_groups: int
    together: float
    pairs_kept: float | None
    pairs_by_chance: float | None


def agreement(old: Tensor, new: Tensor) -> tuple[LevelAgreement, ...]:
    """How two tokenizers agree, level by level, as far as both have levels.

    Args:
        old: (N, L) int, the codes of N items, at least one.
        new: (N, L') int, the new codes of the same items.

    Raises:
        ValueError: There are no items, or not as many of either.
    """
    if len(old) != len(new) or not len(old):
        msg = f"codes of the same items are compared; got {tuple(old.shape)} and {tuple(new.shape)}"
        raise ValueError(msg)
    levels = []
    before, after = torch.zeros_like(old[:, 0], dtype=torch.int64), torch.zeros_like(new[:, 0], dtype=torch.int64)
    equal = torch.ones_like(before, dtype=torch.bool)
    for level in range(min(old.shape[1], new.shape[1])):
        same = old[:, level] == new[:, level]
        equal &= same
        before, after = _grouped(before, old[:, level]), _grouped(after, new[:, level])
        levels.append(_measured(level + 1, same, equal, before, after))
    return tuple(levels)


def _grouped(groups: Tensor, codes: Tensor) -> Tensor:
    """The groups (N,) of prefixes one code longer, numbered from 0 without a gap."""
    longer: Tensor = (groups * (int(codes.max()) + 1) + codes).unique(return_inverse=True)[1]
    return longer


def _measured(level: int, same: Tensor, equal: Tensor, before: Tensor, after: Tensor) -> LevelAgreement:
    """The measures of groups (N,) before and after."""
    items = len(before)
    old_sizes, new_sizes = before.bincount(), after.bincount()
    parts, sizes = (before * len(new_sizes) + after).unique(return_counts=True)
    largest = torch.zeros_like(old_sizes).scatter_reduce_(0, parts // len(new_sizes), sizes, "amax")
    pairs = _pairs(old_sizes)
    return LevelAgreement(
        level=level,
        equal_codes=int(same.sum()) / items,
        equal_prefixes=int(equal.sum()) / items,
        old_groups=len(old_sizes),
        new_groups=len(new_sizes),
        together=int(largest.sum()) / items,
        pairs_kept=_pairs(sizes) / pairs if pairs else None,
        pairs_by_chance=_pairs(new_sizes) / (items * (items - 1) // 2) if items > 1 else None,
    )


def _pairs(sizes: Tensor) -> int:
    """Pairs within groups of these sizes (G,) int64."""
    return int((sizes * (sizes - 1) // 2).sum())

"""How far two tokenizers agree, against the definitions taken literally."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from models.agreement import agreement


def test_measures_are_what_their_definitions_say_counted_pair_by_pair() -> None:
    generator = torch.Generator().manual_seed(3)
    old = torch.randint(0, 3, (60, 3), generator=generator)
    new = torch.where(torch.rand(60, 2, generator=generator) < 0.3, torch.randint(0, 4, (60, 2)), old[:, :2])

    levels = agreement(old.int(), new.int())

    assert [level.level for level in levels] == [1, 2]
    rows = range(len(old))
    for level in levels:
        before = [tuple(row[: level.level]) for row in old.tolist()]
        after = [tuple(row[: level.level]) for row in new.tolist()]
        codes = [(a[level.level - 1], b[level.level - 1]) for a, b in zip(old.tolist(), new.tolist(), strict=True)]
        pairs = [(i, j) for i, j in combinations(rows, 2) if before[i] == before[j]]
        all_pairs = list(combinations(rows, 2))
        parts = [[after[i] for i in rows if before[i] == group] for group in set(before)]
        assert level.equal_codes == sum(a == b for a, b in codes) / 60
        assert level.equal_prefixes == sum(a == b for a, b in zip(before, after, strict=True)) / 60
        assert (level.old_groups, level.new_groups) == (len(set(before)), len(set(after)))
        assert level.together == sum(max(map(part.count, part)) for part in parts) / 60
        assert level.pairs_kept == sum(after[i] == after[j] for i, j in pairs) / len(pairs)
        assert level.pairs_by_chance == sum(after[i] == after[j] for i, j in all_pairs) / len(all_pairs)


def test_groups_that_are_only_numbered_otherwise_stay_together_whole() -> None:
    old = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1], [2, 0]])

    first, second = agreement(old, (old + 1) % 3)

    assert (first.equal_codes, first.together, first.pairs_kept) == (0.0, 1.0, 1.0)
    assert (second.together, second.pairs_kept) == (1.0, None)  # no two items of one old group


@pytest.mark.parametrize("items", [(0, 0), (3, 2)])
def test_codes_that_are_not_of_the_same_items_are_refused(items: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="the same items"):
        agreement(*(torch.zeros(count, 2, dtype=torch.int64) for count in items))

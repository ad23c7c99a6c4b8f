"""Sequences as windows and batches of equal length."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.recommendation.sequences import batches, histories, windows


def targets(groups) -> list[tuple[int, int, int]]:
    """User, target and how many items it is after, of every window."""
    return [
        (user, window[place], place)
        for users, items, first in groups
        for user, window in zip(users.tolist(), items.tolist(), strict=True)
        for place in range(first, len(window))
    ]


@given(st.lists(st.integers(0, 60), max_size=5), st.integers(1, 20), st.booleans())
def test_every_item_but_the_first_is_a_target_once(lengths, history, one_target) -> None:
    sequences = [[100 * user + place for place in range(length)] for user, length in enumerate(lengths)]

    found = targets(windows(sequences, history, one_target=one_target))

    assert sorted(row for _, row, _ in found) == [row for sequence in sequences for row in sequence[1:]]
    for user, row, before in found:
        assert row // 100 == user
        whole = min(history, row % 100)
        assert before == whole if one_target else (whole + 1) // 2 <= before <= history


def test_a_batch_has_one_length_and_about_as_many_targets_as_asked_for() -> None:
    sequences = [[*range(2 + user % 9)] for user in range(500)]
    groups = windows(sequences, 20, one_target=False)

    epoch = list(batches(groups, 32, torch.Generator().manual_seed(1)))

    assert max(batch.targets * len(batch.users) for batch in epoch) <= 32
    assert sorted(targets(epoch)) == sorted(targets(groups))
    assert [batch.items.shape for batch in epoch] != sorted(batch.items.shape for batch in epoch)


def test_the_same_seed_draws_the_same_batches() -> None:
    groups = windows([[*range(2 + user % 9)] for user in range(100)], 20, one_target=True)

    def drawn(seed: int):
        return [batch.users.tolist() for batch in batches(groups, 32, torch.Generator().manual_seed(seed))]

    assert drawn(1) == drawn(1) != drawn(2)


@pytest.mark.parametrize("batch_rows", [1, 100])
def test_histories_are_the_last_items_of_those_asked_for(batch_rows: int) -> None:
    sequences = [[1], [2, 3], [4, 5, 6], [7, 8, 9]]

    found = {
        user: items
        for batch in histories(sequences, torch.tensor([3, 0, 1]), 2, batch_rows)
        for user, items in zip(batch.users.tolist(), batch.items.tolist(), strict=True)
    }

    assert found == {3: [8, 9], 0: [1], 1: [2, 3]}

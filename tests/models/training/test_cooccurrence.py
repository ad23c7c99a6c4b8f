"""PPMI and its truncated SVD."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from models.training.cooccurrence import PPMIConfig, cooccurrences, ppmi, ppmi_embeddings

CONFIG = PPMIConfig(width=8)


def communities(users=300, groups=4, size=8, length=7, seed=0):
    """Users who choose from one group of items each; item i belongs to group i % groups."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(size, (users, length), generator=generator)
    return [tuple((row * groups + user % groups).tolist()) for user, row in enumerate(chosen)]


def test_items_of_a_community_come_to_lie_together():
    directions = functional.normalize(ppmi_embeddings(communities(), 32, CONFIG), dim=1)
    nearest = (directions @ directions.T).fill_diagonal_(-2).topk(5, dim=1).indices
    assert (nearest % 4 == torch.arange(32)[:, None] % 4).float().mean() > 0.9  # by chance 7 of 31


def test_pairs_count_within_the_window_and_within_a_user_only():
    pairs, counts = cooccurrences([(0, 1, 2), (1, 1, 0), (2,), ()], 3, window=1)
    assert dict(zip(pairs.tolist(), counts.tolist(), strict=True)) == {
        0 * 3 + 1: 2,
        1 * 3 + 0: 2,
        1 * 3 + 2: 1,
        2 * 3 + 1: 1,
    }


def test_ppmi_is_that_of_its_formula():
    # given
    sequences, items = communities(users=40), 32
    counts = np.zeros((items, items))
    for sequence in sequences:
        for i, first in enumerate(sequence):
            for j, second in enumerate(sequence):
                counts[first, second] += 0 < abs(i - j) <= 2 and first != second
    smoothed = counts.sum(axis=0) ** 0.75
    with np.errstate(divide="ignore", invalid="ignore"):
        information = np.log(counts * smoothed.sum() / (counts.sum(axis=1)[:, None] * smoothed[None]))
    # when
    computed = ppmi(sequences, items, replace(CONFIG, window=2)).to_dense()
    # then
    np.testing.assert_allclose(computed.numpy(), np.maximum(np.nan_to_num(information, neginf=0), 0), atol=1e-5)


def test_the_embeddings_are_the_best_of_their_rank():
    matrix = ppmi(communities(), 32, CONFIG)
    embeddings = ppmi_embeddings(communities(), 32, replace(CONFIG, power=1.0))
    expected = torch.linalg.svdvals(matrix.to_dense())[:8]
    torch.testing.assert_close(torch.linalg.svdvals(embeddings), expected, rtol=1e-3, atol=1e-3)


def test_the_same_seed_gives_the_same_and_an_item_that_occurs_with_none_gets_zeros():
    first, again = (ppmi_embeddings([*communities(), (32,)], 33, CONFIG) for _ in range(2))
    assert torch.equal(first, again)
    assert not first[32].any()
    assert ppmi_embeddings([(0, 1)], 2, CONFIG).shape == (2, 8)


def test_a_file_in_which_nothing_occurs_together_is_refused():
    with pytest.raises(ValueError, match="no two items occur together"):
        ppmi_embeddings([(1,), (2,)], 3, CONFIG)

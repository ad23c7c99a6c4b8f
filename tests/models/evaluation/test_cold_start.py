"""Unseen items beside seen ones, on a catalogue laid out by hand."""

from __future__ import annotations

import pytest
import torch

from models.evaluation.cold_start import cold_start
from models.evaluation.prefixes import PrefixGroups

# Two clusters of seen items; one unseen item lies in each, and the second was put under the wrong first code.
EMBEDDINGS = torch.tensor([[0.0], [0.1], [5.0], [5.1], [0.05], [5.05]])
CODES = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1], [0, 0], [0, 1]])
ERRORS = torch.tensor([1.0, 1.0, 1.0, 1.0, 4.0, 2.0])
UNSEEN = torch.tensor([False, False, False, False, True, True])


def test_unseen_items_are_held_against_their_nearest_seen_ones():
    found = cold_start(PrefixGroups(CODES), EMBEDDINGS, ERRORS, UNSEEN, sample=10, training_q95=1.5)
    assert (found.unseen, found.seen, found.queries) == (2, 4, (2, 4))
    unseen, seen = found.nearest_shares
    assert unseen[0] == pytest.approx(1 / 2)
    assert seen == (1.0, 0.0)
    assert found.quantization_error == (3.0, 1.0)
    assert found.beyond_training == (1.0, 0.0)


def test_an_unseen_item_collides_with_seen_ones_too():
    found = cold_start(PrefixGroups(CODES), EMBEDDINGS, ERRORS, UNSEEN, sample=10)
    assert found.colliding == (1.0, 2 / 4)
    assert found.beyond_training is None


def test_without_unseen_items_or_seen_ones_there_is_no_cold_start():
    groups = PrefixGroups(CODES)
    for unseen in (torch.zeros(6, dtype=torch.bool), torch.ones(6, dtype=torch.bool)):
        assert cold_start(groups, EMBEDDINGS, ERRORS, unseen, sample=10) is None

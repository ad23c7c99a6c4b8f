"""Neighbours kept, against sets computed by hand."""

from __future__ import annotations

import pytest
import torch

from models.evaluation import neighbours
from models.evaluation.neighbours import nearest, neighbours_kept
from models.evaluation.prefixes import PrefixGroups


def test_the_nearest_are_those_of_all_distances_and_never_the_query(generator):
    # given an offset that would swallow the digits of an uncentred square
    embeddings = torch.randn(300, 6, generator=generator) + 1000
    queries = torch.tensor([0, 17, 299])
    # when
    found = nearest(embeddings, queries, count=5)
    # then
    distances = torch.cdist(embeddings.double(), embeddings.double()).fill_diagonal_(torch.inf)
    assert torch.equal(found.sort().values, distances[queries].topk(5, largest=False).indices.sort().values)


def test_some_rows_alone_are_searched_where_they_are_named():
    embeddings = torch.tensor([[0.0], [1.0], [2.0], [10.0]])
    found = nearest(embeddings, torch.tensor([0, 3]), among=torch.tensor([2, 3]), count=1)
    assert found.tolist() == [[2], [2]]


def test_searching_in_pieces_changes_nothing(generator, monkeypatch):
    embeddings = torch.randn(200, 4, generator=generator)
    whole = nearest(embeddings, torch.arange(50))
    monkeypatch.setattr(neighbours, "DISTANCES", 1000)
    monkeypatch.setattr(neighbours, "BLOCK_ROWS", 30)
    assert torch.equal(nearest(embeddings, torch.arange(50)), whole)


def test_recall_set_size_and_chance_of_a_small_tree():
    # given a query under (0, 0) with one item of equal codes, one cousin, two strangers; its neighbours 1, 2 and 3
    groups = PrefixGroups(torch.tensor([[0, 0], [0, 0], [0, 1], [1, 0], [1, 1]]))
    # when
    found = neighbours_kept(groups, torch.tensor([0]), torch.tensor([[1, 2, 3]]))
    # then
    assert found.recall == pytest.approx((2 / 3, 1 / 3))
    assert found.set_size == (2.0, 1.0)
    assert found.random == pytest.approx((2 / 4, 1 / 4))
    assert found.of_nearest_by_prefix == 1.0


def test_the_nearest_by_prefix_fill_their_number_by_lot_from_the_ring_where_it_ends(monkeypatch):
    # given room for two items: the one of equal codes, and one of the two cousins, of which one is a neighbour
    monkeypatch.setattr(neighbours, "NEAREST_BY_PREFIX", 2)
    groups = PrefixGroups(torch.tensor([[0, 0], [0, 0], [0, 1], [0, 2], [1, 0]]))
    # when
    found = neighbours_kept(groups, torch.tensor([0]), torch.tensor([[1, 2]]))
    # then
    assert found.of_nearest_by_prefix == pytest.approx((1 + 1 / 2) / 2)


def test_codes_that_say_nothing_keep_what_lots_would(monkeypatch):
    monkeypatch.setattr(neighbours, "NEAREST_BY_PREFIX", 10)
    groups = PrefixGroups(torch.zeros(41, 2, dtype=torch.int64))
    found = neighbours_kept(groups, torch.arange(3), torch.tensor([[5, 6], [7, 8], [9, 10]]))
    assert found.of_nearest_by_prefix == pytest.approx(10 / 40)

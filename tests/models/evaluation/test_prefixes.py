"""What prefixes keep, against figures computed by hand."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from models.evaluation.prefixes import (
    PrefixGroups,
    consecutive,
    consecutive_pairs,
    growth,
    purity_by_depth,
    typical,
)

# Five items: a pair under (0, 1), its cousin (0, 2), and two under other first codes.
CODES = torch.tensor([[0, 1], [0, 1], [0, 2], [1, 1], [2, 0]])


def test_groups_are_those_of_equal_prefixes():
    groups = PrefixGroups(CODES)
    assert groups.sizes(1).tolist() == [3, 3, 3, 1, 1]
    assert groups.sizes(2).tolist() == [2, 2, 1, 1, 1]
    assert groups.collisions_by_depth() == pytest.approx([1 - 3 / 5, 1 - 4 / 5])


def test_an_equal_code_under_another_prefix_is_another_group():
    shared = PrefixGroups(CODES).shared(torch.tensor([0, 0, 0]), torch.tensor([1, 2, 3]))
    assert shared.tolist() == [[True, True], [True, False], [False, False]]


def test_chance_is_the_share_of_all_pairs_that_share_a_prefix():
    groups = PrefixGroups(CODES)
    pairs = torch.tensor(list(combinations(range(5), 2)))
    expected = groups.shared(pairs[:, 0], pairs[:, 1]).double().mean(dim=0)
    assert groups.chance() == pytest.approx(expected.tolist())
    assert groups.chance()[0] == pytest.approx(3 / 10)


def test_growth_is_the_mean_over_every_part_of_the_catalogue():
    # given groups of 3, 2 and 1 items; of all parts of three items
    codes = [0, 0, 0, 1, 1, 2]
    rates = [1 - len({codes[row] for row in part}) / 3 for part in combinations(range(6), 3)]
    # when
    points = {point.items: point.rate for point in growth({1: 1, 2: 1, 3: 1}, points=2)}
    three = [point.rate for point in growth({3: 1, 2: 1, 1: 1}, points=2) if point.items == 6]
    # then
    assert points[6] == pytest.approx(three[0]) == pytest.approx(1 - 3 / 6)
    assert _rate_of(3) == pytest.approx(sum(rates) / len(rates))


def _rate_of(items: int) -> float:
    from models.evaluation.prefixes import _expected_groups

    return 1 - _expected_groups({1: 1, 2: 1, 3: 1}, 6, items) / items


def test_growth_ends_at_the_catalogue_as_it_is_and_never_falls():
    rates = [point.rate for point in growth({1: 5000, 2: 300, 7: 20})]
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(1 - 5320 / 5740)


def test_a_category_is_typical_where_it_is_the_most_frequent_of_its_group_and_of_equal_ones_the_first():
    groups = torch.tensor([0, 0, 0, 1, 1, 5])
    categories = torch.tensor([7, 7, 2, 4, 3, 9])
    assert typical(groups, categories).tolist() == [True, True, False, False, True, True]


def test_purity_at_each_depth_and_of_shuffled_codes():
    # given two first codes that each hold one category, and second codes that part nothing more
    codes = torch.tensor([[0, 0]] * 50 + [[1, 0]] * 50)
    categories = torch.tensor([3] * 50 + [8] * 50)
    # when
    found = purity_by_depth(PrefixGroups(codes), categories, torch.arange(100))
    # then
    assert found.by_depth == (1.0, 1.0)
    assert 0.5 <= found.shuffled[0] < 0.65
    assert found.above_chance == pytest.approx((1.0, 1.0))
    assert (found.items, found.categories) == (100, 2)


def test_purity_counts_some_items_among_the_groups_of_all_and_leaves_out_those_without_a_category():
    codes = torch.tensor([[0], [0], [0], [1], [1]])
    categories = torch.tensor([5, 5, 6, -1, 6])
    groups = PrefixGroups(codes)
    assert purity_by_depth(groups, categories, torch.arange(5)).by_depth == pytest.approx((3 / 4,))
    assert purity_by_depth(groups, categories, torch.tensor([2])).by_depth == (0.0,)
    assert purity_by_depth(groups, categories, torch.tensor([3])) is None


def test_consecutive_pairs_stay_within_a_user_and_leave_out_repeats():
    pairs = consecutive_pairs([(0, 1, 1, 2), (), (3,), (4, 0)])
    assert pairs.tolist() == [[0, 1], [1, 2], [4, 0]]


def test_consecutive_items_share_prefixes_beside_what_chance_gives():
    found = consecutive(PrefixGroups(CODES), torch.tensor([[0, 1], [1, 2], [3, 4], [4, 0]]))
    assert found.pairs == 4
    assert found.shared == pytest.approx((2 / 4, 1 / 4))
    assert found.shuffled == pytest.approx((3 / 10, 1 / 10))
    assert consecutive(PrefixGroups(CODES), torch.empty(0, 2, dtype=torch.int64)) is None

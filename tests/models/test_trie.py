"""The trie of live IDs: what a decoder may say next, by tensor operations alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models import DeadPrefix, Trie

SIZES = (3, 2, 4)
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
IDS = st.tuples(*(st.integers(0, size - 1) for size in SIZES), st.integers(0, 3))


def rows(ids):
    return torch.tensor(sorted(ids, key=hash), dtype=torch.int64).reshape(-1, len(SIZES) + 1)


@given(ids=st.sets(IDS, max_size=40))
@settings(deadline=None, max_examples=60)
def test_a_trie_allows_just_what_leads_to_a_live_id(ids):
    trie = Trie.of(rows(ids), SIZES)

    assert [tuple(row) for row in trie.semantic_ids().tolist()] == sorted(ids)
    for depth in range(len(SIZES) + 1):
        prefixes = sorted({row[:depth] for row in ids})
        if not prefixes:
            continue
        mask = trie.allowed(torch.tensor(prefixes, dtype=torch.int64).reshape(len(prefixes), depth))
        wanted = [{row[depth] for row in ids if row[:depth] == prefix} for prefix in prefixes]
        assert [set(row.nonzero().flatten().tolist()) for row in mask] == wanted
        assert depth == len(SIZES) or mask.shape[1] == SIZES[depth]


@given(before=st.sets(IDS, max_size=30), changes=st.lists(st.tuples(IDS, st.booleans()), max_size=30))
@settings(deadline=None, max_examples=60)
def test_changes_lead_to_the_trie_of_a_fresh_start(before, changes):
    after = set(before)
    for semantic_id, live in changes:
        (after.add if live else after.discard)(semantic_id)
    changed = torch.tensor([row for row, _ in changes], dtype=torch.int64).reshape(-1, 4)

    updated = Trie.of(rows(before), SIZES).updated(changed, torch.tensor([live for _, live in changes]).bool(), 7)

    assert updated.revision == 7
    assert updated.to_bytes() == Trie.of(rows(after), SIZES, 7).to_bytes()


@pytest.mark.parametrize("device", DEVICES)
def test_a_trie_through_much_churn_is_that_of_a_fresh_start(device):
    torch.manual_seed(3)
    sizes = (7, 300, 5)
    every = torch.cartesian_prod(*(torch.arange(size) for size in sizes), torch.arange(3))
    live = torch.rand(len(every)) < 0.1
    trie = Trie.of(every[live], sizes).to(device)
    for turn, number in enumerate([0, 1, 7, 500, len(every), 3000, 40, 3000]):
        changed = torch.randint(0, len(every), (number,))
        # Now most come, now most go, in the end all of it: levels grow, shrink and empty.
        came = torch.rand(number) < (turn % 4) / 3
        for row, now in zip(changed.tolist(), came.tolist(), strict=True):
            live[row] = now

        trie = trie.updated(every[changed], came, turn)

        assert trie.to_bytes() == Trie.of(every[live], sizes, turn).to_bytes()
    emptied = trie.updated(every, torch.zeros(len(every), dtype=torch.bool), 9)
    assert emptied.to_bytes() == Trie.of(every[:0], sizes, 9).to_bytes()
    assert emptied.updated(every, torch.ones(len(every)) > 0, 9).to_bytes() == Trie.of(every, sizes, 9).to_bytes()


def test_levels_in_which_nothing_came_or_went_are_not_copied():
    trie = Trie.of(rows({(0, 0, 0, 0), (0, 0, 2, 1), (2, 1, 0, 0)}), SIZES)

    updated = trie.updated(
        torch.tensor([[0, 0, 2, 2], [0, 0, 2, 1], [1, 1, 1, 1]]), torch.tensor([True, False, False]), 1
    )

    assert [new is old for new, old in zip(updated.numbers, trie.numbers, strict=True)] == [True, True, True, False]


def test_ids_with_a_suffix_too_high_are_left_out_once():
    trie = Trie.of(rows({(0, 0, 0, 0), (0, 0, 2, 9), (2, 1, 0, 3), (2, 1, 0, 2)}), SIZES, 5)

    fewer = trie.with_suffixes_below(3)

    assert fewer.to_bytes() == Trie.of(rows({(0, 0, 0, 0), (2, 1, 0, 2)}), SIZES, 5).to_bytes()
    assert trie.with_suffixes_below(3) is fewer
    assert trie.with_suffixes_below(10) is trie
    assert trie.with_suffixes_below(0).suffixes == 0


@given(live=st.sets(IDS, max_size=20), asked=st.lists(IDS, min_size=1, max_size=10))
@settings(deadline=None, max_examples=40)
def test_a_trie_holds_its_ids_and_no_others(live, asked):
    found = Trie.of(rows(live), SIZES).holds(torch.tensor(asked))

    assert found.tolist() == [row in live for row in asked]


@pytest.mark.parametrize("dead", [[1, 0, 0], [0, 1, 0], [0, 0, 3], [2, 1, 3]])
def test_a_dead_prefix_raises_and_says_which(dead):
    trie = Trie.of(rows({(0, 0, 0, 0), (0, 0, 2, 1), (2, 1, 0, 0)}), SIZES)

    with pytest.raises(DeadPrefix, match=r"prefix 1 of the batch"):
        trie.allowed(torch.tensor([[0, 0, 0], dead]))


def test_an_empty_trie_allows_nothing():
    trie = Trie.of(torch.empty(0, 4, dtype=torch.int64), SIZES)

    assert trie.semantic_ids().shape == (0, 4)
    with pytest.raises(DeadPrefix):
        trie.allowed(torch.empty(2, 0, dtype=torch.int64))
    with pytest.raises(DeadPrefix):
        trie.allowed(torch.tensor([[1, 1]]))


def test_a_number_outside_its_codebook_is_dead_not_an_error_of_another_row():
    trie = Trie.of(rows({(0, 0, 0, 0), (1, 0, 0, 0)}), SIZES)

    for code in (-1, 3, 2**40):
        with pytest.raises(DeadPrefix):
            trie.allowed(torch.tensor([[0], [code]]))


def test_no_prefixes_are_no_rows():
    assert Trie.of(rows({(0, 0, 0, 0)}), SIZES).allowed(torch.empty(0, 2, dtype=torch.int64)).shape == (0, 4)


def test_a_trie_reads_back_as_it_was_written():
    trie = Trie.of(rows({(0, 0, 0, 0), (0, 0, 2, 1), (2, 1, 0, 2**31 - 1)}), SIZES, 12)

    read = Trie.from_bytes(trie.to_bytes())

    assert (read.revision, read.codebook_sizes) == (12, SIZES)
    assert torch.equal(read.semantic_ids(), trie.semantic_ids())
    assert {tensor.dtype for tensor in (*read.offsets, *read.numbers)} == {torch.int64}


@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros(1, 3).long(),
        torch.zeros(4).long(),
        torch.zeros(1, 4),
        torch.tensor([[3, 0, 0, 0]]),
        torch.tensor([[0, 0, 0, -1]]),
    ],
)
def test_what_are_no_ids_is_refused(wrong):
    with pytest.raises(ValueError, match=r"expected|out of range"):
        Trie.of(wrong, SIZES)


@pytest.mark.parametrize("wrong", [torch.zeros(1, 4).long(), torch.zeros(1), torch.zeros(1, 1)])
def test_what_are_no_prefixes_is_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        Trie.of(rows({(0, 0, 0, 0)}), SIZES).allowed(wrong)


@pytest.mark.parametrize("device", DEVICES)
def test_a_large_trie_allows_what_it_holds_on_any_device(device):
    torch.manual_seed(0)
    ids = torch.cat([torch.randint(0, 256, (100_000, 3)), torch.zeros(100_000, 1, dtype=torch.int64)], dim=1)
    trie = Trie.of(ids, (256, 256, 256)).to(device)

    mask = trie.allowed(ids[:64, :2].to(device))
    without = trie.updated(ids[:64], torch.zeros(64, dtype=torch.bool), 1)

    for row, (first, second) in enumerate(ids[:64, :2].tolist()):
        under = ids[(ids[:, 0] == first) & (ids[:, 1] == second), 2]
        assert mask[row].nonzero().flatten().tolist() == under.unique().tolist()
    assert mask.device.type == without.numbers[0].device.type == device
    assert (
        without.to_bytes()
        == Trie.of(ids[64:], (256, 256, 256)).updated(ids[:64], mask.new_zeros(64).cpu(), 1).to_bytes()
    )

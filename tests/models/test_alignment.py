"""Codewords numbered like another tokenizer's: the same codes under other numbers, as many of them equal as can be."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models import Tokenizer, read_manifest
from models.alignment import aligned, numbering
from models.checkpoint import load_parts
from models.tokenizer import ErrorBounds, TokenizerParts


def encoded(parts: TokenizerParts, embeddings: Tensor) -> Tensor:
    return Tokenizer("", parts, ErrorBounds()).encode(embeddings).codes.clone()


def test_no_other_numbering_has_more_equal_codes() -> None:
    generator = torch.Generator().manual_seed(5)
    new, old = (torch.randint(0, size, (80,), generator=generator) for size in (5, 7))

    numbers = numbering(new, old, torch.rand(5, 2))

    best = max(int((torch.tensor(order)[new] == old).sum()) for order in permutations(range(5)))
    assert int((numbers[new] == old).sum()) == best
    assert numbers.sort().values.tolist() == [0, 1, 2, 3, 4]


def test_the_largest_codebooks_are_matched_in_the_memory_of_the_items() -> None:
    size = 65_536
    old = torch.randint(0, size, (20_000,), generator=torch.Generator().manual_seed(6))
    renumbered = torch.randperm(size, generator=torch.Generator().manual_seed(7))

    numbers = numbering(renumbered[old], old, torch.arange(size)[:, None])  # a matrix of counts would take 34 GB

    assert torch.equal(numbers[renumbered[old]], old)
    assert torch.equal(numbers.sort().values, torch.arange(size))


def test_of_equal_codewords_the_one_that_is_chosen_stays_the_first() -> None:
    codewords = torch.tensor([[1.0], [2.0], [1.0], [1.0]])
    new = torch.tensor([0, 0, 1])  # ties go to the lowest index: 2 and 3 are never chosen

    numbers = numbering(new, torch.tensor([3, 3, 0]), codewords)

    assert numbers[1] == 0
    assert numbers[0] < numbers[2] < numbers[3]


@pytest.mark.parametrize("family", ["rqvae", "rq-kmeans", "pq", "hierarchical"])
def test_a_tokenizer_that_was_only_numbered_otherwise_gets_its_numbers_back(
    families: dict[str, Path], family: str
) -> None:
    directory = families[family]
    parts = load_parts(directory, read_manifest(directory))
    embeddings = torch.randn(400, parts.network.config.widths[0], generator=torch.Generator().manual_seed(1))
    codes = encoded(parts, embeddings)
    sizes = parts.quantizer.codebook_sizes
    if family == "hierarchical":  # a node's children have numbers without a gap: only those are asked for
        wanted = codes.clone()
        wanted[:, 0] = codes[:, 0].max() - codes[:, 0]
    else:
        wanted = torch.stack([(codes[:, level] + 1 + level) % size for level, size in enumerate(sizes)], 1)

    found = aligned(parts, codes, wanted)

    assert torch.equal(encoded(found.parts, embeddings), found.codes)
    assert torch.equal(found.codes, wanted)
    assert not torch.equal(codes, wanted)


@pytest.mark.parametrize("family", ["rqvae", "opq", "hierarchical"])
def test_codes_after_it_are_those_before_it_under_other_numbers_for_items_it_was_not_aligned_on_too(
    families: dict[str, Path], family: str
) -> None:
    directory = families[family]
    parts = load_parts(directory, read_manifest(directory))
    embeddings = torch.randn(600, parts.network.config.widths[0], generator=torch.Generator().manual_seed(2))
    codes = encoded(parts, embeddings)
    old = torch.randint(0, max(parts.quantizer.codebook_sizes), (300, 2), generator=torch.Generator().manual_seed(3))

    found = aligned(parts, codes[:300], old)

    after = encoded(found.parts, embeddings)
    assert torch.equal(after[:300], found.codes)
    prefixes = [rows.unique(dim=0, return_inverse=True)[1] for rows in (codes, after, torch.cat([codes, after], 1))]
    assert len({int(groups.max()) for groups in prefixes}) == 1  # one to one
    assert torch.equal(after[:, 2:], codes[:, 2:]) or family == "hierarchical"  # levels that the old one has not
    assert torch.allclose(found.parts.quantizer.decode(after), parts.quantizer.decode(codes))


def test_codes_of_other_items_are_refused(families: dict[str, Path]) -> None:
    parts = load_parts(families["rq-kmeans"], read_manifest(families["rq-kmeans"]))

    with pytest.raises(ValueError, match="of the same items"):
        aligned(parts, torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 2, dtype=torch.int64))

"""The last level's codewords in order of their distance: alternatives for codes that are full."""

from __future__ import annotations

import pytest
import torch

from models import Tokenizer
from models.quantizer import DIFFERENCES, Quantization, rank_codewords
from models.tokenizer import ErrorBounds


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("count", [1, 4, 16, 40])
def test_a_ranking_is_that_of_brute_force(exact, count, generator):
    residuals = torch.randn(50, 8, generator=generator, dtype=torch.float64)
    codebook = torch.randn(32, 8, generator=generator, dtype=torch.float64)

    ranking = rank_codewords(residuals, codebook, count, exact=exact)

    brute = torch.cdist(residuals, codebook, compute_mode="donot_use_mm_for_euclid_dist").argsort(dim=1)
    assert torch.equal(ranking.codes, brute[:, :count])
    assert (ranking.margin > 0).all()


def test_a_batch_too_large_to_be_measured_at_once_is_ranked_alike(generator):
    codebook = torch.randn(256, 1024, generator=generator, dtype=torch.float64)
    residuals = torch.randn(DIFFERENCES // codebook.numel() + 1, 1024, generator=generator, dtype=torch.float64)

    whole = rank_codewords(residuals, codebook, 3)

    assert torch.equal(whole.codes[-1:], rank_codewords(residuals[-1:], codebook, 3).codes)
    assert whole.codes.shape == (len(residuals), 3)


def test_ties_are_ranked_by_the_lowest_index_in_the_exact_form():
    # given the corners of a square around the residual, and one of them twice
    corners = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64) / 3
    codebook = torch.cat([torch.full((1, 2), 9.0, dtype=torch.float64), corners, corners[1:2]])
    residual = torch.zeros(1, 2, dtype=torch.float64)
    # when, then
    assert rank_codewords(residual, codebook, 6, exact=True).codes.tolist() == [[1, 2, 3, 4, 5, 0]]
    assert rank_codewords(residual, codebook, 3).margin.item() == pytest.approx(0, abs=1e-15)


def test_equal_codewords_leave_a_ranking_in_doubt():
    codebook = torch.tensor([[0.0], [2.0], [2.0], [9.0]], dtype=torch.float64)
    residual = torch.tensor([[0.1]], dtype=torch.float64)

    margins = [rank_codewords(residual, codebook, count).margin.item() for count in (1, 2, 3, 4)]

    # one alone is far from the plane at 1; two cut the equal ones apart; three and four hold both
    assert margins == [pytest.approx(0.9), 0, 0, 0]


@pytest.mark.parametrize("count", [2, 5, 32])
def test_a_push_changes_a_ranking_only_beyond_its_margin(count, generator):
    codebook = torch.randn(32, 3, generator=generator, dtype=torch.float64)
    residuals = torch.randn(200, 3, generator=generator, dtype=torch.float64)
    ranking = rank_codewords(residuals, codebook, count)
    directions = torch.nn.functional.normalize(torch.randn(20, 200, 3, generator=generator, dtype=torch.float64), dim=2)
    changed = torch.zeros(200, dtype=torch.bool)
    for direction in directions:
        within = rank_codewords(residuals + 0.999 * ranking.margin[:, None] * direction, codebook, count)
        far = rank_codewords(residuals + 30 * ranking.margin[:, None] * direction, codebook, count)
        assert torch.equal(within.codes, ranking.codes)
        changed |= (far.codes != ranking.codes).any(dim=1)
    assert changed.float().mean() > 0.9


def test_a_family_that_does_not_rank_knows_the_chosen_codes_alone(make_quantizer):
    from models.quantizer import Quantizer

    codes = torch.tensor([[1, 2], [3, 4]])
    quantization = Quantization(codes, torch.ones(2, 2), torch.zeros(2, 3, 8))

    ranking = Quantizer.rank(make_quantizer(), quantization, 16)

    assert ranking.codes.tolist() == [[2], [4]]
    assert ranking.margin.isinf().all()


def test_alternatives_begin_with_the_chosen_code_and_cost_nothing_where_none_are_asked_for(make_parts, generator):
    tokenizer = Tokenizer("t", make_parts(), ErrorBounds())
    embeddings = torch.randn(100, 12, generator=generator)

    plain, ranked = tokenizer.encode(embeddings), tokenizer.encode(embeddings, alternatives=16)

    assert plain.alternatives.shape == (100, 0)
    assert ranked.alternatives.shape == (100, 16)
    assert torch.equal(ranked.alternatives[:, 0], plain.codes[:, -1])
    assert torch.equal(ranked.codes, plain.codes)
    assert torch.equal(ranked.margin, plain.margin)


def test_alternatives_are_the_same_alone_and_in_any_batch_and_those_of_the_canonical_path(make_parts, generator):
    # given bounds at which many rankings are in doubt
    embeddings = torch.randn(300, 12, generator=generator)
    tokenizer = Tokenizer("t", make_parts(), ErrorBounds(embedding=1e-4))
    always = Tokenizer("t", make_parts(), ErrorBounds(embedding=1e9))

    whole = tokenizer.encode(embeddings, alternatives=16)

    alone = torch.cat([tokenizer.encode(row[None], alternatives=16).alternatives for row in embeddings])
    assert torch.equal(whole.alternatives, alone)
    assert torch.equal(whole.alternatives, always.encode(embeddings, alternatives=16).alternatives)
    assert 0 < whole.recomputed.sum() < 300
    assert whole.recomputed.sum() > tokenizer.encode(embeddings).recomputed.sum()


def test_the_alternatives_of_texts_are_the_same_in_any_batch(make_parts, text_encoder, texts):
    tokenizer = Tokenizer("t", make_parts((384, 8), text_encoder), ErrorBounds())
    pieces = tokenizer.split(texts)

    whole = tokenizer.encode_texts([*pieces, *pieces], alternatives=16).alternatives

    alone = torch.cat([tokenizer.encode_texts([row], alternatives=16).alternatives for row in pieces])
    assert torch.equal(whole, torch.cat([alone, alone]))

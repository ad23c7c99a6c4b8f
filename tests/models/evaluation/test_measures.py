"""Measures against figures computed by hand."""

from __future__ import annotations

import math

import pytest
import torch

from models.evaluation.measures import codeword_use, collisions, distribution, evaluate, purity, usage


def test_collisions_of_a_small_example():
    # given 6 items: a group of 3, a pair, a single
    codes = torch.tensor([[1, 2], [1, 2], [1, 2], [2, 1], [2, 1], [0, 0]])
    # when
    found = collisions(codes)
    # then
    assert found.rate == pytest.approx(1 - 3 / 6)
    assert found.largest_group == 3
    assert found.group_sizes == {1: 1, 2: 1, 3: 1}


def test_equal_embeddings_are_counted_apart():
    embeddings = torch.tensor([[1.0, 2.0], [1.0, 2.0], [1.0, 2.5], [0.0, 0.0]])
    assert collisions(torch.zeros(4, 2, dtype=torch.int64), embeddings).duplicates == pytest.approx(1 / 4)


def test_usage_of_a_small_example():
    # given level 1 with two codewords used alike out of 4, level 2 with one
    codes = torch.tensor([[0, 5], [0, 5], [3, 5], [3, 5]])
    # when
    first, second = usage(codes, (4, 8))
    # then
    assert (first.used, first.perplexity, first.entropy) == pytest.approx((0.5, 2.0, 1.0))
    assert (second.used, second.perplexity, second.entropy) == pytest.approx((1 / 8, 1.0, 0.0))


def test_usage_counts_a_row_by_its_weight():
    (level,) = usage(torch.tensor([[0], [1]]), (2,), torch.tensor([3.0, 1.0]))
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert level.perplexity == pytest.approx(math.exp(entropy))
    assert level.entropy == pytest.approx(entropy / math.log(2))


def test_reconstruction_is_a_share_of_the_variance(make_parts):
    # given a decoder that answers the mean
    parts = make_parts()
    embeddings = torch.randn(500, 12, generator=torch.Generator().manual_seed(0)) + 3
    for parameter in parts.decoder.parameters():
        parameter.data.zero_()
    parts.decoder.centre.copy_(embeddings.mean(dim=0))
    # when
    report = evaluate(embeddings, parts.network, parts.quantizer, parts.decoder)
    # then
    assert report.reconstruction_error == pytest.approx(1.0, abs=1e-4)


def test_the_quantization_error_is_that_of_the_residual_no_level_took(make_parts):
    parts = make_parts()
    embeddings = torch.randn(300, 12, generator=torch.Generator().manual_seed(0))
    report = evaluate(embeddings, parts.network, parts.quantizer, parts.decoder)
    latents = parts.network(embeddings).detach()
    quantized = parts.quantizer.decode(parts.quantizer.quantize(latents).codes).detach()
    errors = (latents - quantized).square().sum(dim=1)
    assert report.quantization_error["mean"] == pytest.approx(float(errors.mean()), rel=1e-4)
    assert report.quantization_error["q50"] == pytest.approx(float(errors.median()), rel=1e-2)


def test_the_distribution_of_a_known_series():
    found = distribution(torch.arange(101.0))
    assert found["mean"] == 50
    assert [found[name] for name in ("q01", "q05", "q50", "q95", "q99")] == [1, 5, 50, 95, 99]


def test_purity_is_the_share_of_the_most_frequent_category_under_a_prefix():
    codes = torch.tensor([[0, 0], [0, 1], [0, 1], [1, 0]])
    categories = ["hair", "skin", "skin", "nails"]
    assert purity(codes, categories, 1) == pytest.approx(3 / 4)
    assert purity(codes, categories, 2) == 1


def test_a_report_reads_well_and_is_json(make_parts):
    # given
    parts = make_parts()
    report = evaluate(torch.randn(50, 12), parts.network, parts.quantizer, parts.decoder)
    # when, then
    assert "raw collisions" in str(report)
    assert set(report.as_dict()) == {
        "items",
        "reconstruction_error",
        "collisions",
        "levels",
        "quantization_error",
    }
    assert all(isinstance(size, str) for size in report.as_dict()["collisions"]["group_sizes"])


def test_codeword_use_is_ranked_and_1_is_as_often_as_all_alike():
    # given codewords of a level of 4 chosen 3, 1, 0 and 0 times
    (use,) = codeword_use(torch.tensor([[2], [2], [2], [0]]), (4,))
    assert use == (3.0, 1.0, 0.0, 0.0)
    (weighted,) = codeword_use(torch.tensor([[2], [0]]), (4,), torch.tensor([1.0, 3.0]))
    assert weighted == (3.0, 1.0, 0.0, 0.0)

"""The nearest codeword, its margin, and the residual quantizer."""

from __future__ import annotations

import pytest
import torch

from models import quantizer as quantizer_module
from models.quantizer import nearest_codeword, rank_codewords, search_table
from models.residual import ResidualQuantizer


@pytest.mark.parametrize("exact", [False, True])
def test_an_offset_of_100_gives_the_codes_of_brute_force(exact, generator):
    # given data far from the origin, where |x|^2 + |c|^2 - 2xc in float32 loses its digits
    residuals = torch.randn(20_000 if not exact else 2_000, 32, generator=generator) + 100
    codebook = torch.randn(256, 32, generator=generator) + 100
    # when
    codes = nearest_codeword(residuals, codebook, exact=exact).code
    # then
    brute = torch.cdist(residuals.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist")
    assert (codes != brute.argmin(dim=1)).sum() <= 1


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ties_go_to_the_lowest_index(exact, dtype):
    # given residuals midway between two codewords, and a codeword that occurs twice
    codebook = torch.tensor([[3.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 9.0], [0.0, 9.0]], dtype=dtype)
    residuals = torch.tensor([[0.0, 0.0], [0.0, 8.0], [2.0, 0.0]], dtype=dtype)
    # when
    nearest = nearest_codeword(residuals, codebook, exact=exact)
    # then; the codeword that occurs twice leaves no doubt
    assert nearest.code.tolist() == [1, 3, 0]
    assert nearest.margin[[0, 2]].tolist() == [0, 0]
    assert nearest.margin[1].item() == pytest.approx((65 - 1) / (2 * 82**0.5), rel=1e-4)


def test_a_tie_of_many_codewords_goes_to_the_lowest_index_in_the_exact_form():
    # given the corners of a cube around the residual; rounding of the expanded square would choose among them
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 3)
    codebook = torch.cat([torch.full((1, 3), 5.0, dtype=torch.float64), corners]) / 3
    # when
    nearest = nearest_codeword(torch.zeros(1, 3, dtype=torch.float64), codebook, exact=True)
    # then
    assert nearest.code.tolist() == [1]


def test_the_margin_is_the_distance_to_the_plane_between_the_two_nearest(generator):
    # given
    codebook = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 100.0]], dtype=torch.float64)
    # when
    nearest = nearest_codeword(torch.tensor([[1.5, 7.0]], dtype=torch.float64), codebook)
    # then the plane is x = 2
    assert nearest.margin.item() == pytest.approx(0.5)


@pytest.mark.parametrize("exact", [False, True])
def test_the_nearest_plane_need_not_be_the_second_codeword_s(exact):
    # given the second-nearest codeword behind the nearest, and a third on the other side
    codebook = torch.tensor([[1.0], [1.1], [-1.2]], dtype=torch.float64)
    # when
    nearest = nearest_codeword(torch.zeros(1, 1, dtype=torch.float64), codebook, exact=exact)
    # then
    assert nearest.code.tolist() == [0]
    assert nearest.margin.item() == pytest.approx(0.1)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("dimension", [1, 2, 8])
def test_a_push_towards_any_codeword_changes_the_code_only_beyond_the_margin(dimension, scale, exact, generator):
    # given
    codebook = scale * torch.randn(32, dimension, generator=generator, dtype=torch.float64)
    residuals = scale * torch.randn(100, dimension, generator=generator, dtype=torch.float64)
    code, margin = nearest_codeword(residuals, codebook, exact=exact)
    # when pushed along the normal of every plane
    crossed = torch.zeros(100, dtype=torch.bool)
    for other in range(32):
        normal = torch.nn.functional.normalize(codebook[other] - codebook[code], dim=1)
        within = nearest_codeword(residuals + 0.999 * margin[:, None] * normal, codebook, exact=exact).code
        beyond = nearest_codeword(residuals + 1.001 * margin[:, None] * normal, codebook, exact=exact).code
        # then
        assert torch.equal(within, code)
        crossed |= beyond != code
    assert crossed.all()


@pytest.mark.parametrize("exact", [False, True])
def test_equal_codewords_are_no_ambiguity(exact, generator):
    # given each codeword eight times, the chosen one's equals more than are measured again
    codebook = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    residuals = torch.randn(500, 4, generator=generator, dtype=torch.float64)
    alone = nearest_codeword(residuals, codebook, exact=True)
    # when
    nearest = nearest_codeword(residuals, codebook.repeat(8, 1), exact=exact)
    # then
    assert torch.equal(nearest.code, alone.code)
    assert torch.allclose(nearest.margin, alone.margin, rtol=1e-6)
    assert nearest_codeword(residuals, codebook[:1].repeat(8, 1), exact=exact).margin.isinf().all()


def test_a_crowd_of_codewords_that_rounding_cannot_part_is_measured_by_differences(generator):
    # given codewords a rounding step from each other, far from the mean of all
    crowd = 1 + 1e-15 * torch.arange(40, dtype=torch.float64)
    codebook = torch.cat([torch.tensor([-3000.0], dtype=torch.float64), crowd.flip(0)])[:, None]
    # when
    fast, exact = (nearest_codeword(codebook, codebook, exact=exact) for exact in (False, True))
    # then
    assert torch.equal(fast.code, exact.code)
    assert (fast.margin <= exact.margin).all()
    assert (fast.margin[1:] < 1e-13).all()


@pytest.mark.parametrize("scale", [1e-60, 1e-30, 1e25])
def test_gaps_that_float32_cannot_hold_are_searched_as_the_exact_form_does(scale, generator):
    # given squared distances below and above every float32
    codebook = scale * torch.randn(300, 4, generator=generator, dtype=torch.float64)
    residuals = scale * torch.randn(100, 4, generator=generator, dtype=torch.float64)
    # when
    fast, exact = (nearest_codeword(residuals, codebook, exact=exact) for exact in (False, True))
    # then
    assert torch.equal(fast.code, exact.code)
    assert torch.allclose(fast.margin, exact.margin, rtol=1e-6, atol=0)


def test_codes_and_margins_of_many_rows_searched_in_parts_are_those_of_each_part(generator):
    codebook = torch.randn(256, 8, generator=generator)
    residuals = torch.randn(1_500, 8, generator=generator)
    whole = nearest_codeword(residuals, codebook)
    parts = [nearest_codeword(rows, codebook) for rows in residuals.split(100)]
    assert torch.equal(whole.code, torch.cat([part.code for part in parts]))
    assert torch.allclose(whole.margin, torch.cat([part.margin for part in parts]), atol=1e-6)


def test_codebooks_too_large_to_hold_all_distances_give_the_same_codes_and_margins(generator, monkeypatch):
    # given a codebook with repeated codewords, and residuals at, between and off them
    codebook = torch.randn(40, 6, generator=generator, dtype=torch.float64) + 3
    codebook[[7, 30, 39]] = codebook[2].clone()
    residuals = torch.randn(300, 6, generator=generator, dtype=torch.float64) + 3
    residuals = torch.cat([residuals, codebook, (codebook + codebook.roll(1, 0)) / 2])
    held = nearest_codeword(residuals, codebook)
    # when
    monkeypatch.setattr(quantizer_module, "SPANS_HELD", 39)
    table = search_table(codebook)
    nearest = nearest_codeword(residuals, codebook, table=table)
    # then
    assert table.inverse_spans is None
    assert torch.equal(nearest.code, held.code)
    assert torch.equal(nearest.code, nearest_codeword(residuals, codebook, exact=True).code)
    assert torch.allclose(nearest.margin, held.margin, rtol=1e-9, atol=1e-12)


def test_65_536_codewords_are_searched_and_ranked_without_the_distances_between_all(generator):
    codebook = torch.randn(65_536, 4, generator=generator, dtype=torch.float64)
    residuals = codebook[[5, 65_535]] + 1e-6
    nearest = nearest_codeword(residuals, codebook, table=search_table(codebook))
    assert nearest.code.tolist() == [5, 65_535]
    assert rank_codewords(residuals, codebook, 3, nearest.code).codes[:, 0].tolist() == [5, 65_535]


def test_an_error_below_the_margin_changes_no_code(make_quantizer, generator):
    # given
    quantizer = make_quantizer()
    latents = torch.randn(500, 8, generator=generator, dtype=torch.float64)
    quantizer.double()
    before = quantizer.quantize(latents)
    errors = torch.randn(500, 8, generator=generator, dtype=torch.float64)
    errors *= 0.999 * before.margins.amin(dim=1, keepdim=True) / errors.norm(dim=1, keepdim=True)
    # when
    after = quantizer.quantize(latents + errors)
    # then
    assert torch.equal(before.codes, after.codes)


def test_the_fast_and_the_exact_form_agree(make_quantizer, generator):
    quantizer = make_quantizer().double()
    latents = torch.randn(300, 8, generator=generator, dtype=torch.float64)
    fast, exact = quantizer.quantize(latents), quantizer.quantize(latents, exact=True)
    assert torch.equal(fast.codes, exact.codes)
    assert torch.allclose(fast.margins, exact.margins)


def test_a_residual_is_the_latent_less_the_codewords_before_it(make_quantizer, generator):
    quantizer = make_quantizer()
    latents = torch.randn(20, 8, generator=generator)
    quantization = quantizer.quantize(latents)
    rebuilt = quantizer.decode(quantization.codes)
    assert torch.allclose(quantization.residuals[:, -1], latents - rebuilt, atol=1e-5)
    assert torch.equal(quantization.residuals[:, 0], latents)


def test_a_level_with_one_codeword_has_an_infinite_margin():
    nearest = nearest_codeword(torch.zeros(3, 2), torch.ones(1, 2))
    assert nearest.code.tolist() == [0, 0, 0]
    assert nearest.margin.isinf().all()


def test_loading_a_quantizer_keeps_the_flag_and_the_codebooks(make_quantizer):
    # given
    trained = make_quantizer()
    fresh = ResidualQuantizer(trained.codebook_sizes, trained.dimension)
    assert not fresh.initialised
    # when
    fresh.load_state_dict(trained.state_dict())
    # then nothing is left that would cluster again
    assert fresh.initialised
    assert all(torch.equal(a, b) for a, b in zip(fresh.codebooks, trained.codebooks, strict=True))


@pytest.mark.parametrize(
    "codes",
    [
        torch.tensor([[0, 0]]),
        torch.tensor([0, 0, 0]),
        torch.tensor([[0, 0, 32]]),
        torch.tensor([[0, -1, 0]]),
        torch.tensor([[0.0, 0.0, 0.0]]),
    ],
)
def test_codes_that_are_no_codes_are_refused(codes, make_quantizer):
    with pytest.raises(ValueError, match="code"):
        make_quantizer().decode(codes)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="do not fit"):
        nearest_codeword(torch.zeros(3, 2), torch.zeros(4, 3))
    with pytest.raises(ValueError, match="needs levels"):
        ResidualQuantizer((), 3)

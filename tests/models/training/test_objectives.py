"""The objectives beside reconstruction: each moves what it claims to move."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from models.network import NetworkConfig, start_linear
from models.residual import ResidualQuantizer
from models.training.fit import _Fitting, fit
from models.training.fit_config import FitConfig
from models.training.objectives import (
    cluster_codewords,
    collaborative_contrast,
    contrast,
    diversity,
    missed_reconstructions,
)
from models.training.rqvae import RQVAE, LossConfig, Variances

SMALL = FitConfig(codebook_sizes=(8, 8, 8), latent=4, hidden=(), epochs=3, batch_rows=128, held_out=0.1)


def test_the_contrast_is_that_of_its_equation(generator):
    # given
    queries, keys = torch.randn(2, 6, 5, generator=generator, dtype=torch.float64)
    # when
    value = contrast(queries, keys, 0.5)
    # then
    logits = torch.nn.functional.cosine_similarity(queries[:, None], keys[None], dim=2) / 0.5
    expected = torch.nn.functional.cross_entropy(logits, torch.arange(6))
    assert float(value) == pytest.approx(float(expected), rel=1e-6)


def test_a_key_that_equals_the_row_s_own_is_no_negative(generator):
    # given a batch in which one item was drawn three times
    queries, keys = torch.randn(2, 6, 5, generator=generator)
    drawn = torch.tensor([0, 1, 2, 3, 4, 5, 2, 2])
    # when
    repeated = contrast(queries[drawn], keys[drawn], 0.5)
    # then its terms are those it has where the others are there once, but for the others' doubled negatives
    logits = torch.nn.functional.cosine_similarity(queries[drawn][:, None], keys[drawn][None], dim=2) / 0.5
    others = (drawn[:, None] != drawn) | torch.eye(8, dtype=torch.bool)
    terms = [
        float(row[mask].logsumexp(0) - row[place]) for place, (row, mask) in enumerate(zip(logits, others, strict=True))
    ]
    assert float(repeated) == pytest.approx(sum(terms) / 8, rel=1e-5)
    assert float(contrast(queries[:1].repeat(4, 1), keys[:1].repeat(4, 1), 0.5)) == pytest.approx(0, abs=1e-6)


def test_items_without_a_collaborative_embedding_are_skipped(generator):
    # given
    latents = torch.randn(6, 5, generator=generator).requires_grad_()
    keys = torch.randn(6, 5, generator=generator)
    holes = keys.clone()
    holes[[1, 4]] = torch.nan
    some = [0, 2, 3, 5]
    # when
    value = collaborative_contrast(latents, holes, 0.2)
    value.backward()
    # then
    assert torch.allclose(value, contrast(latents[some], keys[some], 0.2))
    assert latents.grad.isfinite().all()
    assert not latents.grad[[1, 4]].any()
    nobody = collaborative_contrast(latents, torch.full((6, 5), torch.nan), 0.2)
    nobody.backward()
    assert nobody.item() == 0


@pytest.mark.parametrize("collaborative", [None, torch.zeros(7, 3), torch.full((600, 3), torch.nan)])
def test_a_collaborative_term_without_its_data_is_refused(collaborative, clustered):
    with pytest.raises(ValueError, match="collaborative embedding"):
        fit(clustered, replace(SMALL, loss=LossConfig(collaborative=0.02)), collaborative=collaborative)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (LossConfig(reconstruction=0.0, collaborative=1.0), r"loss\.reconstruction or loss\.contrastive"),
        (LossConfig(contrastive_temperature=0.0), r"loss\.contrastive_temperature"),
    ],
)
def test_losses_that_train_nothing_are_refused(loss, message, clustered):
    with pytest.raises(ValueError, match=message):
        fit(clustered, replace(SMALL, loss=loss))


@pytest.mark.parametrize("width", [4, 6])
def test_collaborative_embeddings_of_any_width_can_be_aligned_to(width, clustered, generator):
    collaborative = torch.randn(600, width, generator=generator)
    collaborative[::3] = torch.nan
    fitted = fit(clustered, replace(SMALL, loss=LossConfig(collaborative=0.1)), collaborative=collaborative)
    assert all(tensor.isfinite().all() for tensor in fitted.model.state_dict().values())


@pytest.fixture
def model():
    torch.manual_seed(4)
    model = RQVAE(NetworkConfig((12, 16, 8)), (16, 16, 16), collaborative_width=6)
    for level, codebook in enumerate(model.quantizer.codebooks):
        codebook.data = torch.randn(codebook.shape) / 2**level
    return model


@pytest.mark.parametrize(
    ("term", "moved"),
    [
        ("contrastive", {"network", "decoder"}),
        ("collaborative", {"network", "alignment"}),
        ("diversity", {"quantizer"}),
    ],
)
def test_the_gradient_of_each_objective_reaches_the_parts_it_is_about(term, moved, model, generator):
    # given
    batch = torch.randn(64, 12, generator=generator)
    collaborative = torch.randn(64, 6, generator=generator)
    clusters = [cluster_codewords(codebook, 4, generator) for codebook in model.quantizer.codebooks]
    config = LossConfig(**{term: 1.0})
    # when
    losses = model.losses(batch, Variances(12.0, 8.0), config, collaborative=collaborative, clusters=clusters)
    getattr(losses, term).sum().backward()
    # then
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert {name.split(".")[0] for name in gradients} == moved
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    if term == "diversity":
        assert len(gradients) == 3
    others = {"contrastive", "collaborative", "diversity"} - {term}
    assert not any(bool(getattr(losses, other).any()) for other in others)


def test_the_diversity_is_what_letter_s_draws_are_on_average(generator):
    # given
    codebook = torch.randn(12, 5, generator=generator, dtype=torch.float64)
    clusters = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3])
    codes = torch.tensor([0, 0, 4, 11, 9])
    # when
    value = diversity(codebook, codes, clusters)
    # then
    scale = codebook.square().sum(dim=1).mean()
    expected = []
    for code in codes.tolist():
        others = [other for other in range(12) if other != code]
        logits = codebook[others] @ codebook[code] / scale
        positives = [place for place, other in enumerate(others) if clusters[other] == clusters[code]]
        draws = [torch.nn.functional.cross_entropy(logits, torch.tensor(place)) for place in positives]
        expected.append(float(sum(draws) / len(draws)) if draws else 0.0)
    assert float(value) == pytest.approx(sum(expected) / 5, rel=1e-5)


@pytest.mark.parametrize("size", [1, 2, 3, 25])
def test_codewords_are_clustered_evenly_and_codebooks_of_any_size_have_finite_gradients(size, generator):
    # given
    codebook = torch.randn(size, 4, generator=generator).requires_grad_()
    # when
    clusters = cluster_codewords(codebook, 10, generator)
    diversity(codebook, torch.randint(size, (30,), generator=generator), clusters).backward()
    # then
    assert int(clusters.bincount().max()) <= -(-size // max(1, min(10, size // 2)))
    assert codebook.grad.isfinite().all()


def entropy(codes, size):
    shares = torch.bincount(codes, minlength=size).double() / len(codes)
    return float(-(shares[shares > 0] * shares[shares > 0].log()).sum())


def test_the_diversity_term_brings_back_codewords_of_a_collapsed_codebook(generator):
    # given rows that all choose one codeword; the others lie far off on the other side
    rows = torch.randn(256, 8, generator=generator) + 3
    start = torch.cat([rows.mean(dim=0)[None], -3 + 0.5 * torch.randn(15, 8, generator=generator)])

    def trained(weight):
        quantizer = ResidualQuantizer((16,), 8)
        quantizer.codebooks[0].data = start.clone()
        optimiser = torch.optim.Adam(quantizer.parameters(), lr=0.05)
        for step in range(200):
            if step % 20 == 0:
                clusters = cluster_codewords(quantizer.codebooks[0], 4, generator)
            codes = quantizer.quantize(rows).codes
            codebook_loss = (rows - quantizer.codewords(codes)[:, 0]).square().sum(dim=1).mean() / 8
            optimiser.zero_grad()
            (codebook_loss + weight * diversity(quantizer.codebooks[0], codes[:, 0], clusters)).backward()
            optimiser.step()
        return quantizer.quantize(rows).codes[:, 0]

    # when, then
    assert entropy(trained(0.0), 16) == 0
    assert entropy(trained(0.1), 16) > 0.5


def trained(rows, config, sizes, collaborative=None):
    """An RQ-VAE after 100 steps on all rows (N, 8), its codebooks drawn from them; equal but for the config."""
    torch.manual_seed(1)
    model = RQVAE(NetworkConfig((8, 32, 6)), sizes, collaborative_width=4)
    with torch.no_grad():
        latents = model.network(rows)
        for level, codebook in enumerate(model.quantizer.codebooks):
            drawn = torch.randperm(len(rows))[: len(codebook)]
            codebook.copy_(model.quantizer.quantize(latents).residuals[drawn, level])
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(100):
        optimiser.zero_grad()
        losses = model.losses(rows, Variances(float(rows.var(dim=0).sum()), 1.0), config, collaborative=collaborative)
        losses.total(config).backward()
        optimiser.step()
    return model


def test_the_contrastive_term_lets_reconstructions_find_their_own_embedding(generator):
    # given items of very different lengths: the longest few make up the reconstruction error
    rows = torch.randn(300, 8, generator=generator) * torch.randn(300, 1, generator=generator).exp()

    def found(config):
        model = trained(rows, config, (16, 16, 16))
        return 1 - missed_reconstructions(model, rows, model(rows).quantization.codes)

    # when, then
    contrastive = LossConfig(reconstruction=0.0, contrastive=1.0, repulsion=0.0)
    assert found(contrastive) > 2 * found(LossConfig(repulsion=0.0))


def test_the_collaborative_term_gives_items_that_go_together_the_same_first_code_though_they_look_unlike(generator):
    # given ten kinds of items far apart, and that each goes with one other
    look = torch.arange(300) % 10
    goes_with = look % 5
    rows = 3 * torch.randn(10, 8, generator=generator)[look] + 0.5 * torch.randn(300, 8, generator=generator)
    collaborative = torch.randn(5, 4, generator=generator)[goes_with] + 0.1 * torch.randn(300, 4, generator=generator)
    pairs = (goes_with[:, None] == goes_with) & (look[:, None] != look)

    def shared(config):
        codes = trained(rows, config, (10, 8), collaborative)(rows).quantization.codes[:, 0]
        return float((codes[:, None] == codes)[pairs].float().mean())

    # when, then
    assert shared(LossConfig(repulsion=0.0, collaborative=3.0)) > 0.3 + shared(LossConfig(repulsion=0.0))


def test_a_reconstruction_is_missed_where_another_embedding_is_nearer_to_it(make_parts):
    # given rows that are decoded to themselves, two with equal embeddings and two with each other's codes
    parts = make_parts(widths=(8, 8), sizes=(32,))
    start_linear(parts.decoder.layers, torch.eye(8), torch.eye(8))
    rows = parts.quantizer.codebooks[0].detach()[:6].clone()
    rows[1] = rows[0]
    # when, then
    assert missed_reconstructions(parts, rows, torch.tensor([[0], [0], [2], [3], [4], [5]])) == 0
    assert missed_reconstructions(parts, rows, torch.tensor([[0], [0], [2], [3], [5], [4]])) == pytest.approx(2 / 6)
    assert missed_reconstructions(parts, rows, torch.tensor([[0], [0], [2], [2], [2], [5]])) == pytest.approx(2 / 6)


@pytest.mark.parametrize(
    ("loss", "terms"),
    [
        (LossConfig(), {"reconstruction"}),
        (LossConfig(contrastive=0.1), {"reconstruction", "missed"}),
        (LossConfig(reconstruction=0.0, contrastive=0.1), {"missed"}),
    ],
)
def test_the_epoch_is_chosen_by_what_is_trained_for(loss, terms, clustered):
    config = replace(SMALL, loss=loss)
    fitted = fit(clustered, config)
    for measure in fitted.history:
        parts = {"reconstruction": measure.reconstruction, "missed": measure.missed}
        expected = 4 * measure.colliding + sum(parts[term] for term in terms)
        assert measure.value == pytest.approx(expected)
    assert ("reconstruction error" in config.stopped_on, "points nearer" in config.stopped_on) == (
        "reconstruction" in terms,
        "missed" in terms,
    )


def test_a_contrast_alone_still_decodes_to_embeddings_of_the_right_length(clustered):
    # given a contrast leaves the length of a reconstruction undecided
    config = replace(SMALL, epochs=5, loss=LossConfig(reconstruction=0.0, contrastive=1.0))
    fitting = _Fitting(clustered, config, None)
    fitting._project()
    fitting._initialise()
    fitting.model.decoder.layers[-1].weight.data *= 50
    assert fitting._measure(0, fitting._coded().codes).reconstruction > 10
    # when
    fitting.model.scale_decoder(clustered)
    # then
    assert fitting._measure(0, fitting._coded().codes).reconstruction < 1

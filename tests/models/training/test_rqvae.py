from __future__ import annotations

import pytest
import torch

from models.network import DecoderNetwork, EncoderNetwork, NetworkConfig, mlp, start_linear
from models.training.rqvae import RQVAE, LossConfig, Variances

VARIANCES = Variances(embeddings=12.0, latents=8.0)


@pytest.fixture
def model(generator):
    torch.manual_seed(2)
    model = RQVAE(NetworkConfig((12, 16, 8)), (16, 16, 16))
    for level, codebook in enumerate(model.quantizer.codebooks):
        codebook.data = torch.randn(codebook.shape, generator=generator) / 2**level
    return model


@pytest.fixture
def batch(generator):
    return torch.randn(64, 12, generator=generator)


def encoder_gradient(model):
    return torch.cat([p.grad.flatten() for p in model.network.parameters()])


@pytest.mark.parametrize("level", [0, 1, 2])
def test_the_commitment_of_every_level_reaches_the_encoder(model, batch, level):
    # given the mistake: with a straight-through codeword inside the loop the gradients cancel beyond level 1
    losses = model.losses(batch, VARIANCES)
    # when
    losses.commitment[level].backward()
    # then
    gradient = encoder_gradient(model)
    assert gradient.isfinite().all()
    assert gradient.norm() > 1e-3
    assert all(codebook.grad is None for codebook in model.quantizer.codebooks)


def test_the_gradient_of_a_level_s_commitment_is_that_of_its_equation(model, batch):
    # given
    latents = model.network(batch).detach().requires_grad_()
    quantization = model.quantizer.quantize(latents)
    codewords = model.quantizer.codewords(quantization.codes).detach()
    # when
    (quantization.residuals[:, 2] - codewords[:, 2]).square().sum().backward()
    # then 2 (z - sum of the codewords up to the level)
    assert torch.allclose(latents.grad, 2 * (latents.detach() - codewords.sum(dim=1)), atol=1e-5)


@pytest.mark.parametrize("level", [0, 1, 2])
def test_the_codebook_loss_of_a_level_moves_only_its_codebook(model, batch, level):
    model.losses(batch, VARIANCES).codebook[level].backward()
    for number, codebook in enumerate(model.quantizer.codebooks):
        moved = codebook.grad is not None and float(codebook.grad.norm()) > 0
        assert moved == (number == level)
    assert all(p.grad is None or not p.grad.any() for p in model.network.parameters())


def test_the_straight_through_estimator_hands_the_reconstruction_s_gradient_to_the_encoder_unchanged(model, batch):
    # given
    output = model(batch)
    # when
    quantized = model.quantizer.decode(output.quantization.codes).detach().requires_grad_()
    (batch - model.decoder(quantized)).square().sum().backward()
    (gradient,) = torch.autograd.grad((batch - output.reconstruction).square().sum(), output.latents)
    # then
    assert torch.allclose(gradient, quantized.grad, atol=1e-5)


def test_what_is_decoded_is_the_sum_of_the_codewords(model, batch):
    output = model(batch)
    rebuilt = model.decoder(model.quantizer.decode(output.quantization.codes))
    assert torch.allclose(output.reconstruction, rebuilt, atol=1e-5)


def test_every_loss_is_a_share_of_a_variance_whatever_the_width(generator):
    # given the same numbers once and four times side by side: sums are four times larger, means are equal
    narrow = torch.randn(256, 8, generator=generator)
    losses = []
    for repeat in (1, 4):
        data = narrow.repeat(1, repeat)
        model = RQVAE(NetworkConfig((8 * repeat, 8 * repeat)), (4,))
        eye = torch.eye(8 * repeat)
        start_linear(model.network.layers, eye, eye)
        start_linear(model.decoder.layers, eye, eye)
        model.quantizer.codebooks[0].data = narrow[:4].repeat(1, repeat)
        variance = float((data - data.mean(dim=0)).square().sum(dim=1).mean())
        losses.append(model.losses(data, Variances(variance, variance)))
    # when, then
    for one, four in zip(losses[0], losses[1], strict=True):
        assert torch.allclose(one, four, rtol=1e-4)
    assert torch.allclose(losses[0].reconstruction, losses[0].codebook[0], rtol=1e-4)


def test_a_row_alone_has_the_losses_it_has_among_others(model, batch):
    whole = model.losses(batch, VARIANCES)
    rows = [model.losses(row[None], VARIANCES) for row in batch]
    for number in range(3):
        assert torch.allclose(whole[number], torch.stack([row[number] for row in rows]).mean(dim=0), rtol=1e-4)


def test_the_repulsion_parts_items_that_collide(model, batch):
    # given
    first, second = batch[:8], batch[:8] + 0.1 * batch[8:16]
    optimiser = torch.optim.SGD(model.network.parameters(), lr=0.5)
    before = (model.network(first) - model.network(second)).norm(dim=1).mean()
    # when
    for _ in range(50):
        optimiser.zero_grad()
        model.losses(batch, VARIANCES, pairs=(first, second)).repulsion.backward()
        optimiser.step()
    # then
    after = (model.network(first) - model.network(second)).norm(dim=1).mean()
    assert after > 1.5 * before


def test_equal_items_repel_without_nan(model, batch):
    model.losses(batch, VARIANCES, pairs=(batch[:4], batch[:4])).repulsion.backward()
    assert encoder_gradient(model).isfinite().all()


def test_the_total_weighs_each_loss(model, batch):
    losses = model.losses(batch, VARIANCES, pairs=(batch[:4], batch[4:8]))
    total = losses.total(LossConfig(codebook=2.0, commitment=3.0, repulsion=5.0))
    expected = losses.reconstruction + 2 * losses.codebook.sum() + 3 * losses.commitment.sum() + 5 * losses.repulsion
    assert torch.allclose(total, expected)


@pytest.mark.parametrize("hidden", [(), (16,), (32, 16)])
def test_layers_started_linear_compute_that_linear_map(hidden, generator):
    # given
    layers = mlp((12, *hidden, 5))
    first, last = torch.randn(8, 12, generator=generator), torch.randn(5, 8, generator=generator)
    batch = torch.randn(20, 12, generator=generator)
    # when
    start_linear(layers, first, last)
    # then
    assert torch.allclose(layers(batch), batch @ (last @ first).T, atol=1e-4)


def test_a_linear_start_through_too_narrow_a_layer_is_refused():
    with pytest.raises(ValueError, match="at least 16"):
        start_linear(mlp((12, 15, 5)), torch.zeros(8, 12), torch.zeros(5, 8))


def test_the_networks_centre_their_data():
    # given
    config = NetworkConfig((3, 2))
    network, decoder = EncoderNetwork(config), DecoderNetwork(config)
    network.centre.fill_(100)
    decoder.centre.fill_(100)
    for module in (network, decoder):
        module.layers[0].bias.data.zero_()
    # when, then
    assert not network(torch.full((1, 3), 100.0)).any()
    assert decoder(torch.zeros(1, 2)).tolist() == [[100.0, 100.0, 100.0]]


@pytest.mark.parametrize("widths", [(), (3,), (3, 0)])
def test_widths_that_make_no_network_are_refused(widths):
    with pytest.raises(ValueError, match="a network needs"):
        NetworkConfig(widths)

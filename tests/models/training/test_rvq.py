"""The family r-vq: codebooks learned batch by batch around networks that stay as they are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from vector_quantize_pytorch import ResidualVQ

from models.training.cluster import ClusterConfig, fit_clusters
from models.training.ema import EMAConfig
from models.training.fit import _Fitting, fit
from models.training.rvq import RVQConfig
from models.training.train import TrainConfig, fit_family

SMALL = RVQConfig(
    codebook_sizes=(16, 16, 16), ema=EMAConfig(decay=0.9), epochs=10, batch_rows=128, learning_rate=0.03, held_out=0.1
)


@pytest.fixture(scope="module")
def rows():
    """1,000 embeddings (1000, 24) of uneven spread around 100 centres, off the origin."""
    source = torch.Generator().manual_seed(2)
    centres = torch.randn(100, 24, generator=source) * torch.linspace(2, 0.2, 24)
    return 5 + centres[torch.randint(100, (1_000,), generator=source)] + 0.3 * torch.randn(1_000, 24, generator=source)


def fitted(rows, config):
    return fit_family(rows, TrainConfig(family="r-vq", fit=config))


@pytest.mark.parametrize("codebooks", ["ema", "gradient"])
def test_batches_take_codebooks_from_a_start_on_few_rows_to_what_k_means_of_all_rows_reaches(codebooks, rows):
    # given
    config = replace(SMALL, codebooks=codebooks, start_rows=100, epochs=20)
    clustered = fit_clusters("rq-kmeans", rows, ClusterConfig(codebook_sizes=(16, 16, 16), held_out=0.1))
    # when
    trained = fitted(rows, config)
    # then
    start = trained.history[0]
    assert trained.best.epoch > 0
    assert trained.best.value == trained.best.reconstruction < 0.9 * start.reconstruction
    assert trained.best.reconstruction < 1.25 * clustered.best.reconstruction


@pytest.mark.parametrize("latent", [0, 5])
def test_the_networks_stay_as_they_start(latent, rows):
    # given
    start = fitted(rows, replace(SMALL, latent=latent, epochs=0)).model
    # when
    model = fitted(rows, replace(SMALL, latent=latent, epochs=2)).model
    # then
    for before, after in zip(start.network.parameters(), model.network.parameters(), strict=True):
        assert torch.equal(before, after)
    for before, after in zip(start.decoder.parameters(), model.decoder.parameters(), strict=True):
        assert torch.equal(before, after)
    if not latent:
        assert torch.equal(model.network(rows), rows - model.network.centre)


def test_codes_equal_those_of_vector_quantize_pytorch_with_the_same_codebooks(rows):
    # given
    model = fitted(rows, SMALL).model
    oracle = ResidualVQ(dim=24, num_quantizers=3, codebook_size=16)
    for layer, codebook in zip(oracle.layers, model.quantizer.codebooks, strict=True):
        layer._codebook.embed.data.copy_(codebook[None])
    oracle.eval()
    # when
    _, theirs, _ = oracle(model.network(rows)[None])
    quantization = model.quantizer.quantize(model.network(rows))
    # then they agree wherever float32 can tell
    clear = quantization.margins.amin(dim=1) > 1e-4
    assert clear.float().mean() > 0.99
    assert torch.equal(quantization.codes[clear], theirs[0][clear])


def test_dead_codewords_restart(rows):
    # given a start on fewer rows than there are codewords, some of which repeat others
    trained = fitted(rows, replace(SMALL, codebook_sizes=(32, 32), start_rows=20))
    # then
    codes = trained.model.quantizer.quantize(trained.model.network(rows)).codes
    assert [len(codes[:, level].unique()) for level in range(2)] == [32, 32]


def test_the_best_epoch_on_held_out_rows_is_kept_and_training_stops_after_the_patience(rows):
    # given running means of single batches of 32 rows: they only get worse
    config = replace(SMALL, batch_rows=32, patience=3, ema=replace(SMALL.ema, decay=0.0))
    # when
    trained = fitted(rows, config)
    # then
    assert trained.best.value == min(measure.value for measure in trained.history)
    assert trained.history[-1].epoch == trained.best.epoch + 3


def test_a_start_on_some_rows_clusters_those_only(rows):
    # given
    config = replace(SMALL, start_rows=200, epochs=0).training(24)
    fitting = _Fitting(rows, config, None)
    others = sorted(set(fitting.training.tolist()) - set(fitting.codebooks.some(200).tolist()))
    assert len(others) == 700
    # when the other rows change but for their mean
    moved = rows.clone()
    moved[others] = moved[others].roll(1, dims=0)
    started, again = fit(rows, config), fit(moved, config)
    # then the codebooks do not
    for one, other in zip(started.model.quantizer.codebooks, again.model.quantizer.codebooks, strict=True):
        assert torch.allclose(one, other, atol=1e-4)

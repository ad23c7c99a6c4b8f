"""Codebooks that follow running means."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from vector_quantize_pytorch import VectorQuantize

from models.quantizer import Quantization
from models.residual import ResidualQuantizer
from models.training.ema import EMAConfig, RunningCodebooks
from models.training.fit import _Fitting, fit
from models.training.fit_config import FitConfig
from models.training.rqvae import LossConfig

SMALL = FitConfig(
    codebook_sizes=(8, 8, 8), latent=4, hidden=(), epochs=3, batch_rows=128, held_out=0.1, codebooks="ema"
)


def quantization(codes, residuals):
    return Quantization(codes, torch.zeros(codes.shape), residuals)


def test_codewords_are_the_running_means_of_what_they_receive(generator):
    # given one level of three codewords, started at 4, 2 and 2 of the rows of a batch of 8
    running = RunningCodebooks((3,), 2, EMAConfig(decay=0.75, smoothing=1e-9))
    codebook = torch.randn(3, 2, generator=generator)
    start = codebook.clone()
    running.start(0, codebook, torch.tensor([40, 20, 20]), batch_rows=8)
    codes = torch.tensor([0, 0, 0, 2, 2, 2, 2, 2])
    received = torch.randn(8, 2, generator=generator)
    # when two batches come
    for _ in range(2):
        running.follow([codebook], quantization(codes[:, None], received[:, None].repeat(1, 2, 1)))
    # then
    counts, sums = torch.tensor([4.0, 2.0, 2.0]), start * torch.tensor([[4.0], [2.0], [2.0]])
    for _ in range(2):
        counts = 0.75 * counts + 0.25 * torch.tensor([3.0, 0.0, 5.0])
        totals = torch.stack([received[:3].sum(dim=0), torch.zeros(2), received[3:].sum(dim=0)])
        sums = 0.75 * sums + 0.25 * totals
    assert torch.allclose(codebook, sums / counts[:, None], atol=1e-5)
    assert torch.allclose(codebook[1], start[1], atol=1e-5)


def test_codebooks_follow_as_those_of_vector_quantize_pytorch_do(generator):
    # given both with the same codebook and the same counts
    oracle = VectorQuantize(dim=6, codebook_size=16, decay=0.9, eps=1e-5, threshold_ema_dead_code=0)
    running = RunningCodebooks((16,), 6, EMAConfig(decay=0.9, smoothing=1e-5))
    ours = ResidualQuantizer((16,), 6).requires_grad_(requires_grad=False)
    codebook = torch.randn(16, 6, generator=generator)
    ours.codebooks[0].copy_(codebook)
    running.start(0, codebook, torch.full((16,), 4), batch_rows=64)
    inner = oracle._codebook
    inner.embed.data.copy_(codebook[None])
    inner.embed_avg.data.copy_(4 * codebook[None])
    inner.cluster_size.data.fill_(4.0)
    oracle.train()
    for _ in range(5):
        batch = torch.randn(64, 6, generator=generator)
        # when
        _, theirs, _ = oracle(batch[None])
        chosen = ours.quantize(batch)
        running.follow(ours.codebooks, chosen)
        # then
        assert torch.equal(chosen.codes[:, 0], theirs[0])
        assert torch.allclose(ours.codebooks[0], inner.embed[0], atol=1e-4)


def test_a_codeword_that_nobody_chooses_for_long_stays_finite():
    running = RunningCodebooks((4,), 2, EMAConfig(decay=0.0))
    codebook = torch.ones(4, 2)
    running.start(0, codebook, torch.ones(4), batch_rows=4)
    for _ in range(3):
        running.follow([codebook], quantization(torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 2, 2)))
    assert codebook.isfinite().all()
    assert torch.allclose(codebook[0], torch.ones(2), atol=1e-3)


def test_dead_codewords_come_back_and_stay_where_they_were_moved(clustered):
    # given a fit some of whose codewords nothing is near to
    fitting = _Fitting(clustered, SMALL, None)
    fitting._project()
    fitting._initialise()
    for codebook in fitting.model.quantizer.codebooks:
        codebook.data[:3] = 1e3
    # when
    fitting.codebooks.restart_dead(fitting._coded().codes)
    moved = [codebook[:3].clone() for codebook in fitting.model.quantizer.codebooks]
    output = fitting.model(clustered)
    fitting.model.running.follow(fitting.model.quantizer.codebooks, output.quantization)
    # then their means are of where they are now
    for codebook, before in zip(fitting.model.quantizer.codebooks, moved, strict=True):
        assert float((codebook[:3] - before).norm()) < 0.2 * float(before.norm())
    used = [len(fitting._coded().codes[:, level].unique()) for level in range(3)]
    assert min(used) >= 7


def test_a_fit_with_running_means_trains_the_networks_and_moves_the_codebooks(clustered):
    # given
    started = fit(clustered, replace(SMALL, epochs=0))
    # when
    fitted = fit(clustered, replace(SMALL, epochs=15, learning_rate=3e-3))
    # then
    assert fitted.best.epoch > 0
    assert fitted.best.value < started.best.value
    for before, after in zip(started.model.quantizer.codebooks, fitted.model.quantizer.codebooks, strict=True):
        assert not torch.equal(before, after)
        assert not after.requires_grad


def test_the_running_means_are_part_of_a_model_s_state(clustered):
    state = _Fitting(clustered, SMALL, None).model.state_dict()
    assert {f"running.{kind}_{level}" for kind in ("counts", "sums") for level in range(3)} <= set(state)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (replace(SMALL, ema=EMAConfig(decay=1.0)), r"ema\.decay"),
        (replace(SMALL, ema=EMAConfig(smoothing=0.0)), r"ema\.smoothing"),
        (replace(SMALL, loss=LossConfig(diversity=1e-4)), r"loss\.diversity"),
        (replace(SMALL, codebooks="frozen"), "codebooks is one of gradient, ema"),
        (replace(SMALL, start="middle"), "start is one of"),
        (replace(SMALL, networks="none"), "networks is one of"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(config, message, clustered):
    with pytest.raises(ValueError, match=message):
        fit(clustered, config)

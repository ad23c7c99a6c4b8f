from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from models import read_manifest
from models.evaluation.measures import usage
from models.training.cluster import FITTERS, ClusterConfig, fit_clusters
from models.training.fit import fit
from models.training.fit_config import FitConfig
from models.training.history import HISTORY, INITIALISED, REFITTED, TRAINING, WARM_UP, read_history
from models.training.train import TrainConfig, train_checkpoint

SMALL = FitConfig(
    codebook_sizes=(8, 8),
    latent=4,
    hidden=(16,),
    start="random",
    warm_up_epochs=2,
    epochs=4,
    batch_rows=128,
    learning_rate=3e-3,
)


def test_every_epoch_has_its_losses_and_measures(clustered):
    # when
    fitted = fit(clustered, SMALL)
    # then
    stages = [(record.stage, record.epoch) for record in fitted.records]
    expected = [(WARM_UP, 1), (WARM_UP, 2), (INITIALISED, 0), *((TRAINING, epoch) for epoch in range(1, 5))]
    assert stages == [*expected, (REFITTED, fitted.best.epoch)]
    for record in fitted.records:
        assert record.seconds > 0
        assert bool(record.losses) == (record.stage in {WARM_UP, TRAINING}) == (record.learning_rate is not None)
        assert (record.held_out is None) == (record.stage == WARM_UP) == (not record.levels)
    trained = fitted.records[3]
    terms = {"reconstruction", "codebook", "codebook 1", "codebook 2", "commitment", "repulsion", "total"}
    assert terms < set(trained.losses)
    assert trained.losses["codebook"] == pytest.approx(trained.losses["codebook 1"] + trained.losses["codebook 2"])
    assert trained.gradient_norm > 0
    assert fitted.records[-2].learning_rate == pytest.approx(0, abs=1e-9)
    assert fitted.records[fitted.kept].held_out == fitted.best


def test_the_mean_of_a_loss_counts_each_row_once(clustered):
    # given a learning rate that moves nothing, and a last batch that is smaller than the others
    whole = fit(clustered, SMALL.__class__(codebook_sizes=(8, 8), latent=4, epochs=1, batch_rows=600, learning_rate=0))
    parts = fit(clustered, SMALL.__class__(codebook_sizes=(8, 8), latent=4, epochs=1, batch_rows=128, learning_rate=0))
    # then
    for name in ("reconstruction", "codebook", "commitment"):
        assert parts.records[1].losses[name] == pytest.approx(whole.records[1].losses[name], rel=1e-4)


def test_levels_say_how_the_training_rows_use_them_and_what_they_leave_over(clustered):
    # given
    fitted = fit(clustered, FitConfig(codebook_sizes=(8, 8), latent=4, epochs=0))
    rows = torch.ones(600, dtype=torch.bool).index_fill(0, fitted.held_out, value=False)
    with torch.no_grad():
        latents = fitted.model.network(clustered[rows])
        quantization = fitted.model.quantizer.quantize(latents)
    variance = float(latents.var(dim=0, correction=0).sum())
    # then
    levels = fitted.records[0].levels
    for level, used in enumerate(usage(quantization.codes, (8, 8))):
        assert (levels[level].used, levels[level].perplexity) == (used.used, pytest.approx(used.perplexity))
        left = float(quantization.residuals[:, level + 1].square().sum(dim=1).mean())
        assert levels[level].left_over == pytest.approx(left / variance, rel=1e-4)
    assert 1 > levels[0].left_over > levels[1].left_over


def test_dead_codewords_that_were_moved_are_counted(clustered):
    # given more codewords than 30 rows can use
    config = FitConfig(codebook_sizes=(8, 64), latent=4, epochs=1)
    fitted = fit(clustered[:30], config)
    assert [level.restarted > 0 for level in fitted.records[1].levels] == [False, True]


@pytest.mark.parametrize("family", FITTERS)
def test_families_without_epochs_tell_what_each_level_leaves_over(family, clustered):
    fitted = fit_clusters(family, clustered, ClusterConfig(codebook_sizes=(8, 8, 8), latent=6))
    (record,) = fitted.records
    assert (record.stage, record.losses, record.held_out) == (INITIALISED, {}, fitted.best)
    left = [level.left_over for level in record.levels]
    assert 1 > left[0] > left[1] > left[2] >= 0


def test_the_history_is_kept_beside_the_manifest(tmp_path, clustered):
    # given
    np.save(tmp_path / "e.npy", clustered.numpy())
    # when
    train_checkpoint([tmp_path / "e.npy"], tmp_path / "out", TrainConfig(fit=SMALL), say=lambda _: None)
    # then
    history = read_history(tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    assert history.family == "rqvae"
    assert history.codebook_sizes == (8, 8)
    assert len(history.records) == 8
    assert history.records[history.kept].held_out._asdict() == manifest.report["held_out"]
    assert history.stopped_on == manifest.training["stopped_on"]
    assert history.stopped_on in " ".join((tmp_path / "out" / "README.md").read_text().split())
    assert json.loads((tmp_path / "out" / HISTORY).read_text()) == json.loads(history.as_json())


def test_a_history_that_cannot_be_read_says_so(tmp_path):
    assert read_history(tmp_path) is None
    for text in ("{", '{"format": 2}', '{"format": 1}'):
        (tmp_path / HISTORY).write_text(text)
        with pytest.raises(ValueError, match=r"training\.json cannot be read"):
            read_history(tmp_path)

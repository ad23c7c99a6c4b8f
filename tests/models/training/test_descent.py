from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from models.training.descent import Batch, Descent, DivergedError, reason
from models.training.fit import fit
from models.training.fit_config import FitConfig
from models.training.history import TRAINING
from models.training.resume import StateDirectory
from models.training.run import Run
from models.training.watch import LossMeans

SMALL = FitConfig(codebook_sizes=(8, 8), latent=4, hidden=(16,), epochs=3, batch_rows=128)


def squares(model, rows):
    def losses():
        loss = model(rows).square().mean()
        return {"reconstruction": loss, "codebook": torch.stack([loss * 0, loss]), "total": 2 * loss}

    return losses


def failure(model, rows, numbers):
    """The words of the first step that cannot be taken, of 30."""
    good = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    descent, means = Descent(model, 1e30, 1000), LossMeans()
    try:
        for _ in range(30):
            descent.step(Batch(numbers, rows, squares(model, rows)), means)
    except DivergedError as error:
        return reason("epoch 3", error.step, model, good)
    return ""


def test_a_learning_rate_that_spoils_the_weights_is_named(generator):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    words = failure(model, torch.randn(8, 4, generator=generator), torch.arange(8))
    assert words.startswith("training stopped in epoch 3, batch 2: the loss is ")
    assert "in the step before it was " in words
    assert "The learning rate (1e+30) is the likely cause; lower it" in words
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


def test_data_that_spoils_the_loss_is_named_by_its_row(generator):
    rows = torch.randn(8, 4, generator=generator)
    rows[5, 2] = torch.nan
    model = nn.Linear(4, 4)
    words = failure(model, rows, torch.arange(8) + 100)
    assert words.startswith(
        "training stopped in epoch 3, batch 1: the loss is nan, not finite: reconstruction, codebook 1"
    )
    assert "the data is the likely cause" in words
    assert "row 105 (from 0)" in words


def test_a_step_that_cannot_be_taken_moves_no_weight(generator):
    model = nn.Linear(4, 4)
    before = model.weight.detach().clone()
    rows = torch.full((2, 4), torch.inf)
    with pytest.raises(DivergedError):
        Descent(model, 1e-3, 10).step(Batch(torch.arange(2), rows, squares(model, rows)), LossMeans())
    assert torch.equal(model.weight, before)


def test_a_fit_that_diverges_keeps_the_weights_of_the_last_good_epoch(clustered, tmp_path):
    # given a learning rate that moves the weights to the end of float32 in one epoch, or later
    with StateDirectory(tmp_path / "state", 3600.0) as state:
        # when
        with pytest.raises(ValueError, match=r"training stopped in epoch 1, batch 2: .*learning rate") as error:
            fit(clustered, replace(SMALL, learning_rate=1e30), run=Run(state=state))
        # then
        assert str(error.value).endswith(f"The weights after epoch 0 are kept in {tmp_path / 'state'}")
        kept = state.read()
    assert (kept.stage, kept.epoch) == (TRAINING, 0)
    initialised = fit(clustered, replace(SMALL, epochs=0)).model.state_dict()
    assert all(torch.equal(kept.model[name], tensor) for name, tensor in initialised.items())


def test_a_learning_rate_that_spoilt_an_epoch_of_a_single_step_is_not_laid_to_the_data(clustered):
    # given: the first epoch ends with weights that are useless
    with pytest.raises(
        ValueError, match=r"stopped after epoch 1: its held-out measure is (nan|inf)\. Lower the learning rate"
    ):
        fit(clustered, replace(SMALL, batch_rows=10_000, learning_rate=1e30))


def test_a_row_of_which_only_the_gradient_overflows_is_named(clustered):
    rows = clustered.clone()
    rows[3] *= 1e18
    with pytest.raises(ValueError, match=r"epoch 1, batch \d: .*the data is the likely cause. .* row 3 \(from 0\)"):
        fit(rows, replace(SMALL, held_out=0.0, batch_rows=10_000))


@pytest.mark.parametrize("number", [float("nan"), 1e25])
def test_embeddings_without_a_finite_variance_are_refused(number, clustered):
    rows = clustered.clone()
    rows[7, 0] = number
    with pytest.raises(ValueError, match=r"the variance of the embeddings is (nan|inf)"):
        fit(rows, SMALL)

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from models.training.descent import Descent
from models.training.fit import _Fitting, colliding_pairs, fit
from models.training.fit_config import FitConfig
from models.training.projection import Centred, ProjectionConfig, draw_rows, projection
from models.training.rqvae import LossConfig

SMALL = FitConfig(codebook_sizes=(8, 8, 8), latent=4, hidden=(), epochs=3, batch_rows=128, held_out=0.1)


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        replace(SMALL, hidden=(16,)),
        replace(SMALL, hidden=(32, 16), start="random", warm_up_epochs=3),
        replace(SMALL, loss=LossConfig(repulsion=0.3)),
    ],
)
def test_the_same_seed_gives_the_same_model(config, clustered):
    # given other draws in between
    first = fit(clustered, config)
    torch.rand(3)
    # when
    second = fit(clustered, config)
    # then
    for one, other in zip(first.model.state_dict().values(), second.model.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    assert first.history == second.history


def test_training_leaves_the_caller_s_random_state_alone(clustered):
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    fit(clustered, SMALL)
    assert torch.equal(torch.rand(1), expected)


def test_every_codeword_is_used_after_initialisation(clustered):
    fitted = fit(clustered, replace(SMALL, epochs=0))
    codes = fitted.model.quantizer.quantize(fitted.model.network(clustered)).codes
    assert [len(codes[:, level].unique()) for level in range(3)] == [8, 8, 8]
    assert bool(fitted.model.quantizer.initialised)


def test_dead_codewords_restart_where_there_is_data(clustered):
    # given codewords that nothing is near to
    fitting = _Fitting(clustered, SMALL, None)
    fitting._project()
    fitting.codebooks.cluster()
    for codebook in fitting.model.quantizer.codebooks:
        codebook.data[:3] = 1e3
    # when
    reset = sum(fitting.codebooks.restart_dead(fitting._coded().codes))
    # then
    assert reset == 9
    assert sum(fitting.codebooks.restart_dead(fitting._coded().codes)) < reset
    assert all(float(codebook.detach().abs().max()) < 1e2 for codebook in fitting.model.quantizer.codebooks)


def test_training_improves_the_measure_it_is_stopped_on(clustered):
    fitted = fit(clustered, replace(SMALL, epochs=15, learning_rate=3e-3))
    assert fitted.best.value == min(measure.value for measure in fitted.history)
    assert fitted.best.value < fitted.history[0].value
    assert fitted.best.epoch > 0


def test_training_stops_after_the_patience_and_returns_the_best_epoch(clustered):
    # given a learning rate that only harms
    config = replace(SMALL, epochs=30, learning_rate=3.0, patience=4)
    # when
    fitted = fit(clustered, config)
    # then
    assert fitted.history[-1].epoch == fitted.best.epoch + 4
    again = fit(clustered, replace(config, epochs=0))
    if fitted.best.epoch == 0:
        assert torch.equal(fitted.model.quantizer.codebooks[0], again.model.quantizer.codebooks[0])


def test_a_last_batch_of_one_row_does_not_outweigh_the_others(clustered, monkeypatch):
    # given 513 training rows in batches of 128
    fitting = _Fitting(clustered[:570], replace(SMALL, held_out=0.1), None)
    assert len(fitting.training) % 128 == 1
    seen = []
    step = Descent.step

    def watched(self, batch, means):
        step(self, batch, means)
        seen.append(float(batch.losses()["total"].detach()))

    monkeypatch.setattr(Descent, "step", watched)
    # when
    fitting.run()
    # then
    assert len(seen) == 3 * 5
    assert max(seen) < 10


def test_a_loss_that_is_not_finite_stops_with_the_place(clustered):
    with pytest.raises(ValueError, match=r"training stopped in epoch \d+, batch \d+: the loss is (nan|inf)"):
        fit(clustered * 1e18, replace(SMALL, epochs=3, learning_rate=1e30))


def test_held_out_rows_move_neither_the_centre_nor_the_variance(clustered):
    fitting = _Fitting(clustered, replace(SMALL, held_out=0.1), None)
    other = clustered.clone()
    other[fitting.rows.held_out] += 100

    moved = _Fitting(other, replace(SMALL, held_out=0.1), None)

    assert torch.equal(moved.rows.held_out, fitting.rows.held_out)
    assert torch.equal(moved.rows.centre, fitting.rows.centre)
    assert moved.rows.variance == fitting.rows.variance


def test_held_out_rows_are_not_trained_on(clustered):
    # given
    fitted = fit(clustered, replace(SMALL, epochs=1))
    moved = clustered.clone()
    # when the held-out rows change but for their mean
    moved[fitted.held_out] = moved[fitted.held_out].roll(1, dims=0)
    # then the model does not
    again = fit(moved, replace(SMALL, epochs=1))
    for one, other in zip(fitted.model.quantizer.codebooks, again.model.quantizer.codebooks, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_the_measure_counts_held_out_items_that_share_all_codes(clustered):
    fitting = _Fitting(clustered, replace(SMALL, held_out=0.01), None)
    codes = torch.arange(600)[:, None].repeat(1, 3) % 8
    codes = torch.stack([codes[:, 0], torch.arange(600) // 8 % 8, torch.arange(600) // 64 % 8], dim=1)
    unique = codes.unique(dim=0, return_counts=True)[1]
    expected = sum(int((codes == codes[row]).all(dim=1).sum()) > 1 for row in fitting.rows.held_out.tolist()) / len(
        fitting.rows.held_out
    )
    assert fitting._measure(1, codes).colliding == pytest.approx(expected)
    assert int(unique.max()) == 2


def test_heavier_rows_are_drawn_more_often(generator):
    rows = draw_rows(torch.tensor([1.0, 0.0, 3.0]), 4000, generator)
    counts = torch.bincount(rows, minlength=3)
    assert counts[1] == 0
    assert counts[2] / counts[0] == pytest.approx(3, rel=0.2)


def test_pairs_are_items_that_share_all_their_codes():
    codes = torch.tensor([[1, 2], [1, 3], [1, 2], [0, 0], [1, 2], [0, 0]])
    pairs = colliding_pairs(codes, torch.tensor([10, 11, 12, 13, 14, 15]))
    assert sorted(tuple(sorted(pair)) for pair in pairs.tolist()) == [(10, 12), (12, 14), (13, 15)]


def test_one_item_is_too_few():
    with pytest.raises(ValueError, match="at least 2 items"):
        fit(torch.zeros(1, 4), SMALL)


def whole(rows):
    return Centred(rows, torch.arange(len(rows)), torch.zeros(rows.shape[1]))


def test_a_projection_without_locality_is_the_principal_components(clustered, generator):
    # given
    centred = clustered - clustered.mean(dim=0)
    config = ProjectionConfig(local=0.0, whitening=0.0)
    # when
    down, up = projection(whole(centred), torch.ones(600), 4, config, generator)
    # then the rebuilt rows are those of the singular value decomposition
    left, values, right = torch.linalg.svd(centred, full_matrices=False)
    best = left[:, :4] * values[:4] @ right[:4]
    assert torch.allclose(centred @ down.T @ up.T, best, atol=1e-3)


def test_a_local_projection_keeps_the_direction_along_which_neighbours_differ(generator):
    # given clusters far apart along the first axis, whose members differ along the second
    rows = torch.zeros(200, 3)
    rows[:, 0] = torch.arange(200) % 4 * 10.0
    rows[:, 1] = torch.randn(200, generator=generator)
    rows[:, 2] = torch.randn(200, generator=generator) * 0.1
    rows -= rows.mean(dim=0)
    # when
    local, _ = projection(whole(rows), torch.ones(200), 1, ProjectionConfig(local=1.0), generator)
    plain, _ = projection(whole(rows), torch.ones(200), 1, ProjectionConfig(local=0.0), generator)
    # then
    assert int(local.abs().argmax()) == 1
    assert int(plain.abs().argmax()) == 0


def test_a_projection_to_more_numbers_than_there_are_is_refused(generator):
    with pytest.raises(ValueError, match="cannot have 5"):
        projection(whole(torch.zeros(10, 4)), torch.ones(10), 5, ProjectionConfig(), generator)


def test_items_that_are_all_equal_are_refused():
    with pytest.raises(ValueError, match="all 40 have the same embedding"):
        fit(torch.ones(40, 12), SMALL)


@pytest.mark.parametrize("distinct", [2, 5])
def test_fewer_different_items_than_codewords_can_be_fitted(distinct, clustered):
    fitted = fit(clustered[:distinct].repeat(20, 1), replace(SMALL, hidden=(16,)))
    assert all(codebook.isfinite().all() for codebook in fitted.model.quantizer.codebooks)


def test_a_small_catalogue_is_not_near_a_tie_everywhere(clustered):
    # given fewer items than codewords, so that many codewords are equal
    fitted = fit(clustered[:120], replace(SMALL, codebook_sizes=(256, 256, 256), epochs=0))
    # when
    model = fitted.model.double()
    with torch.no_grad():
        margins = model.quantizer.quantize(model.network(clustered[:120].double())).margins
    # then
    assert (margins.amin(dim=1) < 1e-4).double().mean() < 0.1


def test_codebooks_that_were_initialised_are_not_clustered_again(clustered):
    # given
    fitting = _Fitting(clustered, replace(SMALL, epochs=0), None)
    trained = fit(clustered, SMALL).model.quantizer
    fitting.model.quantizer.load_state_dict(trained.state_dict())
    # when
    fitted = fitting.run()
    # then
    for one, other in zip(fitted.model.quantizer.codebooks, trained.codebooks, strict=True):
        assert torch.equal(one, other)

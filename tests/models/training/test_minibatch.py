"""Mini-batch k-means: near what others find, the same for the same seed, weights counted, nothing left dead."""

from __future__ import annotations

import pytest
import torch
from sklearn.cluster import MiniBatchKMeans

from models.residual import ResidualQuantizer
from models.training.cluster import ClusterConfig, fit_clusters
from models.training.kmeans import assign
from models.training.minibatch import MiniBatchConfig, _batches, minibatch_kmeans, minibatch_residuals

SCULLEY = MiniBatchConfig(batch_rows=512, memory=1.0, restart=0.01)


@pytest.fixture(scope="module")
def points():
    """6,000 rows around 40 places, of unequal sizes."""
    source = torch.Generator().manual_seed(1)
    places = torch.randn(40, 12, generator=source)
    which = (40 * torch.rand(6000, generator=source) ** 2).long()
    return places[which] + 0.5 * torch.randn(6000, 12, generator=source)


def fitted(points, size, config, weights=None, seed=0, **options):
    weights = torch.ones(len(points)) if weights is None else weights
    source = torch.Generator().manual_seed(seed)
    return minibatch_kmeans(lambda rows: points[rows], size, weights, config, source, **options)


def inertia(points, codebook):
    return float(assign(points, codebook)[1].mean())


@pytest.mark.parametrize("config", [SCULLEY, MiniBatchConfig(batch_rows=512)], ids=["Sculley's rule", "the default"])
def test_the_inertia_is_near_that_of_scikit_learn_with_the_same_batches(config, points):
    # given the mean of some starts: one alone may be lucky
    oracles = [
        MiniBatchKMeans(40, batch_size=512, n_init=1, max_iter=20, random_state=seed).fit(points.numpy())
        for seed in range(3)
    ]
    # when
    codebooks = [fitted(points, 40, config, seed=seed) for seed in range(3)]
    # then
    theirs = sum(oracle.inertia_ for oracle in oracles) / 3 / len(points)
    assert sum(inertia(points, codebook) for codebook in codebooks) / 3 == pytest.approx(theirs, rel=0.05)


def test_of_several_starts_the_best_goes_on(points):
    starts = [inertia(points, fitted(points, 40, MiniBatchConfig(starts=count, passes=0))) for count in (1, 2, 20)]

    assert starts[2] < starts[0]
    assert starts[2] <= starts[1] <= starts[0]


def test_one_pass_of_one_batch_moves_each_codeword_to_the_mean_of_its_rows(points):
    # given rows that all start as codewords' own, and a batch of all rows
    config = MiniBatchConfig(batch_rows=6000, passes=1)
    start = fitted(points, 40, MiniBatchConfig(batch_rows=6000, passes=0))
    # when
    codebook = fitted(points, 40, config)
    # then
    codes, _ = assign(points, start)
    means = torch.stack([points[codes == code].mean(dim=0) for code in range(40)])
    assert torch.allclose(codebook, means, atol=1e-4)


def test_a_row_that_weighs_three_counts_as_three_rows(points):
    # given
    few, weights = points[:50], torch.ones(50)
    weights[:10] = 3
    config = MiniBatchConfig(batch_rows=1000, passes=1)
    # when
    weighted = fitted(few, 1, config, weights)
    # then
    assert torch.allclose(weighted[0], torch.cat([few, few[:10], few[:10]]).mean(dim=0), atol=1e-5)


def test_rows_that_weigh_nothing_move_no_codeword(points):
    # given
    weights = torch.ones(6000)
    weights[3000:] = 0
    moved = torch.cat([points[:3000], points[3000:] + 100])
    # when
    codebook = fitted(moved, 20, MiniBatchConfig(batch_rows=512), weights)
    # then
    assert float(codebook.abs().max()) < 20


def test_the_same_seed_gives_the_same_codebook_and_another_seed_another(points):
    first, again, other = (fitted(points, 20, MiniBatchConfig(batch_rows=512), seed=seed) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_dead_codewords_restart_where_rows_are_served_badly(points):
    # given a start that sees one place alone: the rows to start from are all equal
    rows = torch.cat([torch.zeros(3000, 12), points[:3000]])
    config = MiniBatchConfig(batch_rows=256, passes=20)
    # when
    restarted = fitted(rows, 30, config)
    left = fitted(rows, 30, MiniBatchConfig(batch_rows=256, passes=20, restart=0.0))
    # then
    used = assign(rows, restarted)[0].unique().numel()
    assert used == 30
    assert inertia(rows, restarted) <= 1.05 * inertia(rows, left)


def test_more_codewords_than_different_rows_leave_no_row_badly_served():
    rows = torch.eye(5).repeat(20, 1)
    codebook = fitted(rows, 8, MiniBatchConfig(batch_rows=16))
    assert inertia(rows, codebook) < 1e-9
    assert bool(codebook.isfinite().all())


@pytest.mark.parametrize(
    ("rows", "batch_rows", "block_rows"), [(1000, 128, 1), (1003, 128, 16), (7, 100, 1), (5, 2, 4)]
)
def test_an_epoch_s_batches_have_every_row_once_in_blocks(rows, batch_rows, block_rows, generator):
    batches = list(_batches(rows, batch_rows, block_rows, generator))
    assert torch.cat(batches).sort().values.tolist() == list(range(rows))
    if rows == 1003:
        firsts = torch.cat(batches)[::block_rows]
        assert torch.equal(batches[0][:16] - batches[0][0], torch.arange(16))
        assert firsts.tolist() != sorted(firsts.tolist())


def test_each_level_is_fitted_to_what_the_levels_before_leave_over(points):
    # given
    quantizer = ResidualQuantizer((16, 16, 16), 12)
    config, source = MiniBatchConfig(batch_rows=512), torch.Generator().manual_seed(0)
    # when
    minibatch_residuals(quantizer, lambda rows: points[rows], torch.ones(6000), config, source)
    # then
    left = quantizer.quantize(points).residuals.square().sum(dim=2).mean(dim=0)
    for level, codebook in enumerate(quantizer.codebooks):
        residuals = quantizer.quantize(points).residuals[:, level]
        assert float(left[level + 1]) == pytest.approx(inertia(residuals, codebook.detach()), rel=1e-3)
        assert inertia(residuals, fitted(residuals, 16, config)) == pytest.approx(float(left[level + 1]), rel=0.1)
    assert bool(quantizer.initialised)


def test_rk_means_rebuilds_about_as_well_as_residual_k_means_on_all_rows_at_once(points):
    config = ClusterConfig(codebook_sizes=(16, 16, 16), minibatch=MiniBatchConfig(batch_rows=512))
    errors = [fit_clusters(family, points, config).best.reconstruction for family in ("rk-means", "rq-kmeans")]
    assert errors[0] == pytest.approx(errors[1], rel=0.1)


def test_points_that_are_not_finite_are_refused(points):
    broken = points.clone()
    broken[:] = torch.nan
    with pytest.raises(ValueError, match="finite"):
        fitted(broken, 4, MiniBatchConfig())

"""Families fitted by k-means: errors beside those of faiss, balance, and what cannot be clustered."""

from __future__ import annotations

import faiss
import numpy as np
import pytest
import torch

from models.training.cluster import FITTERS, ClusterConfig, fit_clusters
from models.training.fit_config import FitConfig
from models.training.kmeans import KMeansConfig, assign_balanced, kmeans
from models.training.rvq import RVQConfig
from models.training.train import TrainConfig, config_of, train_checkpoint

SMALL = ClusterConfig(codebook_sizes=(8, 8, 8), seed=3)


@pytest.fixture(scope="module")
def rows():
    """3,000 embeddings (3000, 24) of uneven spread around 100 centres, off the origin."""
    source = torch.Generator().manual_seed(2)
    centres = torch.randn(100, 24, generator=source) * torch.linspace(2, 0.2, 24)
    return 5 + centres[torch.randint(100, (3_000,), generator=source)] + 0.3 * torch.randn(3_000, 24, generator=source)


def error(rows, rebuilt):
    return float((rows - rebuilt).square().sum(dim=1).mean())


def rebuilt(model, rows):
    with torch.no_grad():
        return model.decoder(model.quantizer.decode(model.quantizer.quantize(model.network(rows)).codes))


def test_residual_k_means_errs_as_little_as_that_of_faiss(rows):
    # given
    config = ClusterConfig(codebook_sizes=(16, 16, 16), held_out=0.0)
    oracle = faiss.ResidualQuantizer(24, 3, 4)
    oracle.max_beam_size = 1
    oracle.train_type = faiss.ResidualQuantizer.Train_default
    oracle.train(rows.numpy())
    theirs = torch.from_numpy(oracle.decode(oracle.compute_codes(rows.numpy())))
    # when
    fitted = fit_clusters("rq-kmeans", rows, config)
    # then
    assert error(rows, rebuilt(fitted.model, rows)) == pytest.approx(error(rows, theirs), rel=0.05)
    assert fitted.best.reconstruction == pytest.approx(
        error(rows, rebuilt(fitted.model, rows)) / error(rows, rows.mean(dim=0)), rel=0.02
    )


def test_principal_components_keep_what_a_projection_to_them_can_keep(rows):
    # given as many codewords as rows: the quantizer loses nothing
    few = rows[:60]
    model = fit_clusters("rq-kmeans", few, ClusterConfig(codebook_sizes=(60,), latent=5, held_out=0.0)).model
    # then what is lost is the variance of the other components
    values = torch.linalg.svdvals((few - few.mean(dim=0)).double())
    assert error(few, rebuilt(model, few)) == pytest.approx(float(values[5:].square().sum()) / 60, rel=1e-3)


def test_balanced_assignment_fills_no_codeword_beyond_its_share_and_is_stable(generator):
    # given
    points = torch.randn(203, 4, generator=generator)
    codebook = torch.randn(10, 4, generator=generator) + 1
    # when
    codes, distances = assign_balanced(points, codebook)
    # then
    sizes = codes.bincount(minlength=10)
    assert int(sizes.max()) == 21
    every = torch.cdist(points.double(), codebook.double()).square()
    chosen = every.gather(1, codes[:, None])[:, 0]
    assert torch.allclose(distances.double(), chosen, atol=1e-5)
    for code in range(10):  # nobody prefers a codeword that has room, or that holds someone farther away
        prefers = chosen > every[:, code] + 1e-5
        worst = chosen[codes == code].max() if sizes[code] == 21 else torch.inf
        assert not bool((prefers & (every[:, code] < worst - 1e-5)).any())


def test_balanced_k_means_uses_codewords_more_evenly(generator):
    # given many rows in one place and few far away
    points = torch.cat([0.1 * torch.randn(900, 6, generator=generator), 8 * torch.randn(100, 6, generator=generator)])

    def entropy(config):
        codes = kmeans(points, 20, torch.Generator().manual_seed(0), config=config).codes
        shares = codes.bincount(minlength=20).double() / len(points)
        return float(-(shares[shares > 0] * shares[shares > 0].log()).sum())

    assert entropy(KMeansConfig(balanced=True)) > entropy(KMeansConfig()) + 0.5


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("rqvae", ClusterConfig()),
        ("rq-kmeans", FitConfig()),
        ("r-vq", FitConfig()),
        ("rqvae", RVQConfig()),
        ("no-such", ClusterConfig()),
    ],
)
def test_a_family_with_another_s_settings_or_none_at_all_is_refused(family, config, rows, tmp_path):
    np.save(tmp_path / "rows.npy", rows.numpy())
    with pytest.raises(ValueError, match=family):
        train_checkpoint([tmp_path / "rows.npy"], tmp_path / "out", TrainConfig(family=family, fit=config))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("equal", [True, False])
def test_rows_that_cannot_be_clustered_are_refused(equal):
    rows = torch.ones(5, 4) if equal else torch.randn(1, 4)
    with pytest.raises(ValueError, match="items that differ"):
        fit_clusters("rq-kmeans", rows, SMALL)


def test_the_settings_of_a_family_are_its_own():
    assert isinstance(config_of("rqvae"), FitConfig)
    assert isinstance(config_of("r-vq"), RVQConfig)
    assert all(isinstance(config_of(family), ClusterConfig) for family in FITTERS)

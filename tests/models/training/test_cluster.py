"""Families fitted by k-means: against faiss, frozen and served like any other."""

from __future__ import annotations

import shutil
from dataclasses import replace

import faiss
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from models import CheckpointError, load, read_manifest
from models.quantizer import Quantizer
from models.training.cluster import FITTERS, ClusterConfig, fit_clusters
from models.training.fit_config import FitConfig
from models.training.kmeans import KMeansConfig, assign_balanced, kmeans
from models.training.rvq import RVQConfig
from models.training.train import TrainConfig, config_of, train_checkpoint

FAMILIES = [*sorted(FITTERS), "r-vq"]
SMALL = ClusterConfig(codebook_sizes=(8, 8, 8), seed=3)


@pytest.fixture(scope="module")
def rows():
    """3,000 embeddings (3000, 24) of uneven spread around 100 centres, off the origin."""
    source = torch.Generator().manual_seed(2)
    centres = torch.randn(100, 24, generator=source) * torch.linspace(2, 0.2, 24)
    return 5 + centres[torch.randint(100, (3_000,), generator=source)] + 0.3 * torch.randn(3_000, 24, generator=source)


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request, rows, tmp_path_factory):
    """A frozen checkpoint of each family."""
    directory = tmp_path_factory.mktemp(request.param)
    np.save(directory / "rows.npy", rows.numpy())
    config = TrainConfig(name="small", family=request.param, fit=small(request.param))
    train_checkpoint([directory / "rows.npy"], directory / "out", config, say=lambda _: None)
    return directory / "out"


def small(family, seed=3):
    """A family's default settings, but for three levels of eight codewords and few epochs."""
    config = replace(config_of(family), codebook_sizes=(8, 8, 8), seed=seed)
    return replace(config, epochs=3) if isinstance(config, RVQConfig) else config


def error(rows, rebuilt):
    return float((rows - rebuilt).square().sum(dim=1).mean())


def rebuilt(model, rows):
    with torch.no_grad():
        return model.decoder(model.quantizer.decode(model.quantizer.quantize(model.network(rows)).codes))


def test_every_family_of_k_means_keeps_the_quantizer_s_contract(trained, rows):
    tokenizer = load(trained)
    encoding = tokenizer.encode(rows)
    assert encoding.codes.shape == (3_000, 3)
    assert encoding.codes.dtype == torch.int64
    assert tokenizer.codebook_sizes == (8, 8, 8)
    assert bool((encoding.margin >= 0).all())
    decoded = tokenizer.decode(encoding.codes)
    assert decoded.shape == rows.shape
    # without an encoder that distorts, what no level took is what decoding misses
    assert torch.allclose((rows.double() - decoded).square().sum(dim=1), encoding.quantization_error, rtol=1e-5)
    assert error(rows, decoded) < 0.6 * error(rows, rows.mean(dim=0))


def test_codes_of_every_family_are_the_same_alone_in_any_batch_and_with_any_threads(trained, rows):
    # given
    tokenizer = load(trained)
    together = tokenizer.encode(rows[:300]).codes
    shuffled = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    # when
    alone = torch.cat([tokenizer.encode(row[None]).codes for row in rows[:300]])
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        in_another_order = tokenizer.encode(rows[:300][shuffled]).codes
    finally:
        torch.set_num_threads(threads)
    # then
    assert torch.equal(alone, together)
    assert torch.equal(in_another_order, together[shuffled])


def test_a_latent_moved_by_less_than_the_margin_keeps_its_codes_in_every_family(trained, rows):
    # given
    quantizer = load(trained)._exact_quantizer
    latents = load(trained)._exact_network(rows[:500].double())
    quantization = quantizer.quantize(latents)
    margin = quantization.margins.amin(dim=1, keepdim=True)
    source = torch.Generator().manual_seed(4)
    changed = 0
    for _ in range(30):
        push = torch.randn(latents.shape, generator=source, dtype=torch.float64)
        push /= push.norm(dim=1, keepdim=True)
        # then
        below = quantizer.quantize(latents + 0.999 * margin * push)
        assert torch.equal(below.codes, quantization.codes)
        changed += int((quantizer.quantize(latents + 30 * margin * push).codes != quantization.codes).sum())
    assert changed > 100


def test_the_fast_and_the_exact_form_of_every_family_agree(trained, rows):
    quantizer: Quantizer = load(trained)._exact_quantizer
    latents = load(trained)._exact_network(rows[:500].double())
    fast, exact = quantizer.quantize(latents), quantizer.quantize(latents, exact=True)
    assert torch.equal(fast.codes, exact.codes)
    assert torch.allclose(fast.margins, exact.margins, rtol=1e-6, atol=1e-9)
    assert torch.equal(fast.residuals[:, 0], latents)
    assert torch.allclose(fast.residuals[:, -1], latents - quantizer.decode(fast.codes))


def test_rows_near_a_tie_are_computed_again_in_every_family(trained, rows):
    # given a row midway between two of its first codewords' cells
    tokenizer = load(trained)
    codes = tokenizer.encode(rows).codes
    first = rows[codes[:, 0] != codes[0, 0]][0].double()
    low, high = rows[0].double(), first
    start = codes[0, 0]
    # when the plane between them is searched for
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if tokenizer.encode(middle[None]).codes[0, 0] == start else (low, middle)
    encoding = tokenizer.encode(torch.cat([middle[None], rows[:1].double()]))
    # then
    assert encoding.recomputed.tolist() == [True, False]
    assert torch.equal(encoding.codes[:1], tokenizer.encode(middle[None]).codes)


def test_the_fingerprint_covers_the_family_s_codebooks_and_the_same_seed_gives_it_again(trained, rows, tmp_path):
    manifest = read_manifest(trained)
    np.save(tmp_path / "rows.npy", rows.numpy())
    names = [
        train_checkpoint(
            [tmp_path / "rows.npy"],
            tmp_path / f"seed {seed}",
            TrainConfig(name="small", family=manifest.family, fit=small(manifest.family, seed)),
            say=lambda _: None,
        ).fingerprint
        for seed in (3, 4)
    ]
    assert names[0] == manifest.fingerprint != names[1]


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


def test_a_family_s_codebooks_that_were_changed_are_refused(trained, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "copy")
    state = load_file(copy / "model.safetensors")
    name = next(name for name, tensor in state.items() if name.startswith("quantizer.") and tensor.is_floating_point())
    state[name] = state[name] * 1.0001
    save_file(state, copy / "model.safetensors")
    with pytest.raises(CheckpointError, match="quantizer"):
        load(copy)


@pytest.mark.parametrize("equal", [True, False])
def test_rows_that_cannot_be_clustered_are_refused(equal):
    rows = torch.ones(5, 4) if equal else torch.randn(1, 4)
    with pytest.raises(ValueError, match="items that differ"):
        fit_clusters("rq-kmeans", rows, SMALL)


def test_the_settings_of_a_family_are_its_own():
    assert isinstance(config_of("rqvae"), FitConfig)
    assert isinstance(config_of("r-vq"), RVQConfig)
    assert all(isinstance(config_of(family), ClusterConfig) for family in FITTERS)

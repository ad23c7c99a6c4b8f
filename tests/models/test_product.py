"""Product quantization, plain and rotated: errors beside those of faiss, uneven parts, ranking."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import faiss
import pytest
import torch

from models.product import ProductQuantizer
from models.training.cluster import ClusterConfig, fit_clusters
from models.training.codebooks import learned_rotation

SIZES = (16, 16, 16)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def rows():
    """3,000 embeddings (3000, 12) whose numbers depend on each other across the parts."""
    source = torch.Generator().manual_seed(6)
    mix = torch.randn(12, 12, generator=source) * torch.logspace(0.5, -1.5, 12)[:, None]
    return torch.randn(3_000, 12, generator=source) @ mix + 2


def fitted(family, rows, **options):
    return fit_clusters(family, rows, ClusterConfig(codebook_sizes=SIZES, held_out=0.0, **options)).model


def error(model, rows):
    with torch.no_grad():
        rebuilt = model.decoder(model.quantizer.decode(model.quantizer.quantize(model.network(rows)).codes))
    return float((rows - rebuilt).square().sum(dim=1).mean())


def faiss_error(index, rows):
    return float((rows - torch.from_numpy(index(rows.numpy()))).square().sum(dim=1).mean())


def test_product_quantization_errs_as_little_as_that_of_faiss(rows):
    oracle = faiss.ProductQuantizer(12, 3, 4)
    oracle.train(rows.numpy())
    theirs = faiss_error(lambda x: oracle.decode(oracle.compute_codes(x)), rows)
    assert error(fitted("pq", rows), rows) == pytest.approx(theirs, rel=0.05)


def test_rotated_product_quantization_errs_as_little_as_that_of_faiss_and_less_than_the_plain_one(rows):
    # given
    centred = rows - rows.mean(dim=0)
    rotation, oracle = faiss.OPQMatrix(12, 3), faiss.ProductQuantizer(12, 3, 4)
    rotation.pq = faiss.ProductQuantizer(12, 3, 4)
    rotation.train(centred.numpy())
    oracle.train(rotation.apply(centred.numpy()))

    def rebuilt(x):
        return rotation.reverse_transform(oracle.decode(oracle.compute_codes(rotation.apply(x))))

    # when
    ours = error(fitted("opq", rows), rows)
    # then
    assert ours == pytest.approx(faiss_error(rebuilt, centred), rel=0.1)
    assert ours < 0.8 * error(fitted("pq", rows), rows)


@pytest.mark.parametrize("options", [{}, {"latent": 6}])
def test_the_rotation_is_orthogonal_and_the_decoder_turns_it_back(options, rows):
    plain, rotated = fitted("pq", rows, **options), fitted("opq", rows, **options)
    with torch.no_grad():
        before, after = plain.network(rows), rotated.network(rows)
        assert torch.allclose(before.norm(dim=1), after.norm(dim=1), rtol=1e-4)
        assert not torch.allclose(before, after, atol=0.1)
        assert torch.allclose(plain.decoder(before), rotated.decoder(after), atol=1e-3)


def test_the_rotation_is_the_same_with_any_number_of_threads(rows):
    threads = torch.get_num_threads()
    rotations = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            rotations.append(learned_rotation(rows[:500], SIZES))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*rotations)


def test_parts_are_as_equal_as_can_be_and_each_level_looks_at_its_own(generator):
    # given
    quantizer = ProductQuantizer((4, 4, 4), 10)
    for codebook in quantizer.codebooks:
        codebook.data.normal_(generator=generator)
    latents = torch.randn(200, 10, generator=generator)
    # when
    whole = quantizer.quantize(latents)
    moved = quantizer.quantize(torch.cat([latents[:, :7], latents[:, 7:] + 5], dim=1))
    # then
    assert quantizer.widths == (4, 3, 3)
    assert torch.equal(whole.codes[:, :2], moved.codes[:, :2])
    assert not torch.equal(whole.codes[:, 2], moved.codes[:, 2])
    assert torch.allclose(whole.residuals[:, -1], latents - quantizer.decode(whole.codes))
    assert torch.equal(whole.residuals[:, 1, 4:], latents[:, 4:])


def test_alternatives_of_the_last_code_are_ranked_by_its_own_part(rows):
    quantizer, latents = fitted("pq", rows).quantizer.double(), rows[:50].double()
    quantization = quantizer.quantize(latents)
    ranked = quantizer.rank(quantization, 16).codes
    distances = torch.cdist(latents[:, 8:], quantizer.codebooks[2].detach())
    assert torch.equal(ranked, distances.argsort(dim=1))
    assert torch.equal(ranked, quantizer.rank(quantization, 16, exact=True).codes)


def test_a_rotation_that_cannot_be_learned_is_refused_with_the_reason(rows, monkeypatch):
    with pytest.raises(ValueError, match="width, 12, has to be a multiple of the number of levels, 5"):
        learned_rotation(rows, (16,) * 5)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ValueError, match=r"semid\[train\]"):
        learned_rotation(rows, SIZES)


@pytest.mark.parametrize(("sizes", "dimension"), [((), 2), ((2, 0), 2), ((2, 2, 2), 2)])
def test_a_quantizer_without_levels_codewords_or_numbers_for_each_is_refused(sizes, dimension):
    with pytest.raises(ValueError, match="needs levels"):
        ProductQuantizer(sizes, dimension)


def test_a_rotation_is_learned_of_fewer_rows_than_they_have_numbers():
    # In a process of its own: faiss once wrote beyond its memory here, which ends a process.
    script = """
import torch
from models.training.codebooks import learned_rotation
rows = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
rotation = learned_rotation(rows - rows.mean(dim=0), (8, 8))
assert torch.allclose(rotation @ rotation.T, torch.eye(64), atol=1e-5)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

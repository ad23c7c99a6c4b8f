"""Settings under which a family cannot be fitted are refused in words; those that are merely small are fitted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models import load
from models.tokenizer import FAMILIES
from models.training.ema import EMAConfig
from models.training.kmeans import KMeansConfig
from models.training.minibatch import MiniBatchConfig
from models.training.projection import ProjectionConfig
from models.training.rqvae import LossConfig
from models.training.train import train_checkpoint
from tests.families import CODEBOOK_SIZES, rows_of_families, small_config

every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Arrays of the first 300, 10 and 1 of the rows."""
    directory = tmp_path_factory.mktemp("rows")
    for count in (300, 10, 1):
        np.save(directory / f"{count}.npy", rows_of_families()[:count].numpy())
    return directory


@every_family
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"codebook_sizes": ()}, r"codebook_sizes are \(\): at least one level"),
        ({"codebook_sizes": (8, 0)}, r"codebook_sizes are \(8, 0\): .* one codeword for each"),
        ({"codebook_sizes": (8, -2)}, r"codebook_sizes are \(8, -2\)"),
        (
            {"codebook_sizes": (8, 10**9)},
            r"codebook_sizes are \(8, 1000000000\): .* at most 25 levels of at most 65,536",
        ),
        ({"codebook_sizes": (2,) * 10**6}, r"codebook_sizes are \(2, 2, 2, \.\.\. 1,000,000\): .* at most 25 levels"),
        ({"latent": 10**9}, "latent is 1000000000; it is at least 0 and at most 65536"),
        ({"latent": -1}, "latent is -1; it is at least 0"),
        ({"held_out": 1.0}, "held_out is 1.0; .* below 1"),
        ({"held_out": -0.1}, "held_out is -0.1; .* at least 0"),
        ({"held_out": float("nan")}, "held_out is nan"),
    ],
)
def test_a_setting_without_sense_is_refused_by_its_name(family: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        small_config(family, **settings)


@pytest.mark.parametrize(
    ("family", "settings", "words"),
    [
        ("rqvae", {"epochs": -1}, "epochs is -1; it is at least 0"),
        ("rqvae", {"warm_up_epochs": -1}, "warm_up_epochs is -1"),
        ("rqvae", {"batch_rows": 0}, "batch_rows is 0; it is at least 1"),
        ("rqvae", {"learning_rate": 0.0}, "learning_rate is 0.0; it is above 0"),
        ("rqvae", {"learning_rate": float("nan")}, "learning_rate is nan"),
        ("hierarchical", {"rows_per_child": 0}, "rows_per_child is 0; it is at least 1"),
        ("rqvae", {"hidden": ("a",)}, r"hidden is \('a',\); expected whole numbers from 1"),
        ("rqvae", {"hidden": (10**9,)}, r"hidden is \(1000000000,\); expected whole numbers from 1 to 65,536"),
        ("rqvae", {"codebook_sizes": (8.5,)}, r"codebook_sizes are \(8.5,\)"),
        ("rqvae", {"loss": LossConfig(commitment=float("nan"))}, "loss.commitment is nan"),
        ("rqvae", {"loss": LossConfig(repulsion=-1.0)}, "loss.repulsion is -1.0; it is at least 0"),
        ("rqvae", {"loss": LossConfig(reconstruction=float("inf"))}, "loss.reconstruction is inf"),
        ("rqvae", {"loss": LossConfig(reconstruction=0.0)}, "nothing else trains a decoder"),
        ("rqvae", {"start": "bogus"}, "start is one of projection"),
        ("rqvae", {"pair_rows": -1}, "pair_rows is -1"),
        ("rqvae", {"seed": 2**64}, "seed is 18446744073709551616; expected 64 bits"),
        ("rqvae", {"projection": ProjectionConfig(local=2.0)}, "projection.local is 2.0; .* at most 1"),
        ("rqvae", {"projection": ProjectionConfig(pool_rows=0)}, "projection.pool_rows is 0; it is at least 2"),
        ("rq-kmeans", {"kmeans": KMeansConfig(iterations=-1)}, "kmeans.iterations is -1"),
        ("rq-kmeans", {"kmeans": KMeansConfig(starts=0)}, "kmeans.starts is 0; it is at least 1"),
        ("rk-means", {"minibatch": MiniBatchConfig(starts=0)}, "minibatch.starts is 0; it is at least 1"),
        ("rk-means", {"minibatch": MiniBatchConfig(batch_rows=0)}, "minibatch.batch_rows is 0; it is at least 1"),
        ("r-vq", {"codebooks": "bogus"}, "codebooks is one of gradient, ema"),
        ("r-vq", {"ema": EMAConfig(decay=1.0)}, "ema.decay must be from 0 to below 1"),
    ],
)
def test_a_family_s_own_setting_without_sense_is_refused_by_its_name(
    family: str, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        small_config(family, **settings)


@every_family
def test_a_latent_wider_than_the_embeddings_is_refused(family: str, sources: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a projection of 24 numbers cannot have 25"):
        train_checkpoint([sources / "300.npy"], tmp_path / "out", small_config(family, latent=25), say=lambda _: None)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("family", "settings", "words"),
    [
        ("opq", {"latent": 5}, "opq: the latent's width, 5, has to be a multiple of the number of levels, "),
        ("pq", {"latent": 1}, "pq: the latent's width, 1, is below the number of levels, "),
        ("rqvae", {"latent": 12, "hidden": (20,)}, r"hidden is \(20,\): widths of at least 24, twice the latent's"),
        ("rqvae", {"start": "identity", "latent": 12, "hidden": ()}, "needs a latent of 24 numbers, not 12"),
        ("rq-kmeans", {"latent": 25}, "latent is 25: a projection of 24 numbers cannot have 25"),
        ("r-vq", {"latent": 25}, "latent is 25: a projection of 24 numbers cannot have 25"),
    ],
)
def test_what_does_not_fit_the_embeddings_is_said_before_they_are_read(
    family: str, settings: dict[str, Any], words: str, sources: Path, tmp_path: Path
) -> None:
    # given a second file that reading would stumble upon
    (tmp_path / "broken.npy").write_bytes(b"no array")
    files = [sources / "300.npy", tmp_path / "broken.npy"]
    with pytest.raises(ValueError, match=words):
        train_checkpoint(files, tmp_path / "out", small_config(family, **settings), say=lambda _: None)


@every_family
def test_a_single_row_is_refused(family: str, sources: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"training needs at least 2 items.* got 1"):
        train_checkpoint([sources / "1.npy"], tmp_path / "out", small_config(family), say=lambda _: None)


def test_an_identity_to_another_width_is_refused(sources: Path, tmp_path: Path) -> None:
    config = small_config("rqvae", start="identity", latent=12)
    with pytest.raises(ValueError, match='start="identity" needs a latent of 24 numbers, not 12'):
        train_checkpoint([sources / "300.npy"], tmp_path / "out", config, say=lambda _: None)


@every_family
def test_something_is_trained_on_however_much_is_held_out(family: str, sources: Path, tmp_path: Path) -> None:
    config = small_config(family, held_out=0.99, latent=6)
    manifest = train_checkpoint([sources / "10.npy"], tmp_path / "out", config, say=lambda _: None)
    assert manifest.training["held_out_items"] == 8


@every_family
def test_two_rows_are_enough(family: str, sources: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "2.npy", rows_of_families()[:2].numpy())
    train_checkpoint([tmp_path / "2.npy"], tmp_path / "out", small_config(family, latent=6), say=lambda _: None)
    codes = load(tmp_path / "out").encode(rows_of_families()[:2]).codes
    assert not torch.equal(codes[0], codes[1])


@every_family
def test_embeddings_beyond_float32_s_squares_are_refused(family: str, tmp_path: Path) -> None:
    np.save(tmp_path / "huge.npy", (rows_of_families()[:300] * 1e30).numpy())
    with pytest.raises(ValueError, match="not finite, or too large for float32"):
        train_checkpoint([tmp_path / "huge.npy"], tmp_path / "out", small_config(family), say=lambda _: None)


@every_family
def test_levels_of_one_codeword_give_everyone_the_same_codes(family: str, sources: Path, tmp_path: Path) -> None:
    config = small_config(family, codebook_sizes=(1, 1))
    train_checkpoint([sources / "300.npy"], tmp_path / "out", config, say=lambda _: None)
    encoding = load(tmp_path / "out").encode(rows_of_families()[:50])
    assert torch.equal(encoding.codes, torch.zeros(50, 2, dtype=torch.int64))
    assert encoding.margin.isinf().all()


@every_family
def test_more_codewords_than_rows_are_warned_of_and_give_codes(family: str, sources: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    train_checkpoint([sources / "10.npy"], tmp_path / "out", small_config(family, latent=6), say=lines.append)
    codes = load(tmp_path / "out").encode(rows_of_families()[:10]).codes
    assert any("10 different embeddings for codebooks of up to 16" in line for line in lines)
    assert codes.shape == (10, len(CODEBOOK_SIZES))
    assert len(codes.unique(dim=0)) > 5

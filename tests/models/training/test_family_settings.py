"""Settings under which a family cannot be fitted are refused in words; those that are merely small are fitted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models import load
from models.tokenizer import FAMILIES
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


@every_family
def test_a_single_row_is_refused(family: str, sources: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"training needs at least 2 items.* got 1"):
        train_checkpoint([sources / "1.npy"], tmp_path / "out", small_config(family), say=lambda _: None)


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

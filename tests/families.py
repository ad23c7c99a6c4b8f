"""A small trained checkpoint of every family, for the tests that hold them all to one contract."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.tokenizer import FAMILIES
from models.training.train import TrainConfig, config_of, train_checkpoint

DIMENSION = 24
CODEBOOK_SIZES = (16, 16, 16)
MAX_SUFFIX = 3

# What keeps a training small, where a family's configuration knows of it.
SMALL = {"codebook_sizes": CODEBOOK_SIZES, "epochs": 2, "hidden": (32,), "latent": 12, "seed": 3}


def rows_of_families() -> Tensor:
    """3,000 embeddings (3000, 24) float32 of uneven spread around 100 centres, off the origin."""
    source = torch.Generator().manual_seed(2)
    centres = torch.randn(100, DIMENSION, generator=source) * torch.linspace(2, 0.2, DIMENSION)
    places = torch.randint(100, (3_000,), generator=source)
    return 5 + centres[places] + 0.3 * torch.randn(3_000, DIMENSION, generator=source)


def small_config(family: str, **settings: Any) -> TrainConfig:
    """A family's own configuration, made small, with these settings of its fit; what it does not know is left out."""
    fit = config_of(family)
    known = {field.name for field in fields(fit)}
    wanted = {name: value for name, value in (SMALL | settings).items() if name in known}
    return TrainConfig(name=family, family=family, max_suffix=MAX_SUFFIX, fit=replace(fit, **wanted))


def train_families(directory: Path) -> dict[str, Path]:
    """A checkpoint of each family of `FAMILIES`, by its name, trained on `rows_of_families` by one thread."""
    np.save(directory / "rows.npy", rows_of_families().numpy())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for family in FAMILIES:
            train_checkpoint([directory / "rows.npy"], directory / family, small_config(family), say=lambda _: None)
    finally:
        torch.set_num_threads(threads)
    return {family: directory / family for family in FAMILIES}

"""The quantization errors of a tokenizer's training items, as its manifest tells them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from models import Manifest

MEAN = "mean"
TAIL = "q95"
QUANTILES: Mapping[str, float] = {
    "q01": 0.01,
    "q05": 0.05,
    "q25": 0.25,
    "q50": 0.50,
    "q75": 0.75,
    TAIL: 0.95,
    "q99": 0.99,
}


class TrainingErrors(NamedTuple):
    """The distribution of |z - q|^2 over the training items.

    Attributes:
        mean: Of all items.
        quantiles: In the order of `QUANTILES`, none below the one before it.
    """

    mean: float
    quantiles: tuple[float, ...]

    @classmethod
    def of(cls, manifest: Manifest) -> TrainingErrors | None:
        """What the manifest tells; None where it does not tell all."""
        told: Any = manifest.report.get("quantization_error") if isinstance(manifest.report, Mapping) else None
        if not isinstance(told, Mapping):
            return None
        figures = [told.get(name) for name in (MEAN, *QUANTILES)]
        if not all(isinstance(figure, (int, float)) and math.isfinite(figure) and figure >= 0 for figure in figures):
            return None
        mean, *quantiles = map(float, figures)  # type: ignore[arg-type]
        return cls(mean, tuple(quantiles)) if quantiles == sorted(quantiles) else None

    def share_below(self, error: float) -> float:
        """The share of training items with a smaller error, between the quantiles told: from 0.01 to 0.99."""
        return float(np.interp(error, self.quantiles, list(QUANTILES.values())))

    def as_dict(self) -> dict[str, float]:
        """As the manifest tells it."""
        return {MEAN: self.mean, **dict(zip(QUANTILES, self.quantiles, strict=True))}


def expected_shares() -> tuple[float, ...]:
    """The shares of training items below the first quantile, between each two, and beyond the last."""
    edges = [0.0, *QUANTILES.values(), 1.0]
    return tuple(above - below for below, above in pairwise(edges))


def share_beyond_tail() -> float:
    """The share of training items beyond `TAIL`."""
    return 1 - QUANTILES[TAIL]

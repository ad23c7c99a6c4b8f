"""What is measured of a model while it is fitted: codes, each level's use, held-out measures, means of the losses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from models.chunks import code_keys, sorted_in_place
from models.evaluation.measures import usage
from models.network import DecoderNetwork, EncoderNetwork
from models.quantizer import Quantizer
from models.training.history import EpochRecord, LevelRecord, Measure
from models.training.rows import Rows

CHUNK_ROWS = 8192

# Colliding pairs of an epoch, at most.
PAIRS = 2**20


class Trained(Protocol):
    """What is frozen of a fitted model, whatever the family."""

    @property
    def network(self) -> EncoderNetwork:
        """Of embeddings to latents."""

    @property
    def quantizer(self) -> Quantizer:
        """Of latents to codes and back."""

    @property
    def decoder(self) -> DecoderNetwork:
        """Of quantized latents to embeddings."""


class Fit(NamedTuple):
    """A fitted model.

    Attributes:
        model: At the best measurement.
        best: That measurement.
        records: All epochs and clusterings, in the order in which they happened.
        held_out: Row numbers that were not trained on.
    """

    model: Trained
    best: Measure
    records: tuple[EpochRecord, ...]
    held_out: Tensor

    @property
    def history(self) -> tuple[Measure, ...]:
        """All measurements."""
        return tuple(record.held_out for record in self.records if record.held_out)

    @property
    def kept(self) -> int:
        """The place in `records` of the model's state."""
        return next(place for place, record in enumerate(self.records) if record.held_out == self.best)


class Coded(NamedTuple):
    """All rows as a model codes them.

    Attributes:
        codes: (N, L) int32: there may be many.
        left_over: (L,) float64, see `LevelRecord.left_over`.
    """

    codes: Tensor
    left_over: Tensor


@torch.no_grad()
def coded(model: Trained, embeddings: Tensor, weights: Tensor) -> Coded:
    """The codes of embeddings (N, D) float32; what the levels leave over is of rows weighted by (N,)."""
    device = model.network.centre.device
    total = weights.sum()
    codes = torch.empty(len(embeddings), len(model.quantizer.codebook_sizes), dtype=torch.int32)
    energies, mean = torch.zeros((), device=device), torch.zeros((), device=device)
    for start in range(0, len(embeddings), CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        quantization = model.quantizer.quantize(model.network(embeddings[rows].to(device)))
        counts = (weights[rows] / total).double().to(device)
        codes[rows] = quantization.codes.cpu()
        energies = energies + (quantization.residuals.square().sum(dim=2).double() * counts[:, None]).sum(dim=0)
        mean = mean + (quantization.residuals[:, 0] * counts[:, None]).sum(dim=0)
    variance = (energies[0] - mean.square().sum()).clamp_min(1e-12)
    return Coded(codes, energies[1:] / variance)


def level_records(
    coded: Coded, sizes: tuple[int, ...], weights: Tensor, restarted: tuple[int, ...] = ()
) -> tuple[LevelRecord, ...]:
    """Each level over the rows that count.

    Args:
        coded: Of all rows.
        sizes: K_l for each level.
        weights: (N,) float, what each row counts; 0 where it was not trained on.
        restarted: Dead codewords of each level that were moved; none where empty.
    """
    levels = zip(
        usage(coded.codes, sizes, weights),
        coded.left_over.tolist(),
        restarted or [0] * len(sizes),
        strict=True,
    )
    return tuple(LevelRecord(level.used, level.perplexity, left, moved) for level, left, moved in levels)


@torch.no_grad()
def held_out_measures(model: Trained, rows: Rows, codes: Tensor) -> tuple[float, float]:
    """Reconstruction error of held-out rows as a share of the variance, and the share that collides with any row.

    Args:
        model: What is measured.
        rows: On `Rows.measured` of these.
        codes: (N, L) int, of all rows.
    """
    device = model.network.centre.device
    chosen = rows.measured
    rebuilt = model.decoder(model.quantizer.decode(codes[chosen].long().to(device))).cpu()
    miss = (rows.embeddings[chosen] - rebuilt).square().sum(dim=1)
    share = rows.weights[chosen] / rows.weights[chosen].sum()
    keys = code_keys(codes)
    measured = keys[chosen]
    ordered = sorted_in_place(keys)
    counts = torch.searchsorted(ordered, measured, right=True) - torch.searchsorted(ordered, measured)
    colliding = float(((counts > 1) * share).sum())
    return float((miss * share).sum()) / rows.variance, colliding


def colliding_pairs(codes: Tensor, rows: Tensor) -> Tensor:
    """Pairs (P, 2) of row numbers that share all their codes; of a group of n, neighbours in a random-free order.

    Where there are more than `PAIRS`, each second, third, ... of them.

    Args:
        codes: (n, L) int.
        rows: (n,) int64, the row number of each.
    """
    keys = code_keys(codes)
    del codes
    order = torch.from_numpy(keys.cpu().numpy().argsort(kind="stable"))
    most = PAIRS if len(keys) <= PAIRS else max(1, PAIRS * PAIRS // len(keys))
    pairs = [torch.empty(0, 2, dtype=torch.int64)]
    for start in range(0, len(keys) - 1, PAIRS):
        part = order[start : start + PAIRS + 1]
        same = (keys[part[1:]] == keys[part[:-1]]).nonzero().flatten()
        same = same[:: -(-len(same) // most) or 1]
        pairs.append(torch.stack([rows[part[same]], rows[part[same + 1]]], dim=1))
    return torch.cat(pairs)


class LossMeans:
    """Means of an epoch's losses over its rows, kept where the losses are, so that no step waits for them."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._gradients: list[Tensor] = []
        self._rows = 0

    def add(self, losses: Mapping[str, Tensor], gradient_norm: Tensor, rows: int) -> None:
        """Take a step's losses, () or (L,) float, the norm of its gradients () and the number of its rows."""
        self._rows += rows
        self._gradients.append(gradient_norm.detach())
        for name, loss in losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + loss.detach() * rows

    def as_dict(self) -> dict[str, float]:
        """As `EpochRecord.losses` names them."""
        means = {}
        for name, total in self._sums.items():
            means[name] = float(total.sum()) / self._rows
            if total.ndim:
                means |= {f"{name} {level}": float(one) / self._rows for level, one in enumerate(total, 1)}
        return means

    @property
    def steps(self) -> int:
        """Taken so far."""
        return len(self._gradients)

    @property
    def gradient_norm(self) -> float:
        """Mean over the steps."""
        return float(torch.stack(self._gradients).mean())

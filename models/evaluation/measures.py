"""The measurement of a tokenizer: what its codes keep and how often they collide. Raw figures, before any suffix."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from models.chunks import code_keys, count_distinct, group_sizes, sorted_in_place, squared_distances, weighted_sum
from models.network import DecoderNetwork, EncoderNetwork
from models.quantizer import Quantizer

CHUNK_ROWS = 8192
RANKS = 256
USAGE_ROWS = 2**20
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


@dataclass(frozen=True)
class LevelUsage:
    """How a level's codewords are used.

    Attributes:
        used: Share of the codewords chosen at least once.
        perplexity: exp(entropy): so many codewords, equally used, would have the same entropy.
        entropy: In bits; at most log2 K.
    """

    used: float
    perplexity: float
    entropy: float


@dataclass(frozen=True)
class Collisions:
    """How many items share all their codes.

    Attributes:
        rate: 1 - unique / N, raw.
        largest_group: Items of the most crowded codes.
        group_sizes: Group size -> number of groups of that size.
        duplicates: Share of the items whose embedding equals an earlier one's: no tokenizer parts these.
    """

    rate: float
    largest_group: int
    group_sizes: dict[int, int]
    duplicates: float


@dataclass(frozen=True)
class Report:
    """Measures of a tokenizer on N items.

    Attributes:
        items: N.
        reconstruction_error: |x - x^|^2 as a share of the embeddings' variance; 1 would be answering the mean.
        collisions: See `Collisions`.
        levels: Usage of each level's codewords, rows weighted as in training where weights are given.
        quantization_error: Mean and quantiles of |z - q|^2, to measure drift against.
        codeword_use: See `codeword_use`; not for the manifest.
    """

    items: int
    reconstruction_error: float
    collisions: Collisions
    levels: tuple[LevelUsage, ...]
    quantization_error: dict[str, float]
    codeword_use: tuple[tuple[float, ...], ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For the manifest: JSON types only."""
        content = asdict(self)
        del content["codeword_use"]
        content["levels"] = [asdict(level) for level in self.levels]
        content["collisions"]["group_sizes"] = {str(k): v for k, v in self.collisions.group_sizes.items()}
        return content

    def __str__(self) -> str:
        """A few lines to read."""
        collisions = self.collisions
        lines = [
            f"items                 {self.items:,}",
            f"reconstruction error  {self.reconstruction_error:.3f} of the variance",
            f"raw collisions        {collisions.rate:.2%} (equal embeddings {collisions.duplicates:.2%})",
            f"largest group         {collisions.largest_group}",
        ]
        lines += [
            f"level {number}               used {level.used:.1%}, perplexity {level.perplexity:.1f}, "
            f"entropy {level.entropy:.2f} bits"
            for number, level in enumerate(self.levels, 1)
        ]
        return "\n".join(lines)


@torch.inference_mode()
def evaluate(
    embeddings: Tensor,
    network: EncoderNetwork,
    quantizer: Quantizer,
    decoder: DecoderNetwork,
    weights: Tensor | None = None,
) -> Report:
    """Measure the parts of a tokenizer on a catalogue.

    Args:
        embeddings: (N, D) float32.
        network: D -> d.
        quantizer: d -> L codes.
        decoder: d -> D.
        weights: (N,) what each row counts in the levels' usage and the reconstruction; equal where None.
    """
    weights = torch.ones(1).expand(len(embeddings)) if weights is None else weights
    share = (weights / weights.sum()).double()
    centre = weighted_sum(embeddings, share).to(embeddings)
    variance = (squared_distances(embeddings, centre) * share).sum()
    codes = torch.empty(len(embeddings), len(quantizer.codebook_sizes), dtype=torch.int32)
    misses, errors = embeddings.new_empty(len(embeddings)), embeddings.new_empty(len(embeddings))
    for start in range(0, len(embeddings), CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        quantization = quantizer.quantize(network(embeddings[rows]))
        rebuilt = decoder(quantizer.decode(quantization.codes))
        codes[rows] = quantization.codes
        misses[rows] = (embeddings[rows] - rebuilt).square().sum(dim=1)
        errors[rows] = quantization.residuals[:, -1].square().sum(dim=1)
    return Report(
        items=len(embeddings),
        reconstruction_error=float(share.mul_(misses).sum() / variance.clamp_min(1e-12)),
        collisions=collisions(codes, embeddings),
        levels=usage(codes, quantizer.codebook_sizes, weights),
        quantization_error=distribution(errors),
        codeword_use=codeword_use(codes, quantizer.codebook_sizes, weights),
    )


def collisions(codes: Tensor, embeddings: Tensor | None = None) -> Collisions:
    """How many of the items with codes (N, L) int64 share them.

    Args:
        codes: (N, L) int.
        embeddings: (N, D), to count the equal ones; none are counted where None.
    """
    groups = group_sizes(code_keys(codes))
    sizes, counts = groups.unique(return_counts=True)
    equal = 0.0
    if embeddings is not None:
        equal = 1 - count_distinct(embeddings) / len(embeddings)
    return Collisions(
        rate=1 - len(groups) / len(codes),
        largest_group=int(groups.max()),
        group_sizes=dict(zip(sizes.tolist(), counts.tolist(), strict=True)),
        duplicates=equal,
    )


def usage(codes: Tensor, codebook_sizes: tuple[int, ...], weights: Tensor | None = None) -> tuple[LevelUsage, ...]:
    """Usage of each level's codewords by codes (N, L) int64, rows weighted by (N,)."""
    levels = []
    for level, size in enumerate(codebook_sizes):
        chosen = codes[:, level].split(USAGE_ROWS)
        counted = weights.split(USAGE_ROWS) if weights is not None else [None] * len(chosen)
        counts = torch.zeros(size, dtype=torch.float64, device=codes.device)
        for some, count in zip(chosen, counted, strict=True):
            counts += torch.bincount(some, weights=count, minlength=size)
        shares = counts[counts > 0] / counts.sum()
        entropy = float(-(shares * shares.log()).sum())
        levels.append(LevelUsage(float((counts > 0).double().mean()), _exp(entropy), max(entropy, 0.0) / _LN2))
    return tuple(levels)


def codeword_use(
    codes: Tensor, codebook_sizes: tuple[int, ...], weights: Tensor | None = None
) -> tuple[tuple[float, ...], ...]:
    """How often codewords are chosen, level by level: 1 is as often as if all were chosen alike.

    Args:
        codes: (N, L) int.
        codebook_sizes: K_l for each level.
        weights: (N,) what each row counts; equal where None.

    Returns:
        Of each level the codewords at `RANKS` evenly spaced ranks from the most to the least chosen one, or all of them
        where they are fewer.
    """
    levels = []
    for level, size in enumerate(codebook_sizes):
        counts = torch.bincount(codes[:, level], weights=weights, minlength=size).double()
        ranked = (counts * size / counts.sum()).sort(descending=True).values
        ranks = torch.linspace(0, size - 1, min(size, RANKS), dtype=torch.float64).round().long()
        levels.append(tuple(round(value, 4) for value in ranked[ranks].tolist()))
    return tuple(levels)


def distribution(values: Tensor) -> dict[str, float]:
    """Mean and quantiles of values (N,)."""
    ordered = sorted_in_place(values.to(torch.float64, copy=True))
    quantiles = {f"q{100 * q:02.0f}": float(ordered[round(q * (len(ordered) - 1))]) for q in QUANTILES}
    return {"mean": float(ordered.mean()), **quantiles}


def purity(codes: Tensor, categories: list[str], depth: int) -> float:
    """Share of the items whose category is the most frequent one under their prefix of `depth` codes."""
    prefixes = codes[:, :depth].unique(dim=0, return_inverse=True)[1].tolist()
    counts: dict[int, dict[str, int]] = {}
    for prefix, category in zip(prefixes, categories, strict=True):
        group = counts.setdefault(prefix, {})
        group[category] = group.get(category, 0) + 1
    return sum(max(group.values()) for group in counts.values()) / len(categories)


_LN2 = 0.6931471805599453


def _exp(entropy: float) -> float:
    return float(torch.tensor(max(entropy, 0.0), dtype=torch.float64).exp())

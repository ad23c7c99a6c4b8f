"""Lloyd's k-means, the only one in the repository: full data, weighted rows, no empty cluster left empty."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from models.chunks import is_finite, slices, weighted_sum

# Rows measured at once: N x K scores of a large catalogue would not fit into memory, nor those of a chunk into cache.
CHUNK_ROWS = 8192

# Bytes of points that are summed at once: their copies in float64 take four times as many.
SUMMED_BYTES = 2**22

# Distances of points to codewords that a balanced assignment holds at once.
WISHES = 2**24

# k-means++ looks at this many rows for each codeword at most; more do not make a better start.
SEEDING_ROWS_PER_CODEWORD = 64


@dataclass(frozen=True)
class KMeansConfig:
    """How often Lloyd's iterations start, and how long they go on.

    Attributes:
        starts: So many clusterings, each from a start of its own, of which that of the smallest inertia is kept.
        iterations: At most so many.
        tolerance: Stop where the inertia falls by less than this share of itself.
        balanced: Let no cluster have more than its share of the rows while iterating, see `assign_balanced`; rows count
            alike there, whatever they weigh.
    """

    starts: int = 1
    iterations: int = 30
    tolerance: float = 1e-4
    balanced: bool = False


class Clustering(NamedTuple):
    """A clustering of N points into K clusters.

    Attributes:
        codebook: (K, d), the weighted mean of each cluster.
        codes: (N,) int64, the nearest codeword of each point.
        inertia: Weighted mean of the squared distances to the codewords.
    """

    codebook: Tensor
    codes: Tensor
    inertia: float


def kmeans(
    points: Tensor,
    size: int,
    generator: torch.Generator,
    weights: Tensor | None = None,
    config: KMeansConfig | None = None,
) -> Clustering:
    """Cluster points by Lloyd's iterations from a k-means++ start (Arthur and Vassilvitskii, 2007); the best of some.

    Points are centred first: far from the origin the expanded square would lose its digits. A cluster that runs
    empty takes the point that its codeword serves worst, so no codeword is ever NaN; where there are fewer distinct
    points than codewords the surplus codewords repeat others and are never chosen.

    Args:
        points: (N, d) float32 or float64, finite.
        size: K.
        generator: Of the random starts, on the CPU.
        weights: (N,) float, not negative, what each row counts; equal where None.
        config: When to stop.

    Raises:
        ValueError: The shapes do not fit, there is no point of positive weight, or a number is not finite.
    """
    config = config or KMeansConfig()
    weights = _checked_weights(points, size, weights)
    centre = weighted_sum(points, weights) / weights.sum()
    starts = (plus_plus(points, centre, size, weights, generator) for _ in range(config.starts))
    found = (_from(start, points, centre, weights, config) for start in starts)
    # Of equals the first.
    best = min(found, key=lambda clustering: clustering.inertia)
    return best._replace(codebook=best.codebook + centre)


def _from(codebook: Tensor, points: Tensor, centre: Tensor, weights: Tensor, config: KMeansConfig) -> Clustering:
    """Lloyd's iterations from a start; the codebook (K, d) is less the centre, before and after."""
    previous = float("inf")
    for _ in range(config.iterations):
        codes, distances = (assign_balanced if config.balanced else assign)(points, codebook, centre)
        inertia = float((distances * weights).sum() / weights.sum())
        codebook = _means(points, codes, distances, weights, codebook=codebook, centre=centre)
        del codes, distances  # room for the next ones, where there are many rows
        if previous - inertia <= config.tolerance * inertia:
            break
        previous = inertia
    codes, distances = assign(points, codebook, centre)
    return Clustering(codebook, codes, float((distances * weights).sum() / weights.sum()))


def assign(points: Tensor, codebook: Tensor, origin: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """The nearest codeword (N,) int64 of each point (N, d), and the squared distance (N,) to it.

    Made for bulk: no margin, and ties fall where rounding lets them; `models.quantizer.nearest_codeword` settles them.

    Args:
        points: (N, d) float.
        codebook: (K, d).
        origin: (d,), taken from each point first.
    """
    centre = codebook.mean(dim=0)
    codewords = codebook - centre
    offsets = codewords.square().sum(dim=1)
    codes = torch.empty(points.shape[0], dtype=torch.int64, device=points.device)
    distances = points.new_empty(points.shape[0])
    for start in range(0, points.shape[0], CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        chunk = points[rows] - origin - centre
        codes[rows] = torch.addmm(offsets, chunk, codewords.T, alpha=-2).argmin(dim=1)
        distances[rows] = (chunk - codewords[codes[rows]]).square().sum(dim=1)
    return codes, distances


def assign_balanced(points: Tensor, codebook: Tensor, origin: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """As `assign`, where no codeword takes more than ceil(N / K) points; for training only, it depends on all points.

    Deferred acceptance (Gale and Shapley, 1962): each point asks the nearest codeword that has not refused it yet, each
    codeword keeps the nearest of those that ask. But for equal distances the outcome does not depend on the points'
    order. Balanced residual k-means is OneRec's (Deng et al., 2025), which fills one cluster after the other
    instead. Of each point so many of its next wishes are held that there are `WISHES` in all; a point that was
    refused all of these is measured again.
    """
    capacity = -(-len(points) // len(codebook))
    count = max(1, min(len(codebook), WISHES // len(points)))
    scores = points.new_empty(len(points), count)
    wishes = torch.empty(len(points), count, dtype=torch.int32, device=points.device)
    refusals = torch.zeros(len(points), dtype=torch.int32, device=points.device)
    stale = torch.arange(len(points), device=points.device)
    while True:
        for rows in stale.split(max(1, WISHES // 4 // len(codebook))):
            scores[rows], wishes[rows] = _wishes(points[rows] - origin, codebook, refusals[rows], count)
        place = (refusals % count).long()[:, None]
        asked = wishes.gather(1, place)[:, 0].long()
        near = scores.gather(1, place)[:, 0].argsort(stable=True)
        queue = near[asked[near].argsort(stable=True)]  # by codeword, then by distance
        asking = torch.bincount(asked, minlength=len(codebook))
        rank = torch.arange(len(points), device=points.device) - (asking.cumsum(0) - asking)[asked[queue]]
        refused = queue[rank >= capacity]
        if not len(refused):
            return asked, _distances(points, asked, codebook, origin)
        refusals[refused] += 1
        stale = refused[refusals[refused] % count == 0]


def _wishes(points: Tensor, codebook: Tensor, refusals: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Squared distances (n, count) of points (n, d) to the codewords they wish for next, and these (n, count) int32."""
    norms = codebook.square().sum(dim=1)
    scores = torch.addmm(norms, points, codebook.T, alpha=-2).add_(points.square().sum(dim=1, keepdim=True))
    order = scores.argsort(dim=1, stable=True)
    if count < len(codebook):
        ranks = refusals.long()[:, None] + torch.arange(count, device=points.device)
        order = order.gather(1, ranks % len(codebook))
    return scores.gather(1, order), order.int()


def _distances(points: Tensor, codes: Tensor, codebook: Tensor, origin: Tensor | float) -> Tensor:
    """Squared distances (N,) of points to their codewords."""
    return torch.cat([(points[rows] - origin - codebook[codes[rows]]).square().sum(dim=1) for rows in slices(points)])


def _checked_weights(points: Tensor, size: int, weights: Tensor | None) -> Tensor:
    if points.ndim != 2 or points.shape[0] < 1 or size < 1:
        msg = f"k-means needs points (N, d) and at least one codeword, got {tuple(points.shape)} and {size}"
        raise ValueError(msg)
    weights = points.new_ones(points.shape[0]) if weights is None else weights.to(points)
    if weights.shape != points.shape[:1] or bool((weights < 0).any()) or not float(weights.sum()) > 0:
        msg = f"k-means needs a weight for each of {points.shape[0]} points, none negative and not all zero"
        raise ValueError(msg)
    if not is_finite(points) or not bool(weights.isfinite().all()):
        msg = "k-means needs finite points and weights"
        raise ValueError(msg)
    return weights


def plus_plus(points: Tensor, centre: Tensor, size: int, weights: Tensor, generator: torch.Generator) -> Tensor:
    """K points less their centre, each drawn with its squared distance to those already drawn as probability."""
    if points.shape[0] > size * SEEDING_ROWS_PER_CODEWORD:
        chosen = torch.randperm(points.shape[0], generator=generator)[: size * SEEDING_ROWS_PER_CODEWORD]
        points, weights = points[chosen.to(points.device)], weights[chosen.to(points.device)]
    points = points - centre
    if not float(weights.sum()) > 0:
        weights = torch.ones_like(weights)
    picks = [_draw(weights, generator)]
    distances = (points - points[picks[0]]).square().sum(dim=1)
    for _ in range(size - 1):
        chances = distances * weights
        picks.append(_draw(chances if float(chances.sum()) > 0 else weights, generator))
        distances = torch.minimum(distances, (points - points[picks[-1]]).square().sum(dim=1))
    return points[picks].clone()


def _draw(chances: Tensor, generator: torch.Generator) -> int:
    """An index, by inverting the cumulative sum (`torch.multinomial` refuses more than 2^24 rows)."""
    cumulative = chances.double().cpu().cumsum(dim=0)
    threshold = torch.rand(1, generator=generator, dtype=torch.float64) * cumulative[-1]
    return min(int(torch.searchsorted(cumulative, threshold, right=True)), chances.shape[0] - 1)


def _means(
    points: Tensor, codes: Tensor, distances: Tensor, weights: Tensor, *, codebook: Tensor, centre: Tensor
) -> Tensor:
    """The weighted mean of each cluster, less the centre; an empty one restarts at a point that is served badly."""
    mass = torch.zeros(codebook.shape[0], dtype=torch.float64, device=points.device)
    sums = torch.zeros(codebook.shape, dtype=torch.float64, device=points.device)
    # In float64: the mean of equal points is that point, and repeats of a codeword stay its equals.
    for rows in slices(points, SUMMED_BYTES):
        mass.index_add_(0, codes[rows], weights[rows].double())
        sums.index_add_(0, codes[rows], (points[rows] - centre).double() * weights[rows].double()[:, None])
    empty = (mass <= 0).nonzero().flatten()
    means = torch.where((mass > 0)[:, None], sums / mass.clamp_min(torch.finfo(mass.dtype).tiny)[:, None], codebook)
    means = means.to(codebook.dtype)
    if len(empty):
        worst = (distances * weights).topk(min(len(empty), points.shape[0]))
        replaced = worst.indices[worst.values > 0]
        means[empty[: len(replaced)]] = points[replaced] - centre
    return means

"""Codebooks by k-means on latents: where a family is fitted by k-means alone, and where the RQ-VAE starts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.chunks import count_distinct, digests, squared_distances
from models.product import ProductQuantizer
from models.residual import ResidualQuantizer
from models.training.kmeans import KMeansConfig, kmeans
from models.training.spool import held
from models.tree import TreeQuantizer

CHUNK_ROWS = 8192

# Residuals below this share of the latents' root mean square are float32's rounding.
ROUNDING = 1e-6


@torch.no_grad()
def cluster_residuals(
    quantizer: ResidualQuantizer,
    latents: Tensor,
    weights: Tensor,
    config: KMeansConfig,
    generator: torch.Generator,
    *,
    spool: Path | None = None,
) -> None:
    """Residual k-means: cluster, level by level, what each level receives of all rows.

    Args:
        quantizer: Its codebooks are written.
        latents: (N, d) float32.
        weights: (N,) float, what each row counts.
        config: Of each level's k-means.
        generator: Of the random starts.
        spool: Where what a level receives lies while it is clustered, where it is much; see `models.training.spool`.
    """
    rounding = ROUNDING * squared_distances(latents, latents.new_zeros(latents.shape[1])).mean().sqrt()
    for level, codebook in enumerate(quantizer.codebooks):
        parts = (_received(quantizer, rows, level, rounding) for rows in latents.split(CHUNK_ROWS))
        residuals = held(parts, len(latents), latents.shape[1], spool)
        codebook.copy_(kmeans(residuals, len(codebook), generator, weights, config).codebook)
    quantizer.initialised.fill_(value=True)


def _received(quantizer: ResidualQuantizer, latents: Tensor, level: int, rounding: Tensor) -> Tensor:
    """What a level receives of latents (n, d)."""
    residuals = quantizer.quantize(latents).residuals[:, level]
    # What rounding left of rows that the levels before took whole is nothing; clustered, it would put codewords
    # so close together that every such row is near a tie.
    return torch.where(residuals.norm(dim=1, keepdim=True) > rounding, residuals, 0.0)


@torch.no_grad()
def cluster_tree(
    quantizer: TreeQuantizer,
    latents: Tensor,
    weights: Tensor,
    config: KMeansConfig,
    generator: torch.Generator,
    *,
    rows_per_child: int = 1,
    spool: Path | None = None,
) -> None:
    """Hierarchical k-means: cluster the rows of each node, and the rows of each of its clusters again.

    A node of no more different rows than it may have children has each of them as a child; a cluster that no row is
    nearest to becomes no child.

    Args:
        quantizer: Its levels are grown.
        latents: (N, d) float32.
        weights: (N,) float, what each row counts.
        config: Of each node's k-means.
        generator: Of the random starts.
        rows_per_child: A node of n rows has at most n / rows_per_child children, and at least one.
        spool: Where the rows of a node lie while they are clustered, where they are many.
    """
    nodes = [torch.arange(len(latents))]
    for level, size in enumerate(quantizer.codebook_sizes):
        centres, children, following = [], [], []
        for rows in nodes:
            limit = min(size, max(1, len(rows) // rows_per_child))
            points = held((latents[part] for part in rows.split(CHUNK_ROWS)), len(rows), latents.shape[1], spool)
            clusters, codes = _children(points, weights[rows], limit, config, generator)
            centres.append(clusters)
            children.append(len(clusters))
            following += [rows[codes == code] for code in range(len(clusters))]
        quantizer.grow(level, torch.cat(centres), torch.tensor(children))
        nodes = following


@torch.no_grad()
def cluster_parts(
    quantizer: ProductQuantizer,
    latents: Tensor,
    weights: Tensor,
    config: KMeansConfig,
    generator: torch.Generator,
) -> None:
    """Product quantization: cluster each part of the latents by itself; arguments as of `cluster_residuals`."""
    for codebook, part in zip(quantizer.codebooks, quantizer.parts(latents), strict=True):
        codebook.copy_(kmeans(part, len(codebook), generator, weights, config).codebook)


def learned_rotation(latents: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """OPQ's rotation (d, d) float32, orthogonal: z -> R z spreads the variance over the parts, by faiss.

    Non-parametric OPQ (Ge et al., CVPR 2013): product quantization and the rotation that fits it best, in turns. faiss
    takes a power of two codewords, the same number for all levels; here that is the one next to the smallest K_l or
    below it, and no more than there are rows. The codebooks are clustered afterwards, of their own size.

    Args:
        latents: (N, d) float32, centred.
        sizes: K_l for each level; their number divides d.

    Raises:
        ValueError: It does not divide d, or faiss is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise ValueError("opq is trained with faiss: pip install 'semid[train]'") from error
    width, parts = latents.shape[1], len(sizes)
    if width % parts:
        raise ValueError(f"opq: the latent's width, {width}, has to be a multiple of the number of levels, {parts}")
    bits = max(1, min(*sizes, len(latents)).bit_length() - 1)
    rotation = faiss.OPQMatrix(width, parts)
    inner = faiss.ProductQuantizer(width, parts, min(bits, 12))
    inner.cp.min_points_per_centroid = 1
    rotation.pq = inner
    # What faiss adds up depends on how many threads share it, and threads that wait for each other on busy cores cost
    # more than they save: one, which gives the same rotation anywhere.
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    # With fewer rows than numbers in each, faiss writes beyond its own memory: the rows as often as that takes.
    rows = latents.repeat(-(-width // len(latents)), 1) if len(latents) < width else latents
    try:
        rotation.train(rows.numpy())
    finally:
        faiss.omp_set_num_threads(threads)
    learned = torch.from_numpy(faiss.vector_to_array(rotation.A).reshape(width, width).copy())
    # The nearest orthogonal matrix: faiss's is one up to float32.
    left, _, right = torch.linalg.svd(learned.double())
    nearest: Tensor = (left @ right).float()
    return nearest


def _children(
    points: Tensor, weights: Tensor, limit: int, config: KMeansConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Centres (C, d) of a node's children, and the child (n,) of each of its points (n, d)."""
    if len(points) <= CHUNK_ROWS or count_distinct(points, enough=limit + 1) <= limit:
        distinct, codes = _distinct(points)
        if len(distinct) <= limit:
            return distinct, codes
    if not float(weights.sum()) > 0:
        weights = torch.ones_like(weights)
    clustering = kmeans(points, limit, generator, weights, config)
    used, codes = clustering.codes.unique(return_inverse=True)
    return clustering.codebook[used], codes


def _distinct(points: Tensor) -> tuple[Tensor, Tensor]:
    """The points (n, d) that differ, in order, and which of them (n,) each one is."""
    if len(points) <= CHUNK_ROWS:
        distinct, codes = points.unique(dim=0, return_inverse=True)
        return distinct, codes
    _, first, inverse = np.unique(digests(points), return_index=True, return_inverse=True)
    distinct, codes = points[torch.from_numpy(first)].unique(dim=0, return_inverse=True)
    return distinct, codes[torch.from_numpy(inverse)]

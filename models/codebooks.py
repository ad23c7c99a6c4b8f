"""Codebooks by k-means on latents: where a family is fitted by k-means alone, and where the RQ-VAE starts."""

from __future__ import annotations

import torch
from torch import Tensor

from models.kmeans import KMeansConfig, kmeans
from models.residual import ResidualQuantizer

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
) -> None:
    """Residual k-means: cluster, level by level, what each level receives of all rows.

    Args:
        quantizer: Its codebooks are written.
        latents: (N, d) float32.
        weights: (N,) float, what each row counts.
        config: Of each level's k-means.
        generator: Of the random starts.
    """
    rounding = ROUNDING * latents.square().sum(dim=1).mean().sqrt()
    for level, codebook in enumerate(quantizer.codebooks):
        residuals = torch.cat([quantizer.quantize(rows).residuals[:, level] for rows in latents.split(CHUNK_ROWS)])
        # What rounding left of rows that the levels before took whole is nothing; clustered, it would put codewords
        # so close together that every such row is near a tie.
        residuals = torch.where(residuals.norm(dim=1, keepdim=True) > rounding, residuals, 0.0)
        codebook.copy_(kmeans(residuals, len(codebook), generator, weights, config).codebook)
    quantizer.initialised.fill_(value=True)

"""Families fitted by k-means alone, without a learned encoder: latents are embeddings or their principal components.

`rq-kmeans`: residual k-means on all rows at once (RQ-KMeans: Luo et al., QARM, 2024; OneRec: Deng et al., 2025). The
encoder network is the centred identity, or with `latent` the projection to that many principal components.

`rk-means`: the same by mini-batches, one of which is in memory, see `models.training.minibatch`.

`pq` and `opq`: k-means of each part of the latent, see `models.product`; `opq` rotates it first, by a matrix that faiss
finds and the encoder network holds.

`hierarchical`: k-means of all rows, then of each cluster's rows, and so on, see `models.tree`.

Codes stay a function of the content alone by the same argument as an RQ-VAE's. The network is linear with a known gain,
and each level's margin is the distance of what it receives to the nearest plane midway between the codeword chosen and
any other. A latent error of norm e moves what each level receives by e at most while no code changes, so it changes
none while e is below the smallest margin; rows nearer than that are computed again on the canonical path. What training
drew on (balance, the other rows) is gone from a frozen tokenizer: each row goes to its nearest codeword.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.network import DecoderNetwork, EncoderNetwork, NetworkConfig, start_linear
from models.product import ProductQuantizer
from models.quantizer import Quantizer
from models.residual import ResidualQuantizer
from models.training.codebooks import cluster_parts, cluster_residuals, cluster_tree, learned_rotation
from models.training.history import INITIALISED, EpochRecord, Measure
from models.training.kmeans import KMeansConfig
from models.training.minibatch import MiniBatchConfig, minibatch_residuals
from models.training.projection import Centred, ProjectionConfig, projection
from models.training.rows import drawn_rows
from models.training.spool import block_rows, held
from models.training.watch import Fit, coded, held_out_measures, level_records
from models.tree import TreeQuantizer

CHUNK_ROWS = 8192


@dataclass(frozen=True)
class ClusterConfig:
    """Hyper-parameters of a fit by k-means.

    Attributes:
        codebook_sizes: K_l for each level.
        latent: d, so many principal components; 0: the embeddings themselves.
        rows_per_child: `hierarchical`: a node of n rows has at most n / rows_per_child children.
        held_out: Share of the rows that are not clustered but measured, 5,000 at most.
        projection: How the components are chosen; principal ones by default.
        kmeans: Of each clustering; `balanced` limits the clusters' sizes.
        minibatch: Of `rk-means`, in place of `kmeans`.
        seed: Of everything drawn.
    """

    codebook_sizes: tuple[int, ...] = (256, 256, 256, 256)
    latent: int = 0
    rows_per_child: int = 1
    held_out: float = 0.05
    projection: ProjectionConfig = field(default_factory=lambda: ProjectionConfig(local=0.0, whitening=0.0))
    kmeans: KMeansConfig = field(default_factory=KMeansConfig)
    minibatch: MiniBatchConfig = field(default_factory=MiniBatchConfig)
    seed: int = 0


class Clustered(NamedTuple):
    """A model fitted by k-means: linear networks around a quantizer."""

    network: EncoderNetwork
    quantizer: Quantizer
    decoder: DecoderNetwork


class ClusterData(NamedTuple):
    """What a quantizer is fitted to.

    Attributes:
        embeddings: (M, D) float32.
        rows: (N,) int64, which of them are clustered.
        weights: (N,) float32, what each of these counts.
        network: Of embeddings to latents.
        spool: Where latents lie, where they are many.
    """

    embeddings: Tensor
    rows: Tensor
    weights: Tensor
    network: EncoderNetwork
    spool: Path | None

    def some(self, places: Tensor | slice) -> Tensor:
        """The latents (n, d) float32 of some of the N rows."""
        latents: Tensor = self.network(self.embeddings[self.rows[places]])
        return latents

    def latents(self) -> Tensor:
        """All latents, (N, d) float32."""
        parts = (self.network(self.embeddings[rows]) for rows in self.rows.split(CHUNK_ROWS))
        return held(parts, len(self.rows), self.width, self.spool)

    @property
    def width(self) -> int:
        """D."""
        return self.network.config.widths[-1]


def fit_clusters(
    family: str,
    embeddings: Tensor,
    config: ClusterConfig,
    weights: Tensor | None = None,
    spool: Path | None = None,
) -> Fit:
    """Fit a family of `FITTERS`.

    Args:
        family: Its name.
        embeddings: (N, D) float32, finite.
        config: Hyper-parameters.
        weights: (N,) float, what each row counts; equal where None.
        spool: Where latents lie while they are clustered, where they are many; see `models.training.spool`.

    Raises:
        ValueError: There are too few rows, they are all equal or too large for float32, or the settings do not fit the
            embeddings.
    """
    began = time.monotonic()
    generator = torch.Generator().manual_seed(config.seed)
    rows = drawn_rows(embeddings, weights, config.held_out, generator)
    counts = rows.weights[rows.training]
    network, decoder = _linear_networks(Centred(embeddings, rows.training, rows.centre), counts, config, generator)
    network.centre.copy_(rows.centre)
    decoder.centre.copy_(rows.centre)
    data = ClusterData(embeddings, rows.training, counts, network, spool)
    with torch.no_grad():
        if family == "opq":
            _rotate(network, decoder, learned_rotation(data.latents(), config.codebook_sizes))
        quantizer = FITTERS[family](data, config, generator)
        del data
        model = Clustered(network.eval(), quantizer.eval(), decoder.eval())
    everything = coded(model, embeddings, rows.counting)
    reconstruction, colliding = held_out_measures(model, rows, everything.codes)
    measure = Measure(0, False, reconstruction, colliding, reconstruction)
    levels = level_records(everything, quantizer.codebook_sizes, rows.counting)
    record = EpochRecord(INITIALISED, 0, time.monotonic() - began, held_out=measure, levels=levels)
    return Fit(model, measure, (record,), rows.held_out)


def _linear_networks(
    centred: Centred, weights: Tensor, config: ClusterConfig, generator: torch.Generator
) -> tuple[EncoderNetwork, DecoderNetwork]:
    """The identity, or the projection to principal components and its least-squares inverse."""
    width = centred.embeddings.shape[1]
    shape = NetworkConfig((width, config.latent or width))
    network, decoder = EncoderNetwork(shape), DecoderNetwork(shape)
    down = up = torch.eye(width)
    if config.latent:
        down, up = projection(centred, weights, config.latent, config.projection, generator)
    start_linear(network.layers, down, torch.eye(len(down)))
    start_linear(decoder.layers, up, torch.eye(width))
    return network, decoder


def _residual(data: ClusterData, config: ClusterConfig, generator: torch.Generator) -> ResidualQuantizer:
    quantizer = ResidualQuantizer(config.codebook_sizes, data.width)
    cluster_residuals(quantizer, data.latents(), data.weights, config.kmeans, generator, spool=data.spool)
    return quantizer


def _minibatch(data: ClusterData, config: ClusterConfig, generator: torch.Generator) -> ResidualQuantizer:
    quantizer = ResidualQuantizer(config.codebook_sizes, data.width)
    block = block_rows(data.embeddings)
    minibatch_residuals(quantizer, data.some, data.weights, config.minibatch, generator, block_rows=block)
    return quantizer


def _tree(data: ClusterData, config: ClusterConfig, generator: torch.Generator) -> TreeQuantizer:
    quantizer = TreeQuantizer(config.codebook_sizes, data.width)
    latents, limit = data.latents(), config.rows_per_child
    cluster_tree(quantizer, latents, data.weights, config.kmeans, generator, rows_per_child=limit, spool=data.spool)
    return quantizer


def _product(data: ClusterData, config: ClusterConfig, generator: torch.Generator) -> ProductQuantizer:
    quantizer = ProductQuantizer(config.codebook_sizes, data.width)
    cluster_parts(quantizer, data.latents(), data.weights, config.kmeans, generator)
    return quantizer


def _rotate(network: EncoderNetwork, decoder: DecoderNetwork, rotation: Tensor) -> None:
    """Put an orthogonal map (d, d) behind the encoder network's and its inverse before the decoder network's."""
    with torch.no_grad():
        for layers, inverse in ((network.layers, False), (decoder.layers, True)):
            (layer,) = (layer for layer in layers if isinstance(layer, nn.Linear))
            layer.weight.copy_(layer.weight @ rotation.T if inverse else rotation @ layer.weight)


# What fits each family's quantizer to latents.
FITTERS: Mapping[str, Callable[[ClusterData, ClusterConfig, torch.Generator], Quantizer]] = {
    "rq-kmeans": _residual,
    "rk-means": _minibatch,
    "hierarchical": _tree,
    "pq": _product,
    "opq": _product,
}

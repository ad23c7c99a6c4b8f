"""Fits an RQ-VAE to embeddings: a start, k-means initialisation of every level, joint training, early stopping.

Held-out rows decide when to stop. The measure is what a catalogue feels: the reconstruction error and, at a price,
the share of held-out items whose codes another item of the catalogue has as well.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from models.network import DecoderNetwork, EncoderNetwork, NetworkConfig, start_linear
from models.quantizer import Quantizer
from models.training.codebooks import cluster_residuals
from models.training.kmeans import KMeansConfig
from models.training.projection import ProjectionConfig, draw_rows, projection
from models.training.rqvae import RQVAE, LossConfig, Variances

CHUNK_ROWS = 8192


@dataclass(frozen=True)
class FitConfig:
    """Hyper-parameters of a fit.

    Attributes:
        codebook_sizes: K_l for each level.
        latent: d.
        hidden: Widths between D and d; none: a linear encoder network.
        start: "projection": the networks start as the linear map of `projection`, an MLP too, which hidden widths of
            at least 2 d allow; "random": as torch draws them.
        warm_up_epochs: Of the plain autoencoder, before there are codebooks.
        epochs: Of joint training at most; 0 keeps the k-means solution.
        batch_rows: Rows of a step.
        pair_rows: Colliding pairs of a step, where the repulsion counts.
        learning_rate: Of AdamW; falls to 0 along a cosine.
        loss: What each loss counts.
        held_out: Share of the rows that are not trained on, 5,000 at most.
        collision_price: c of the measure `reconstruction error + c x share of held-out items that collide`.
        patience: Stop after so many measurements without a better one; an epoch each.
        projection: The linear start.
        kmeans: Of the initialisation.
        seed: Of everything drawn.
    """

    codebook_sizes: tuple[int, ...] = (256, 256, 256, 256)
    latent: int = 24
    hidden: tuple[int, ...] = (512,)
    start: str = "projection"
    warm_up_epochs: int = 0
    epochs: int = 30
    batch_rows: int = 1024
    pair_rows: int = 256
    learning_rate: float = 1e-3
    loss: LossConfig = field(default_factory=LossConfig)
    held_out: float = 0.05
    collision_price: float = 4.0
    patience: int = 20
    projection: ProjectionConfig = field(default_factory=ProjectionConfig)
    kmeans: KMeansConfig = field(default_factory=KMeansConfig)
    seed: int = 0


class Measure(NamedTuple):
    """A measurement on the held-out rows.

    Attributes:
        epoch: Finished epochs of joint training; 0 is the k-means solution.
        refitted: Whether the codebooks were clustered anew after the training.
        reconstruction: Error as a share of the variance.
        colliding: Share of the held-out items whose codes another item has as well.
        value: What is minimised.
    """

    epoch: int
    refitted: bool
    reconstruction: float
    colliding: float
    value: float


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
        history: All measurements.
        held_out: Row numbers that were not trained on.
    """

    model: Trained
    best: Measure
    history: tuple[Measure, ...]
    held_out: Tensor


def fit(
    embeddings: Tensor, config: FitConfig, weights: Tensor | None = None, collaborative: Tensor | None = None
) -> Fit:
    """Train an RQ-VAE.

    Args:
        embeddings: (N, D) float32, finite.
        config: Hyper-parameters.
        weights: (N,) float, how often each row is drawn; equal where None.
        collaborative: (N, c) float32, each item's embedding from sequences, NaN where it has none; drawn on where
            `loss.collaborative` is above 0.

    Raises:
        ValueError: There are too few rows, they are all equal, no objective has a weight or its data is missing, or a
            loss became NaN or infinite.
    """
    return _Fitting(embeddings, config, weights, collaborative).run()


class _Fitting:
    """The state of one fit."""

    def __init__(
        self, embeddings: Tensor, config: FitConfig, weights: Tensor | None, collaborative: Tensor | None = None
    ) -> None:
        if len(embeddings) < 2:
            msg = f"training needs at least 2 items, got {len(embeddings)}"
            raise ValueError(msg)
        config.loss.check()
        self.config = config
        self.collaborative = _collaborative(collaborative, config.loss, len(embeddings))
        self.generator = torch.Generator().manual_seed(config.seed)
        if torch.equal(embeddings, embeddings[:1].expand_as(embeddings)):
            msg = f"training needs items that differ: all {len(embeddings):,} have the same embedding"
            raise ValueError(msg)
        self.embeddings = embeddings
        self.weighted = weights is not None
        self.weights = torch.ones(len(embeddings)) if weights is None else weights.float()
        order = torch.randperm(len(embeddings), generator=self.generator)
        held_out = min(5_000, round(config.held_out * len(embeddings)))
        self.held_out, self.training = order[:held_out], order[held_out:]
        share = self.weights / self.weights.sum()
        self.centre = (embeddings * share[:, None]).sum(dim=0)
        self.variance = float(((embeddings - self.centre).square().sum(dim=1) * share).sum().clamp_min(1e-12))
        # Seeded here, so that the modules' random weights are the seed's and nobody else's state is touched.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.model = RQVAE(
                NetworkConfig((embeddings.shape[1], *config.hidden, config.latent)),
                config.codebook_sizes,
                None if self.collaborative is None else self.collaborative.shape[1],
            )
        self.model.network.centre.copy_(self.centre)
        self.model.decoder.centre.copy_(self.centre)
        self.pairs = torch.empty(0, 2, dtype=torch.int64)

    def run(self) -> Fit:
        if self.config.start == "projection":
            self._project()
        self._warm_up()
        self._initialise_codebooks()
        codes = self._codes()
        best = self._measure(0, codes)
        history, state = [best], copy.deepcopy(self.model.state_dict())
        optimiser, schedule = self._optimiser(self.config.epochs)
        with tqdm(range(1, self.config.epochs + 1), desc="training", unit="epoch", disable=None) as bar:
            for epoch in bar:
                self.pairs = colliding_pairs(codes[self.training], self.training)
                self._train_epoch(epoch, optimiser, schedule)
                codes = self._codes()
                if self._reset_dead_codewords(codes):
                    codes = self._codes()
                history.append(measure := self._measure(epoch, codes))
                bar.set_postfix(reconstruction=f"{measure.reconstruction:.3f}", colliding=f"{measure.colliding:.2%}")
                if measure.value < best.value:
                    best, state = measure, copy.deepcopy(self.model.state_dict())
                if epoch - best.epoch >= self.config.patience:
                    break
        self.model.load_state_dict(state)
        if best.epoch:
            # Joint training moves the encoder network away from the codebooks; k-means on what it became uses them
            # evenly again. Kept where the measure says so.
            self._cluster_codebooks()
            history.append(measure := self._measure(best.epoch, self._codes(), refitted=True))
            best, state = (measure, self.model.state_dict()) if measure.value <= best.value else (best, state)
            self.model.load_state_dict(state)
        return Fit(self.model.eval(), best, tuple(history), self.held_out)

    def _project(self) -> None:
        """Start the encoder network as the projection and the decoder network as its least-squares inverse."""
        rows = self.training
        down, up = projection(
            self.embeddings[rows] - self.centre,
            self.weights[rows],
            self.config.latent,
            self.config.projection,
            self.generator,
        )
        start_linear(self.model.network.layers, down, torch.eye(self.config.latent))
        start_linear(self.model.decoder.layers, torch.eye(self.config.latent), up)

    def _warm_up(self) -> None:
        """Train encoder and decoder network without quantization."""
        if not self.config.warm_up_epochs:
            return
        optimiser, schedule = self._optimiser(self.config.warm_up_epochs)
        with tqdm(range(1, self.config.warm_up_epochs + 1), desc="warm-up", unit="epoch", disable=None) as bar:
            for epoch in bar:
                for rows in self._batches():
                    batch = self.embeddings[rows]
                    rebuilt = self.model.decoder(self.model.network(batch))
                    loss = (batch - rebuilt).square().sum(dim=1).mean() / self.variance
                    self._step(loss, optimiser, schedule, f"warm-up epoch {epoch}")
                bar.set_postfix(reconstruction=f"{float(loss.detach()):.3f}")

    def _initialise_codebooks(self) -> None:
        """Cluster, unless the quantizer's state says that it has codebooks already."""
        if not bool(self.model.quantizer.initialised):
            self._cluster_codebooks()

    @torch.no_grad()
    def _cluster_codebooks(self) -> None:
        """k-means of what each level receives, on all training rows."""
        chunks = self.training.split(CHUNK_ROWS)
        latents = torch.cat([self.model.network(self.embeddings[rows]) for rows in chunks])
        weights = self.weights[self.training]
        cluster_residuals(self.model.quantizer, latents, weights, self.config.kmeans, self.generator)

    def _train_epoch(
        self, epoch: int, optimiser: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler
    ) -> None:
        loss = self.config.loss
        variances = Variances(self.variance, self._latent_variance())
        for rows in self._batches():
            pairs = None
            if loss.repulsion and len(self.pairs):
                chosen = torch.randint(len(self.pairs), (self.config.pair_rows,), generator=self.generator)
                pairs = (self.embeddings[self.pairs[chosen, 0]], self.embeddings[self.pairs[chosen, 1]])
            collaborative = None if self.collaborative is None else self.collaborative[rows]
            losses = self.model.losses(self.embeddings[rows], variances, loss, pairs=pairs, collaborative=collaborative)
            self._step(losses.total(loss), optimiser, schedule, f"epoch {epoch}")

    def _step(
        self,
        loss: Tensor,
        optimiser: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        place: str,
    ) -> None:
        if not bool(loss.isfinite()):
            msg = f"training stopped in {place}: the loss is {float(loss.detach())}; lower the learning rate"
            raise ValueError(msg)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()

    def _optimiser(self, epochs: int) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        optimiser = torch.optim.AdamW(self.model.parameters(), lr=self.config.learning_rate, weight_decay=0.0)
        steps = max(1, epochs * -(-len(self.training) // self.config.batch_rows))
        return optimiser, torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)

    def _batches(self) -> Iterator[Tensor]:
        """An epoch's row numbers: every row once, or as many rows drawn by weight."""
        rows = self.training
        if self.weighted:
            order = draw_rows(self.weights[rows], len(rows), self.generator)
        else:
            order = torch.randperm(len(rows), generator=self.generator)
        yield from rows[order].split(self.config.batch_rows)

    @torch.no_grad()
    def _latent_variance(self) -> float:
        """Of the training rows' latents, weighted as they are drawn."""
        latents = torch.cat([self.model.network(self.embeddings[rows]) for rows in self.training.split(CHUNK_ROWS)])
        share = (self.weights[self.training] / self.weights[self.training].sum())[:, None]
        centre = (latents * share).sum(dim=0)
        return float(((latents - centre).square() * share).sum().clamp_min(1e-12))

    @torch.no_grad()
    def _codes(self) -> Tensor:
        """Codes of all rows, (N, L)."""
        chunks = self.embeddings.split(CHUNK_ROWS)
        return torch.cat([self.model.quantizer.quantize(self.model.network(rows)).codes for rows in chunks])

    @torch.no_grad()
    def _reset_dead_codewords(self, codes: Tensor) -> int:
        """Move codewords that no training row chooses to residuals of their level; how many there were."""
        reset = 0
        for level, codebook in enumerate(self.model.quantizer.codebooks):
            used = torch.bincount(codes[self.training, level], minlength=len(codebook)) > 0
            if dead := int((~used).sum()):
                rows = self.training[draw_rows(self.weights[self.training], dead, self.generator)]
                quantization = self.model.quantizer.quantize(self.model.network(self.embeddings[rows]))
                codebook[~used] = quantization.residuals[:, level]
                reset += dead
        return reset

    def _measure(self, epoch: int, codes: Tensor, *, refitted: bool = False) -> Measure:
        rows = self.held_out if len(self.held_out) else self.training[:5_000]
        reconstruction, colliding = held_out_measures(
            self.model, self.embeddings, self.weights, codes, rows=rows, variance=self.variance
        )
        value = reconstruction + self.config.collision_price * colliding
        return Measure(epoch, refitted, reconstruction, colliding, value)


def _collaborative(collaborative: Tensor | None, config: LossConfig, items: int) -> Tensor | None:
    """Collaborative embeddings (N, c) less their mean, None where they do not count.

    Raises:
        ValueError: They count and are missing, or not N rows.
    """
    if not config.collaborative:
        return None
    if collaborative is None:
        raise ValueError("loss.collaborative is above 0, but there are no collaborative embeddings")
    if collaborative.ndim != 2 or len(collaborative) != items:
        raise ValueError(f"collaborative embeddings of {items:,} items expected, got {tuple(collaborative.shape)}")
    known = collaborative.isfinite().all(dim=1)
    if int(known.sum()) < 2:
        raise ValueError("fewer than 2 items have a collaborative embedding; there is nothing to contrast")
    return collaborative.float() - collaborative[known].float().mean(dim=0)


@torch.no_grad()
def held_out_measures(
    model: Trained, embeddings: Tensor, weights: Tensor, codes: Tensor, *, rows: Tensor, variance: float
) -> tuple[float, float]:
    """Reconstruction error of some rows as a share of the variance, and the share of them that collide with any row.

    Args:
        model: What is measured.
        embeddings: (N, D) float32.
        weights: (N,) float, what each row counts.
        codes: (N, L) int64, of all rows.
        rows: (n,) int64, the rows that are measured.
        variance: Of the embeddings, summed over features.
    """
    miss = (embeddings[rows] - model.decoder(model.quantizer.decode(codes[rows]))).square().sum(dim=1)
    share = weights[rows] / weights[rows].sum()
    _, inverse, counts = codes.unique(dim=0, return_inverse=True, return_counts=True)
    colliding = float(((counts[inverse[rows]] > 1) * share).sum())
    return float((miss * share).sum()) / variance, colliding


def colliding_pairs(codes: Tensor, rows: Tensor) -> Tensor:
    """Pairs (P, 2) of row numbers that share all their codes; of a group of n, neighbours in a random-free order.

    Args:
        codes: (n, L) int64.
        rows: (n,) int64, the row number of each.
    """
    group = codes.unique(dim=0, return_inverse=True)[1]
    order = group.argsort(stable=True)
    same = group[order][1:] == group[order][:-1]
    return torch.stack([rows[order][:-1][same], rows[order][1:][same]], dim=1)

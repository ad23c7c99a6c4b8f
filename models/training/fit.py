"""Fits an RQ-VAE to embeddings: a start, k-means initialisation of every level, joint training, early stopping.

Held-out rows decide when to stop. The measure is what a catalogue feels: the reconstruction error and, at a price,
the share of held-out items whose codes another item of the catalogue has as well.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from models.chunks import all_equal, code_keys, squared_distances, weighted_spread, weighted_sum
from models.network import NetworkConfig, start_linear
from models.training.codebooks import cluster_residuals
from models.training.history import INITIALISED, REFITTED, TRAINING, WARM_UP, EpochRecord, Measure
from models.training.kmeans import KMeansConfig
from models.training.projection import Centred, ProjectionConfig, draw_rows, projection
from models.training.rqvae import RQVAE, LossConfig, Variances
from models.training.spool import held, in_reading_order
from models.training.watch import Coded, LossMeans, Trained, coded, held_out_measures, level_records

CHUNK_ROWS = 8192

# Colliding pairs of an epoch, at most.
PAIRS = 2**20


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


def fit(
    embeddings: Tensor,
    config: FitConfig,
    weights: Tensor | None = None,
    collaborative: Tensor | None = None,
    spool: Path | None = None,
) -> Fit:
    """Train an RQ-VAE.

    Args:
        embeddings: (N, D) float32, finite.
        config: Hyper-parameters.
        weights: (N,) float, how often each row is drawn; equal where None.
        collaborative: (N, c) float32, each item's embedding from sequences, NaN where it has none; drawn on where
            `loss.collaborative` is above 0.
        spool: Where latents lie while they are clustered, where they are many; see `models.training.spool`.

    Raises:
        ValueError: There are too few rows, they are all equal, no objective has a weight or its data is missing, or a
            loss became NaN or infinite.
    """
    return _Fitting(embeddings, config, weights, collaborative, spool).run()


class _Fitting:
    """The state of one fit."""

    def __init__(
        self,
        embeddings: Tensor,
        config: FitConfig,
        weights: Tensor | None,
        collaborative: Tensor | None = None,
        spool: Path | None = None,
    ) -> None:
        if len(embeddings) < 2:
            msg = f"training needs at least 2 items, got {len(embeddings)}"
            raise ValueError(msg)
        config.loss.check()
        self.config = config
        self.spool = spool
        self.collaborative = _collaborative(collaborative, config.loss, len(embeddings))
        self.generator = torch.Generator().manual_seed(config.seed)
        if all_equal(embeddings):
            msg = f"training needs items that differ: all {len(embeddings):,} have the same embedding"
            raise ValueError(msg)
        self.embeddings = embeddings
        self.weighted = weights is not None
        self.weights = torch.ones(len(embeddings)) if weights is None else weights.float()
        order = torch.randperm(len(embeddings), generator=self.generator)
        held_out = min(5_000, round(config.held_out * len(embeddings)))
        self.held_out, self.training = order[:held_out], in_reading_order(order[held_out:], embeddings)
        share = self.weights / self.weights.sum()
        self.centre = weighted_sum(embeddings, share)
        self.variance = float((squared_distances(embeddings, self.centre) * share).sum().clamp_min(1e-12))
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
        self.records: list[EpochRecord] = []
        self.best: Measure
        self.best_state: Mapping[str, Tensor]
        self.coded: Coded

    def run(self) -> Fit:
        if self.config.start == "projection":
            self._project()
        self._warm_up()
        self._initialise()
        self._train()
        self.model.load_state_dict(self.best_state)
        if self.best.epoch:
            self._refit()
        return Fit(self.model.eval(), self.best, tuple(self.records), self.held_out)

    def _project(self) -> None:
        """Start the encoder network as the projection and the decoder network as its least-squares inverse."""
        rows = self.training
        down, up = projection(
            Centred(self.embeddings, rows, self.centre),
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
        self._start_optimiser(self.config.warm_up_epochs)
        with tqdm(range(1, self.config.warm_up_epochs + 1), desc="warm-up", unit="epoch", disable=None) as bar:
            for epoch in bar:
                began, means = time.monotonic(), LossMeans()
                for rows in self._batches():
                    batch = self._rows(rows)
                    rebuilt = self.model.decoder(self.model.network(batch))
                    loss = (batch - rebuilt).square().sum(dim=1).mean() / self.variance
                    losses = {"reconstruction": loss, "total": loss}
                    means.add(losses, self._step(losses, f"warm-up epoch {epoch}"), len(rows))
                self._record(EpochRecord(WARM_UP, epoch, time.monotonic() - began), means)
                bar.set_postfix(reconstruction=f"{self.records[-1].losses['reconstruction']:.3f}")

    def _initialise(self) -> None:
        """Cluster, unless the quantizer's state says that it has codebooks already; the first measurement."""
        began = time.monotonic()
        if not bool(self.model.quantizer.initialised):
            self._cluster_codebooks()
        self.coded = self._coded()
        self._keep(self._measured(INITIALISED, 0, began))

    def _train(self) -> None:
        """Joint training until the last epoch, or until the patience is at its end."""
        self._start_optimiser(self.config.epochs)
        with tqdm(range(1, self.config.epochs + 1), desc="training", unit="epoch", disable=None) as bar:
            for epoch in bar:
                began = time.monotonic()
                self.pairs = colliding_pairs(self.coded.codes[self.training], self.training)
                means = self._train_epoch(epoch)
                self.coded = self._coded()
                restarted = self._reset_dead_codewords(self.coded.codes)
                if any(restarted):
                    self.coded = self._coded()
                measure = self._measured(TRAINING, epoch, began, means, restarted)
                bar.set_postfix(reconstruction=f"{measure.reconstruction:.3f}", colliding=f"{measure.colliding:.2%}")
                if measure.value < self.best.value:
                    self._keep(measure)
                if epoch - self.best.epoch >= self.config.patience:
                    break

    def _refit(self) -> None:
        """Cluster the codebooks of the best epoch anew, kept where the measure says so.

        Joint training moves the encoder network away from the codebooks; k-means on what it became uses them evenly
        again.
        """
        began = time.monotonic()
        self._cluster_codebooks()
        self.coded = self._coded()
        measure = self._measured(REFITTED, self.best.epoch, began)
        if measure.value <= self.best.value:
            self.best = measure
        else:
            self.model.load_state_dict(self.best_state)

    @torch.no_grad()
    def _cluster_codebooks(self) -> None:
        """k-means of what each level receives, on all training rows."""
        chunks = self.training.split(CHUNK_ROWS)
        parts = (self.model.network(self.embeddings[rows]) for rows in chunks)
        latents = held(parts, len(self.training), self.config.latent, self.spool)
        weights = self.weights[self.training]
        cluster_residuals(self.model.quantizer, latents, weights, self.config.kmeans, self.generator, spool=self.spool)

    def _train_epoch(self, epoch: int) -> LossMeans:
        loss = self.config.loss
        variances = Variances(self.variance, self._latent_variance())
        means = LossMeans()
        for rows in self._batches():
            pairs = None
            if loss.repulsion and len(self.pairs):
                chosen = self.pairs[torch.randint(len(self.pairs), (self.config.pair_rows,), generator=self.generator)]
                pairs = (self._rows(chosen[:, 0]), self._rows(chosen[:, 1]))
            collaborative = None if self.collaborative is None else self.collaborative[rows]
            losses = self.model.losses(self._rows(rows), variances, loss, pairs=pairs, collaborative=collaborative)
            # A term that counts nothing is not computed.
            terms = {name: term for name, term in losses._asdict().items() if getattr(loss, name)}
            terms["total"] = losses.total(loss)
            means.add(terms, self._step(terms, f"epoch {epoch}"), len(rows))
        return means

    def _step(self, losses: Mapping[str, Tensor], place: str) -> Tensor:
        """Follow the gradient of the total loss; the gradient's norm, () float."""
        loss = losses["total"]
        if not bool(loss.isfinite()):
            msg = f"training stopped in {place}: the loss is {float(loss.detach())}; lower the learning rate"
            raise ValueError(msg)
        self.optimiser.zero_grad()
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        self.optimiser.step()
        self.schedule.step()
        return norm

    def _start_optimiser(self, epochs: int) -> None:
        self.optimiser: torch.optim.Optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=self.config.learning_rate, weight_decay=0.0
        )
        steps = max(1, epochs * -(-len(self.training) // self.config.batch_rows))
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimiser, steps)

    def _rows(self, rows: Tensor) -> Tensor:
        """Embeddings (n, D) float32 of row numbers (n,), where the model is."""
        return self.embeddings[rows]

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
        parts = (self.model.network(self.embeddings[rows]) for rows in self.training.split(CHUNK_ROWS))
        latents = held(parts, len(self.training), self.config.latent, self.spool)
        share = self.weights[self.training] / self.weights[self.training].sum()
        return float(weighted_spread(latents, weighted_sum(latents, share), share).clamp_min(1e-12))

    def _coded(self) -> Coded:
        """All rows as the model codes them now."""
        return coded(self.model, self.embeddings, self._training_weights())

    def _training_weights(self) -> Tensor:
        """What each row counts (N,), 0 where it is held out."""
        return self.weights.index_fill(0, self.held_out, 0.0)

    @torch.no_grad()
    def _reset_dead_codewords(self, codes: Tensor) -> tuple[int, ...]:
        """Move codewords that no training row chooses to residuals of their level; how many there were in each."""
        reset = []
        for level, codebook in enumerate(self.model.quantizer.codebooks):
            used = torch.bincount(codes[self.training, level], minlength=len(codebook)) > 0
            if dead := int((~used).sum()):
                rows = self.training[draw_rows(self.weights[self.training], dead, self.generator)]
                quantization = self.model.quantizer.quantize(self.model.network(self._rows(rows)))
                codebook[~used] = quantization.residuals[:, level]
            reset.append(dead)
        return tuple(reset)

    def _measured(
        self, stage: str, epoch: int, began: float, means: LossMeans | None = None, restarted: tuple[int, ...] = ()
    ) -> Measure:
        """Measure the model as `self.coded` codes the rows, and write down what happened since `began`."""
        measure = self._measure(epoch, self.coded.codes, refitted=stage == REFITTED)
        levels = level_records(self.coded, self.config.codebook_sizes, self._training_weights(), restarted)
        self._record(EpochRecord(stage, epoch, time.monotonic() - began, held_out=measure, levels=levels), means)
        return measure

    def _record(self, record: EpochRecord, means: LossMeans | None) -> None:
        """Write down an epoch, or a clustering where there are no losses."""
        if means:
            rate = float(self.schedule.get_last_lr()[0])
            record = replace(record, losses=means.as_dict(), learning_rate=rate, gradient_norm=means.gradient_norm)
        self.records.append(record)

    def _keep(self, measure: Measure) -> None:
        """The state that was measured is the best so far."""
        self.best, self.best_state = measure, copy.deepcopy(self.model.state_dict())

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


def colliding_pairs(codes: Tensor, rows: Tensor) -> Tensor:
    """Pairs (P, 2) of row numbers that share all their codes; of a group of n, neighbours in a random-free order.

    Where there are more than `PAIRS`, each second, third, ... of them.

    Args:
        codes: (n, L) int64.
        rows: (n,) int64, the row number of each.
    """
    group = code_keys(codes)
    order = group.argsort(stable=True)
    ordered = group[order]
    same = (ordered[1:] == ordered[:-1]).nonzero().flatten()
    same = same[:: -(-len(same) // PAIRS) or 1]
    return torch.stack([rows[order[same]], rows[order[same + 1]]], dim=1)

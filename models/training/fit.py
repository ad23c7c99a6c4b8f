"""Fits an RQ-VAE to embeddings: a start, k-means initialisation of every level, joint training, early stopping.

Held-out rows decide when to stop. The measure is what a catalogue feels: the reconstruction error and, at a price,
the share of held-out items whose codes another item of the catalogue has as well.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from models.chunks import all_equal, squared_distances, weighted_spread, weighted_sum
from models.network import NetworkConfig, start_linear
from models.quantizer import Quantization
from models.training.codebooks import cluster_residuals
from models.training.descent import Batch, Descent, DivergedError, reason, useless_epoch
from models.training.fit_config import FitConfig
from models.training.history import INITIALISED, NOTHING_YET, REFITTED, TRAINING, WARM_UP, EpochRecord, Measure
from models.training.objectives import centred, cluster_codewords, mean_contrast, missed_reconstructions
from models.training.progress import Progress
from models.training.projection import Centred, draw_rows, projection
from models.training.resume import Snapshot
from models.training.rqvae import RQVAE, Variances
from models.training.run import Run, stage_words
from models.training.spool import held, in_reading_order
from models.training.watch import (
    Coded,
    Fit,
    LossMeans,
    coded,
    colliding_pairs,
    held_out_measures,
    held_out_rows,
    level_records,
)

CHUNK_ROWS = 8192


def fit(
    embeddings: Tensor,
    config: FitConfig,
    weights: Tensor | None = None,
    collaborative: Tensor | None = None,
    spool: Path | None = None,
    *,
    run: Run | None = None,
) -> Fit:
    """Train an RQ-VAE.

    Args:
        embeddings: (N, D) float32, finite.
        config: Hyper-parameters.
        weights: (N,) float, how often each row is drawn; equal where None.
        collaborative: (N, c) float32, each item's embedding from sequences, NaN where it has none; drawn on where
            `loss.collaborative` is above 0.
        spool: Where latents lie while they are clustered, where they are many; see `models.training.spool`.
        run: Where it runs, what it tells, where it keeps its state; on the CPU, silent and keeping none where None.

    Returns:
        The fit, on the CPU in float32.

    Raises:
        ValueError: There are too few rows, they are all equal or too large for float32, no objective has a weight or
            its data is missing, the state is another training's, or a loss became NaN or infinite.
        OSError: The state cannot be kept.
    """
    return _Fitting(embeddings, config, weights, collaborative, spool, run=run).run()


class _Fitting:
    """The state of one fit."""

    def __init__(
        self,
        embeddings: Tensor,
        config: FitConfig,
        weights: Tensor | None = None,
        collaborative: Tensor | None = None,
        spool: Path | None = None,
        *,
        run: Run | None = None,
    ) -> None:
        if len(embeddings) < 2:
            msg = f"training needs at least 2 items, got {len(embeddings)}"
            raise ValueError(msg)
        config.check(embeddings.shape[1])
        self.config = config
        ema = config.ema if config.codebooks == "ema" else None
        self.loss = replace(config.loss, codebook=0.0) if ema else config.loss
        self.spool = spool
        self.collaborative = centred(collaborative, len(embeddings)) if config.loss.collaborative else None
        self.generator = torch.Generator().manual_seed(config.seed)
        if all_equal(embeddings):
            msg = f"training needs items that differ: all {len(embeddings):,} have the same embedding"
            raise ValueError(msg)
        self.embeddings = embeddings
        self.weighted = weights is not None
        self.weights = torch.ones(len(embeddings)) if weights is None else weights.float()
        order = torch.randperm(len(embeddings), generator=self.generator)
        held_out = held_out_rows(len(embeddings), config.held_out)
        self.held_out, self.training = order[:held_out].clone(), in_reading_order(order[held_out:], embeddings)
        share = self.weights / self.weights.sum()
        self.centre = weighted_sum(embeddings, share)
        self.variance = float((squared_distances(embeddings, self.centre) * share).sum().clamp_min(1e-12))
        if not math.isfinite(self.variance):
            raise ValueError(f"the variance of the embeddings is {self.variance}: not finite, or too large for float32")
        # Seeded here, so that the modules' random weights are the seed's and nobody else's state is touched.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.model = RQVAE(
                NetworkConfig((embeddings.shape[1], *config.hidden, config.latent)),
                config.codebook_sizes,
                collaborative_width=None if self.collaborative is None else self.collaborative.shape[1],
                ema=ema,
            )
        if config.networks == "fixed":
            self.model.network.requires_grad_(requires_grad=False)
            self.model.decoder.requires_grad_(requires_grad=False)
        self.model.network.centre.copy_(self.centre)
        self.model.decoder.centre.copy_(self.centre)
        self.pairs = torch.empty(0, 2, dtype=torch.int64)
        self.how = run or Run()
        self.progress = self.how.progress or Progress(lambda _: None, terminal=False)
        self.model.bf16 = self.how.bf16
        self.stage, self.epoch = WARM_UP, 0
        self.records: list[EpochRecord] = []
        self.best, self.best_state = NOTHING_YET, dict[str, Tensor]()
        self.good: Snapshot
        self.coded: Coded
        self.clusters: list[Tensor] | None = None
        self.chosen: Quantization

    def run(self) -> Fit:
        """Fit, from the start or from the state that was kept."""
        kept = self.how.state.read() if self.how.state else None
        if kept is None and self.config.start != "random":
            self._project()
        self.model.to(self.how.device)
        if kept:
            self._go_on(kept)
        else:
            self._begin(WARM_UP)
        try:
            if self.stage == WARM_UP:
                self._warm_up()
                self._initialise()
                self._begin(TRAINING)
            self._train()
        except DivergedError as error:
            raise ValueError(self._reason(error)) from error
        self.model.load_state_dict(self.best_state)
        if self.best.epoch and self.config.networks == "learned":
            self._refit()
        return Fit(self.model.cpu().eval(), self.best, tuple(self.records), self.held_out)

    def _begin(self, stage: str) -> None:
        """Begin a stage, with an optimiser of its own."""
        self.stage, self.epoch = stage, 0
        self._start_descent()
        self._keep_state()

    def _start_descent(self) -> None:
        steps = self._epochs * -(-len(self.training) // self.config.batch_rows)
        self.descent = Descent(self.model, self.config.learning_rate, steps)

    def _go_on(self, kept: Snapshot) -> None:
        """Go on from a state: it holds all that the epochs to come depend on."""
        self.stage, self.epoch, self.records = kept.stage, kept.epoch, list(kept.records)
        self._start_descent()
        self.model.load_state_dict(kept.model)
        self.descent.load(kept.optimiser, kept.schedule)
        self.generator.set_state(kept.generator)
        self.best, self.best_state = kept.best or NOTHING_YET, dict(kept.best_state)
        self.good = kept
        if self.stage == TRAINING:
            self.coded = self._coded()

    @property
    def _epochs(self) -> int:
        """Of the stage, at most."""
        return self.config.warm_up_epochs if self.stage == WARM_UP else self.config.epochs

    def _project(self) -> None:
        """Start the encoder network as a linear map and the decoder network as its least-squares inverse."""
        rows = self.training
        down = up = torch.eye(self.config.latent)
        if self.config.start == "projection":
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
        self.progress.begin(WARM_UP, self._epochs, self.epoch)
        while self.epoch < self._epochs:
            began, means = time.monotonic(), LossMeans()
            for rows in self._batches():
                batch = self._rows(rows)
                self.descent.step(Batch(rows, batch, partial(self._warm_up_losses, batch)), means)
            self.epoch += 1
            self._record(EpochRecord(WARM_UP, self.epoch, time.monotonic() - began), means)
            self._end_epoch()

    def _initialise(self) -> None:
        """Cluster, unless the quantizer's state says that it has codebooks already; the first measurement."""
        began = time.monotonic()
        if not bool(self.model.quantizer.initialised):
            self._cluster_codebooks(self._some(self.config.start_rows) if self.config.start_rows else None)
        self.coded = self._coded()
        self._start_running()
        self._keep(self._measured(INITIALISED, 0, began))

    def _train(self) -> None:
        """Joint training until the last epoch, or until the patience is at its end."""
        self.progress.begin(TRAINING, self._epochs, self.epoch)
        while self.epoch < self._epochs and not 0 < self.epoch >= self.best.epoch + self.config.patience:
            began, means = time.monotonic(), LossMeans()
            if self.loss.repulsion:
                self.pairs = colliding_pairs(self.coded.codes[self.training], self.training)
            variances = Variances(self.variance, self._latent_variance())
            self.clusters = self._clusters()
            for rows in self._batches():
                self.descent.step(self._batch(rows, variances), means)
                if self.model.running:
                    self.model.running.follow(self.model.quantizer.codebooks, self.chosen)
            if not self.loss.reconstruction:
                self.model.scale_decoder(self._rows(self._some(CHUNK_ROWS)))
            self.coded = self._coded()
            restarted = self._reset_dead_codewords(self.coded.codes)
            if any(restarted):
                self.coded = self._coded()
            self.epoch += 1
            measure = self._measured(TRAINING, self.epoch, began, means, restarted)
            if not math.isfinite(measure.value):
                raise ValueError(self.how.keep(self.good, useless_epoch(measure)))
            if measure.value < self.best.value:
                self._keep(measure)
            self._end_epoch()
        self.progress.end()

    def _end_epoch(self) -> None:
        self.progress.show(self.records[-1], self.best if self.best_state else None)
        self._keep_state()

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

    def _some(self, count: int) -> Tensor:
        """So many training rows at most, drawn at random, in the order in which they are read."""
        return self.training[torch.randperm(len(self.training), generator=self.generator)[:count].sort().values]

    def _start_running(self) -> None:
        """Running means start as the codebooks are, and as often as training rows chose them."""
        if self.model.running:
            for level, codebook in enumerate(self.model.quantizer.codebooks):
                counts = torch.bincount(self.coded.codes[self.training, level], minlength=len(codebook))
                self.model.running.start(level, codebook, counts, self.config.batch_rows)

    def _clusters(self) -> list[Tensor] | None:
        """Each level's codewords in clusters, where the diversity counts."""
        if not self.loss.diversity:
            return None
        codebooks, clusters = self.model.quantizer.codebooks, self.loss.diversity_clusters
        return [cluster_codewords(codebook, clusters, self.generator) for codebook in codebooks]

    @torch.no_grad()
    def _cluster_codebooks(self, some: Tensor | None = None) -> None:
        """k-means of what each level receives of all training rows, or of some, given by their numbers."""
        training = self.training if some is None else some
        parts = (self.model.network(self._rows(rows)).cpu() for rows in training.split(CHUNK_ROWS))
        latents = held(parts, len(training), self.config.latent, self.spool)
        weights = self.weights[training]
        # On the CPU, where the latents of any number of rows may lie on disk.
        quantizer = self.model.quantizer.cpu()
        cluster_residuals(quantizer, latents, weights, self.config.kmeans, self.generator, spool=self.spool)
        quantizer.to(self.how.device)

    def _warm_up_losses(self, batch: Tensor) -> dict[str, Tensor]:
        rebuilt = self.model.rebuilt(self.model.latents(batch))
        loss = (batch - rebuilt).square().sum(dim=1).mean() / self.variance
        return {"reconstruction": loss, "total": loss}

    def _batch(self, rows: Tensor, variances: Variances) -> Batch:
        """A batch of joint training, with the pairs drawn for it."""
        pairs = None
        if self.config.loss.repulsion and len(self.pairs):
            chosen = self.pairs[torch.randint(len(self.pairs), (self.config.pair_rows,), generator=self.generator)]
            pairs = (self._rows(chosen[:, 0]), self._rows(chosen[:, 1]))
        collaborative = None if self.collaborative is None else self.collaborative[rows].to(self.how.device)
        batch = self._rows(rows)
        return Batch(rows, batch, partial(self._losses, batch, variances, pairs, collaborative))

    def _losses(
        self,
        batch: Tensor,
        variances: Variances,
        pairs: tuple[Tensor, Tensor] | None,
        collaborative: Tensor | None,
    ) -> dict[str, Tensor]:
        """The losses of a batch that count anything, and "total", what is minimised."""
        output = self.model(batch)
        self.chosen = output.quantization
        losses = self.model.losses(
            batch,
            variances,
            self.loss,
            pairs=pairs,
            collaborative=collaborative,
            clusters=self.clusters,
            output=output,
        )
        terms = {name: term for name, term in losses._asdict().items() if getattr(self.loss, name)}
        return {**terms, "total": losses.total(self.loss)}

    def _reason(self, error: DivergedError) -> str:
        """Why there is no going on; the state of the last good epoch is kept."""
        place = f"{stage_words(self.stage)} {self.epoch + 1}"
        return self.how.keep(self.good, reason(place, error.step, self.model, self.good.model))

    def _keep_state(self) -> None:
        """Remember the state after this epoch, and let it be written where that is due."""
        optimiser, schedule = self.descent.state()
        self.good = Snapshot(
            stage=self.stage,
            epoch=self.epoch,
            model=copy.deepcopy(self.model.state_dict()),
            optimiser=optimiser,
            schedule=schedule,
            generator=self.generator.get_state(),
            best=self.best if self.best_state else None,
            best_state=self.best_state,
            records=tuple(self.records),
        )
        if self.how.state:
            self.how.state.offer(self.good)

    def _rows(self, rows: Tensor) -> Tensor:
        """Embeddings (n, D) float32 of row numbers (n,), where the model is."""
        batch = self.embeddings[rows]
        return batch.pin_memory().to(self.how.device, non_blocking=True) if self.how.device.type == "cuda" else batch

    def _batches(self) -> Iterator[Tensor]:
        """An epoch's row numbers: every row once, or as many rows drawn by weight."""
        rows = self.training
        if self.weighted:
            order = draw_rows(self.weights[rows], len(rows), self.generator)
        else:
            order = torch.randperm(len(rows), generator=self.generator)
        yield from (rows[part] for part in order.split(self.config.batch_rows))

    @torch.no_grad()
    def _latent_variance(self) -> float:
        """Of the training rows' latents, weighted as they are drawn."""
        parts = (self.model.network(self._rows(rows)).cpu() for rows in self.training.split(CHUNK_ROWS))
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
                codebook[(~used).to(codebook.device)] = quantization.residuals[:, level]
                if self.model.running:
                    self.model.running.restart(level, (~used).to(codebook.device), codebook)
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
            rate = self.descent.learning_rate
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
        value = self.config.collision_price * colliding + (reconstruction if self.loss.reconstruction else 0.0)
        missed = None
        if self.loss.contrastive:
            missed = missed_reconstructions(self.model, self._rows(rows), codes[rows].long())
            value += missed
        collaborative = None
        if self.collaborative is not None:
            quantized = self.model.alignment(self.model.quantizer.decode(codes[rows].long().to(self.how.device)))
            collaborative = mean_contrast(quantized, self.collaborative[rows], self.loss.collaborative_temperature)
            value += self.loss.collaborative * collaborative
        return Measure(epoch, refitted, reconstruction, colliding, value, missed, collaborative)

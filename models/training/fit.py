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

from models.chunks import weighted_spread, weighted_sum
from models.network import NetworkConfig, start_linear
from models.quantizer import Quantization
from models.training.descent import Batch, Descent, DivergedError, reason, useless_epoch
from models.training.fit_config import FitConfig
from models.training.history import INITIALISED, NOTHING_YET, REFITTED, TRAINING, WARM_UP, EpochRecord, Measure
from models.training.objectives import centred, mean_contrast, missed_reconstructions
from models.training.progress import Progress
from models.training.projection import Centred, draw_rows, projection
from models.training.resume import Snapshot
from models.training.rows import drawn_rows
from models.training.rqvae import RQVAE, Variances
from models.training.run import Run, stage_words
from models.training.upkeep import CodebookUpkeep
from models.training.watch import (
    Coded,
    Fit,
    LossMeans,
    coded,
    colliding_pairs,
    held_out_measures,
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
        config.check(embeddings.shape[1])
        self.config = config
        ema = config.ema if config.codebooks == "ema" else None
        self.loss = replace(config.loss, codebook=0.0) if ema else config.loss
        self.collaborative = centred(collaborative, len(embeddings)) if config.loss.collaborative else None
        self.generator = torch.Generator().manual_seed(config.seed)
        self.weighted = weights is not None
        self.rows = drawn_rows(embeddings, weights, config.held_out, self.generator)
        self.training = self.rows.training
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
        self.model.network.centre.copy_(self.rows.centre)
        self.model.decoder.centre.copy_(self.rows.centre)
        self.pairs = torch.empty(0, 2, dtype=torch.int64)
        self.how = run or Run()
        self.progress = self.how.progress or Progress(lambda _: None, terminal=False)
        self.model.bf16 = self.how.bf16
        self.codebooks = CodebookUpkeep(
            self.model, self.rows, config, self.generator, device=self.how.device, spool=spool
        )
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
        return Fit(self.model.cpu().eval(), self.best, tuple(self.records), self.rows.held_out)

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
                Centred(self.rows.embeddings, rows, self.rows.centre),
                self.rows.weights[rows],
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
            self.codebooks.cluster(self.codebooks.some(self.config.start_rows) if self.config.start_rows else None)
        self.coded = self._coded()
        self.codebooks.start_running(self.coded.codes)
        self._keep(self._measured(INITIALISED, 0, began))

    def _train(self) -> None:
        """Joint training until the last epoch, or until the patience is at its end."""
        self.progress.begin(TRAINING, self._epochs, self.epoch)
        while self.epoch < self._epochs and not 0 < self.epoch >= self.best.epoch + self.config.patience:
            began, means = time.monotonic(), LossMeans()
            if self.loss.repulsion:
                self.pairs = colliding_pairs(self.coded.codes[self.training], self.training)
            variances = Variances(self.rows.variance, self._latent_variance())
            self.clusters = self.codebooks.clusters()
            for rows in self._batches():
                self.descent.step(self._batch(rows, variances), means)
                if self.model.running:
                    self.model.running.follow(self.model.quantizer.codebooks, self.chosen)
            if not self.loss.reconstruction:
                self.model.scale_decoder(self._rows(self.codebooks.some(CHUNK_ROWS)))
            self.coded = self._coded()
            restarted = self.codebooks.restart_dead(self.coded.codes)
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
        self.codebooks.cluster()
        self.coded = self._coded()
        measure = self._measured(REFITTED, self.best.epoch, began)
        if measure.value <= self.best.value:
            self.best = measure
        else:
            self.model.load_state_dict(self.best_state)

    def _warm_up_losses(self, batch: Tensor) -> dict[str, Tensor]:
        rebuilt = self.model.rebuilt(self.model.latents(batch))
        loss = (batch - rebuilt).square().sum(dim=1).mean() / self.rows.variance
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
        return self.rows.batch(rows, self.how.device)

    def _batches(self) -> Iterator[Tensor]:
        """An epoch's row numbers: every row once, or as many rows drawn by weight."""
        rows = self.training
        if self.weighted:
            order = draw_rows(self.rows.weights[rows], len(rows), self.generator)
        else:
            order = torch.randperm(len(rows), generator=self.generator)
        yield from (rows[part] for part in order.split(self.config.batch_rows))

    def _latent_variance(self) -> float:
        """Of the training rows' latents, weighted as they are drawn."""
        latents = self.codebooks.latents()
        share = self.rows.weights[self.training] / self.rows.weights[self.training].sum()
        return float(weighted_spread(latents, weighted_sum(latents, share), share).clamp_min(1e-12))

    def _coded(self) -> Coded:
        """All rows as the model codes them now."""
        return coded(self.model, self.rows.embeddings, self.rows.counting)

    def _measured(
        self, stage: str, epoch: int, began: float, means: LossMeans | None = None, restarted: tuple[int, ...] = ()
    ) -> Measure:
        """Measure the model as `self.coded` codes the rows, and write down what happened since `began`."""
        measure = self._measure(epoch, self.coded.codes, refitted=stage == REFITTED)
        levels = level_records(self.coded, self.config.codebook_sizes, self.rows.counting, restarted)
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
        rows = self.rows.measured
        reconstruction, colliding = held_out_measures(self.model, self.rows, codes)
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

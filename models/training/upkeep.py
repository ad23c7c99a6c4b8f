"""What is done to the codebooks of an RQ-VAE around its epochs: clustered, restarted, averaged, grouped."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from models.training.codebooks import cluster_residuals
from models.training.fit_config import FitConfig
from models.training.objectives import cluster_codewords
from models.training.projection import draw_rows
from models.training.rows import Rows
from models.training.rqvae import RQVAE
from models.training.spool import held

CHUNK_ROWS = 8192


class CodebookUpkeep:
    """Keeps the codebooks of a model that is being trained.

    Args:
        model: The RQ-VAE.
        rows: What it is trained on.
        config: Hyper-parameters.
        generator: Of everything drawn.
        device: Where the model is.
        spool: Where latents lie while they are clustered, where they are many.
    """

    def __init__(
        self,
        model: RQVAE,
        rows: Rows,
        config: FitConfig,
        generator: torch.Generator,
        *,
        device: torch.device,
        spool: Path | None,
    ) -> None:
        self._model = model
        self._rows = rows
        self._config = config
        self._generator = generator
        self._device = device
        self._spool = spool

    @torch.no_grad()
    def latents(self, rows: Tensor | None = None) -> Tensor:
        """Latents (n, d) float32 on the CPU, of all training rows or of those numbered (n,)."""
        rows = self._rows.training if rows is None else rows
        chunks = (self._rows.batch(chunk, self._device) for chunk in rows.split(CHUNK_ROWS))
        parts = (self._model.network(chunk).cpu() for chunk in chunks)
        return held(parts, len(rows), self._config.latent, self._spool)

    def some(self, count: int) -> Tensor:
        """So many training rows at most, drawn at random, in the order in which they are read."""
        training = self._rows.training
        return training[torch.randperm(len(training), generator=self._generator)[:count].sort().values]

    @torch.no_grad()
    def cluster(self, some: Tensor | None = None) -> None:
        """k-means of what each level receives of all training rows, or of some, given by their numbers."""
        latents = self.latents(some)
        weights = self._rows.weights[self._rows.training if some is None else some]
        # On the CPU, where the latents of any number of rows may lie on disk.
        quantizer = self._model.quantizer.cpu()
        cluster_residuals(quantizer, latents, weights, self._config.kmeans, self._generator, spool=self._spool)
        quantizer.to(self._device)

    def start_running(self, codes: Tensor) -> None:
        """Running means start as the codebooks are, and as often as training rows chose them; codes (N, L) of all."""
        if self._model.running:
            for level, codebook in enumerate(self._model.quantizer.codebooks):
                counts = torch.bincount(codes[self._rows.training, level], minlength=len(codebook))
                self._model.running.start(level, codebook, counts, self._config.batch_rows)

    @torch.no_grad()
    def restart_dead(self, codes: Tensor) -> tuple[int, ...]:
        """Move codewords that no training row chooses to residuals of their level; how many there were in each.

        Args:
            codes: (N, L) int, of all rows as the model codes them now.
        """
        training, weights = self._rows.training, self._rows.weights
        restarted = []
        for level, codebook in enumerate(self._model.quantizer.codebooks):
            used = torch.bincount(codes[training, level], minlength=len(codebook)) > 0
            if dead := int((~used).sum()):
                rows = training[draw_rows(weights[training], dead, self._generator)]
                quantization = self._model.quantizer.quantize(self._model.network(self._rows.batch(rows, self._device)))
                codebook[(~used).to(codebook.device)] = quantization.residuals[:, level]
                if self._model.running:
                    self._model.running.restart(level, (~used).to(codebook.device), codebook)
            restarted.append(dead)
        return tuple(restarted)

    def clusters(self) -> list[Tensor] | None:
        """Each level's codewords in clusters, where the diversity counts."""
        if not self._config.loss.diversity:
            return None
        codebooks, clusters = self._model.quantizer.codebooks, self._config.loss.diversity_clusters
        return [cluster_codewords(codebook, clusters, self._generator) for codebook in codebooks]

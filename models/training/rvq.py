"""`r-vq`: residual vector quantization whose codebooks are learned batch by batch, without a learned encoder.

The encoder network is the centred identity, or with `latent` the projection to so many principal components, and stays
as it is. Every level learns to rebuild what it receives, either by running means (`codebooks="ema"`: van den Oord et
al., 2017; residual in SoundStream: Zeghidour et al., 2021) or by the gradient of

    sum_l |sg[r_l] - e_l|^2 / V_z

with r_l the residual that level l receives and e_l its codeword (R-VQ: van Balen and Levy, PQ-VAE, 2019). Where
residual k-means looks at all rows in each of its iterations, this looks at a batch in each step: codebooks start as
k-means of some rows, dead codewords restart, and held-out rows choose the epoch. It is the RQ-VAE's training with the
networks held.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from models.training.ema import EMAConfig
from models.training.fit_config import FitConfig
from models.training.kmeans import KMeansConfig
from models.training.projection import ProjectionConfig
from models.training.rqvae import LossConfig


@dataclass(frozen=True)
class RVQConfig:
    """Hyper-parameters of `r-vq`.

    Attributes:
        codebook_sizes: K_l for each level.
        latent: d, so many principal components; 0: the embeddings themselves.
        codebooks: "ema" or "gradient".
        ema: How fast running means follow.
        start_rows: Rows, drawn at random, on which the codebooks are clustered at the start; 0: all of them.
        epochs: At most; 0 keeps the start.
        batch_rows: Rows of a step.
        learning_rate: Of "gradient": AdamW's, falling to 0 along a cosine.
        held_out: Share of the rows that are not trained on, 5,000 at most.
        collision_price: c of the measure `reconstruction error + c x share of held-out items that collide`.
        patience: Stop after so many epochs without a better measurement.
        projection: How the components are chosen; principal ones by default.
        kmeans: Of the start.
        seed: Of everything drawn.
    """

    codebook_sizes: tuple[int, ...] = (256, 256, 256, 256)
    latent: int = 0
    codebooks: str = "ema"
    ema: EMAConfig = field(default_factory=EMAConfig)
    start_rows: int = 16_384
    epochs: int = 30
    batch_rows: int = 1024
    learning_rate: float = 1e-3
    held_out: float = 0.05
    collision_price: float = 0.0
    patience: int = 10
    projection: ProjectionConfig = field(default_factory=lambda: ProjectionConfig(local=0.0, whitening=0.0))
    kmeans: KMeansConfig = field(default_factory=KMeansConfig)
    seed: int = 0

    @property
    def stopped_on(self) -> str:
        """The measure that chooses the epoch, in words."""
        return self.training(1).stopped_on

    def training(self, width: int) -> FitConfig:
        """The training of an RQ-VAE on embeddings of that width which does just this."""
        return FitConfig(
            codebook_sizes=self.codebook_sizes,
            latent=self.latent or width,
            hidden=(),
            start="projection" if self.latent else "identity",
            networks="fixed",
            start_rows=self.start_rows,
            epochs=self.epochs,
            batch_rows=self.batch_rows,
            learning_rate=self.learning_rate,
            loss=LossConfig(codebook=1.0, commitment=0.0, repulsion=0.0),
            codebooks=self.codebooks,
            ema=self.ema,
            held_out=self.held_out,
            collision_price=self.collision_price,
            patience=self.patience,
            projection=self.projection,
            kmeans=self.kmeans,
            seed=self.seed,
        )

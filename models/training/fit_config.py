"""The hyper-parameters of a fit, and what chooses its best epoch."""

from __future__ import annotations

from dataclasses import dataclass, field

from models.training.ema import EMAConfig
from models.training.kmeans import KMeansConfig
from models.training.projection import ProjectionConfig
from models.training.rqvae import LossConfig


@dataclass(frozen=True)
class FitConfig:
    """Hyper-parameters of a fit.

    Attributes:
        codebook_sizes: K_l for each level.
        latent: d.
        hidden: Widths between D and d; none: a linear encoder network.
        start: "projection": the networks start as the linear map of `projection`, an MLP too, which hidden widths of
            at least 2 d allow; "identity": as the identity, where d is D; "random": as torch draws them.
        networks: "learned", or "fixed": they stay as they start.
        start_rows: Rows, drawn at random, on which the codebooks are clustered at the start; 0: all of them.
        warm_up_epochs: Of the plain autoencoder, before there are codebooks.
        epochs: Of joint training at most; 0 keeps the k-means solution.
        batch_rows: Rows of a step.
        pair_rows: Colliding pairs of a step, where the repulsion counts.
        learning_rate: Of AdamW; falls to 0 along a cosine.
        loss: What each loss counts.
        codebooks: "gradient": learned from the codebook loss; "ema": running means of what they receive, see
            `models.training.ema`, and the codebook loss counts nothing.
        ema: How fast they follow.
        held_out: Share of the rows that are not trained on, 5,000 at most.
        collision_price: c of `stopped_on`.
        patience: Stop after so many measurements without a better one; an epoch each.
        projection: The linear start.
        kmeans: Of the initialisation.
        seed: Of everything drawn.
    """

    codebook_sizes: tuple[int, ...] = (256, 256, 256, 256)
    latent: int = 24
    hidden: tuple[int, ...] = (512,)
    start: str = "projection"
    networks: str = "learned"
    start_rows: int = 0
    warm_up_epochs: int = 0
    epochs: int = 30
    batch_rows: int = 1024
    pair_rows: int = 256
    learning_rate: float = 1e-3
    loss: LossConfig = field(default_factory=LossConfig)
    codebooks: str = "gradient"
    ema: EMAConfig = field(default_factory=EMAConfig)
    held_out: float = 0.05
    collision_price: float = 4.0
    patience: int = 20
    projection: ProjectionConfig = field(default_factory=ProjectionConfig)
    kmeans: KMeansConfig = field(default_factory=KMeansConfig)
    seed: int = 0

    @property
    def stopped_on(self) -> str:
        """The measure that chooses the epoch, in words: what is trained for, and what a catalogue feels."""
        terms = ["held-out reconstruction error"] if self.loss.reconstruction else []
        if self.loss.contrastive:
            terms.append("share of held-out items whose reconstruction points nearer to another one's embedding")
        if self.loss.collaborative:
            terms.append("loss.collaborative x contrast of held-out items with their collaborative embeddings")
        return " + ".join([*terms, "collision_price x share of held-out items that share all codes"])

    def check(self, width: int | None = None) -> None:
        """Refuse settings that do not go together.

        Args:
            width: D, where it is known.

        Raises:
            ValueError: Says which.
        """
        choices = {"start": ("projection", "identity", "random"), "networks": ("learned", "fixed")}
        for name, known in {**choices, "codebooks": ("gradient", "ema")}.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is one of {', '.join(known)}, not {getattr(self, name)!r}")
        if self.start == "identity" and width not in (None, self.latent):
            raise ValueError(f'start="identity" needs a latent of {width} numbers, not {self.latent}')
        if self.codebooks == "ema" and self.loss.diversity:
            raise ValueError("loss.diversity moves codebooks by gradient; it needs codebooks=gradient, not ema")
        if self.codebooks == "ema":
            self.ema.check()
        self.loss.check()

"""RQ-VAE: encoder network, residual quantizer and decoder network trained together (Lee et al., CVPR 2022; TIGER).

Every loss is a share of a variance, whatever the widths: an embedding of 768 numbers does not outweigh a latent of 32,
nor a sum a mean. With x an embedding, z = Enc(x), e_l the codeword of level l, r_l the residual it receives, sg the
stop of gradients, V_x and V_z the variances (summed over features) of the training set's embeddings and latents:

    x^            = Dec(z + sg[sum_l e_l - z])            one straight-through estimator around the sum
    reconstruction = |x - x^|^2 / V_x
    codebook       = sum_l |sg[r_l] - e_l|^2 / V_z
    commitment     = sum_l |r_l - sg[e_l]|^2 / V_z
    repulsion      = max(0, 1 - |z_i - z_j| / (g sg[R]))^2   over pairs i, j that share all codes, R the root mean
                                                           square of the residual that no level took

    loss = w reconstruction + a codebook + b commitment + c repulsion + contrasts (`models.training.objectives`)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.network import DecoderNetwork, EncoderNetwork, NetworkConfig
from models.quantizer import Quantization
from models.residual import ResidualQuantizer
from models.training.ema import EMAConfig, RunningCodebooks
from models.training.objectives import collaborative_contrast, contrast, diversity


@dataclass(frozen=True)
class LossConfig:
    """What each loss counts.

    Attributes:
        reconstruction: w; 0 where another objective takes its place.
        codebook: a.
        commitment: b, TIGER's beta.
        repulsion: c; 0 leaves colliding items where they are.
        repulsion_distance: g, how far apart two colliding latents are pushed, in units of R.
        contrastive: CoST's term, see `models.training.objectives`.
        contrastive_temperature: Its t.
        collaborative: LETTER's collaborative term; needs collaborative embeddings.
        collaborative_temperature: Its t.
        diversity: LETTER's diversity term, of codebooks learned by gradient.
        diversity_clusters: Clusters of a level's codewords there.
    """

    reconstruction: float = 1.0
    codebook: float = 1.0
    commitment: float = 0.25
    repulsion: float = 0.3
    repulsion_distance: float = 2.0
    contrastive: float = 0.0
    contrastive_temperature: float = 0.1
    collaborative: float = 0.0
    collaborative_temperature: float = 0.1
    diversity: float = 0.0
    diversity_clusters: int = 10

    def check(self) -> None:
        """Refuse what trains nothing, and temperatures that are none.

        Raises:
            ValueError: Says which setting is wrong.
        """
        if not (self.reconstruction > 0 or self.contrastive > 0):
            raise ValueError("loss.reconstruction or loss.contrastive must be above 0: nothing else trains a decoder")
        for name in ("contrastive_temperature", "collaborative_temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"loss.{name} must be above 0, not {getattr(self, name)}")
        if self.diversity_clusters < 1:
            raise ValueError(f"loss.diversity_clusters must be at least 1, not {self.diversity_clusters}")


class Variances(NamedTuple):
    """Variances of the training set, summed over features, above 0.

    Attributes:
        embeddings: V_x.
        latents: V_z, at the start of the epoch.
    """

    embeddings: float
    latents: float


class Losses(NamedTuple):
    """Means over a batch, each a share of a variance but for the contrasts.

    Attributes:
        reconstruction: () float.
        codebook: (L,) float, each level's.
        commitment: (L,) float, each level's.
        repulsion: () float.
        contrastive: () float, in nats.
        collaborative: () float, in nats.
        diversity: (L,) float, each level's, in nats.
    """

    reconstruction: Tensor
    codebook: Tensor
    commitment: Tensor
    repulsion: Tensor
    contrastive: Tensor
    collaborative: Tensor
    diversity: Tensor

    def total(self, config: LossConfig) -> Tensor:
        """The weighted sum, () float."""
        return (
            config.reconstruction * self.reconstruction
            + config.codebook * self.codebook.sum()
            + config.commitment * self.commitment.sum()
            + config.repulsion * self.repulsion
            + config.contrastive * self.contrastive
            + config.collaborative * self.collaborative
            + config.diversity * self.diversity.sum()
        )


class Output(NamedTuple):
    """What a forward pass yields.

    Attributes:
        latents: (B, d) float.
        quantization: See `Quantization`.
        quantized: (B, d) float, the sum of the codewords, with the straight-through gradient to the latents.
        reconstruction: (B, D) float, decoded from the quantized latents.
    """

    latents: Tensor
    quantization: Quantization
    quantized: Tensor
    reconstruction: Tensor


class RQVAE(nn.Module):
    """The module that is trained; what is frozen of it are its three parts.

    `bf16` lets the networks, not the quantizer, multiply matrices in bfloat16; their weights stay float32.

    Args:
        network: Widths of the encoder network; the decoder network mirrors it.
        codebook_sizes: K_l for each level.
        collaborative_width: c of the collaborative embeddings it is trained with; None: there are none.
        ema: The codebooks follow running means; None: they are learned by gradient.
    """

    def __init__(
        self,
        network: NetworkConfig,
        codebook_sizes: tuple[int, ...],
        *,
        collaborative_width: int | None = None,
        ema: EMAConfig | None = None,
    ) -> None:
        super().__init__()
        latent = network.widths[-1]
        self.network = EncoderNetwork(network)
        self.quantizer = ResidualQuantizer(codebook_sizes, latent)
        self.bf16 = False
        self.decoder = DecoderNetwork(network)
        self.alignment: nn.Module = nn.Identity()
        if collaborative_width not in (None, latent):
            self.alignment = nn.Linear(latent, collaborative_width, bias=False)
        self.running = RunningCodebooks(codebook_sizes, latent, ema) if ema else None
        self.quantizer.codebooks.requires_grad_(ema is None)

    def forward(self, embeddings: Tensor) -> Output:
        """(B, D) float -> `Output`, with gradients to all three parts."""
        latents = self.latents(embeddings)
        quantization = self.quantizer.quantize(latents)
        quantized = latents + (self.quantizer.decode(quantization.codes) - latents).detach()
        return Output(latents, quantization, quantized, self.rebuilt(quantized))

    def latents(self, embeddings: Tensor) -> Tensor:
        """(B, D) float -> (B, d) of the same dtype, in bfloat16 within where `bf16` is set."""
        return self._at_precision(self.network, embeddings)

    def rebuilt(self, quantized: Tensor) -> Tensor:
        """(B, d) float -> (B, D) of the same dtype, in bfloat16 within where `bf16` is set."""
        return self._at_precision(self.decoder, quantized)

    def _at_precision(self, module: nn.Module, inputs: Tensor) -> Tensor:
        if not self.bf16:
            outputs: Tensor = module(inputs)
            return outputs
        with torch.autocast(inputs.device.type, torch.bfloat16):
            outputs = module(inputs)
        return outputs.to(inputs)

    def losses(
        self,
        embeddings: Tensor,
        variances: Variances,
        config: LossConfig | None = None,
        *,
        pairs: tuple[Tensor, Tensor] | None = None,
        collaborative: Tensor | None = None,
        clusters: Sequence[Tensor] | None = None,
        output: Output | None = None,
    ) -> Losses:
        """The losses of a batch; a contrast whose weight is 0 is not computed and 0.

        Args:
            embeddings: (B, D) float.
            variances: V_x and V_z of the training set; a batch's own would be nothing at all in a batch of one row.
            config: Which contrasts count, temperatures and distances; the default where None.
            pairs: Embeddings (P, D) of items and of others that share all their codes.
            collaborative: Collaborative embeddings (B, c) float; rows of NaN have none.
            clusters: Of each level's codewords (K_l,) int64, for the diversity term.
            output: What a forward pass made of the embeddings; there will be one where None.
        """
        config = config or LossConfig()
        output = output or self(embeddings)
        residuals = output.quantization.residuals
        codewords = self.quantizer.codewords(output.quantization.codes)
        codebook = (residuals[:, :-1].detach() - codewords).square().sum(dim=2).mean(dim=0) / variances.latents
        commitment = (residuals[:, :-1] - codewords.detach()).square().sum(dim=2).mean(dim=0) / variances.latents
        reconstruction = (embeddings - output.reconstruction).square().sum(dim=1).mean() / variances.embeddings
        repulsion = contrastive = collaboration = reconstruction.new_zeros(())
        if pairs is not None and len(pairs[0]):
            reach = config.repulsion_distance * residuals[:, -1].detach().square().sum(dim=1).mean().sqrt()
            repulsion = _repulsion(self.latents(pairs[0]), self.latents(pairs[1]), reach)
        if config.contrastive:
            centre = self.decoder.centre
            contrastive = contrast(output.reconstruction - centre, embeddings - centre, config.contrastive_temperature)
        if config.collaborative and collaborative is not None:
            aligned = self.alignment(output.quantized)
            collaboration = collaborative_contrast(aligned, collaborative, config.collaborative_temperature)
        spread = torch.zeros_like(codebook)
        if config.diversity and clusters is not None:
            levels = zip(self.quantizer.codebooks, output.quantization.codes.T, clusters, strict=True)
            spread = torch.stack([diversity(*level) for level in levels])
        return Losses(reconstruction, codebook, commitment, repulsion, contrastive, collaboration, spread)

    @torch.no_grad()
    def scale_decoder(self, embeddings: Tensor) -> None:
        """Bring reconstructions to the length that fits (B, D) embeddings best; a contrast leaves lengths undecided."""
        centre = self.decoder.centre
        rebuilt = self(embeddings).reconstruction - centre
        factor = ((embeddings - centre) * rebuilt).sum() / rebuilt.square().sum().clamp_min(1e-12)
        if float(factor) > 0:
            last = self.decoder.layers[-1]
            for parameter in last.parameters():
                parameter.mul_(factor)


def _repulsion(latents: Tensor, others: Tensor, reach: Tensor) -> Tensor:
    """Mean of the squared shortfall of each pair's distance to the reach, as a share of it; () float."""
    # Equal latents have no direction in which to part; the small number keeps their gradient finite.
    distances = ((latents - others).square().sum(dim=1) + 1e-12).sqrt()
    return (1 - distances / reach.clamp_min(1e-12)).clamp_min(0).square().mean()

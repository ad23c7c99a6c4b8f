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

    loss = reconstruction + a codebook + b commitment + c repulsion
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from models.network import DecoderNetwork, EncoderNetwork, NetworkConfig
from models.quantizer import Quantization
from models.residual import ResidualQuantizer


@dataclass(frozen=True)
class LossConfig:
    """What each loss counts beside the reconstruction.

    Attributes:
        codebook: a.
        commitment: b, TIGER's beta.
        repulsion: c; 0 leaves colliding items where they are.
        repulsion_distance: g, how far apart two colliding latents are pushed, in units of R.
    """

    codebook: float = 1.0
    commitment: float = 0.25
    repulsion: float = 0.3
    repulsion_distance: float = 2.0


class Variances(NamedTuple):
    """Variances of the training set, summed over features, above 0.

    Attributes:
        embeddings: V_x.
        latents: V_z, at the start of the epoch.
    """

    embeddings: float
    latents: float


class Losses(NamedTuple):
    """Means over a batch, each a share of a variance.

    Attributes:
        reconstruction: () float.
        codebook: (L,) float, each level's.
        commitment: (L,) float, each level's.
        repulsion: () float.
    """

    reconstruction: Tensor
    codebook: Tensor
    commitment: Tensor
    repulsion: Tensor

    def total(self, config: LossConfig) -> Tensor:
        """The weighted sum, () float."""
        return (
            self.reconstruction
            + config.codebook * self.codebook.sum()
            + config.commitment * self.commitment.sum()
            + config.repulsion * self.repulsion
        )


class Output(NamedTuple):
    """What a forward pass yields.

    Attributes:
        latents: (B, d) float.
        quantization: See `Quantization`.
        reconstruction: (B, D) float, decoded from the quantized latents.
    """

    latents: Tensor
    quantization: Quantization
    reconstruction: Tensor


class RQVAE(nn.Module):
    """The module that is trained; what is frozen of it are its three parts.

    Args:
        network: Widths of the encoder network; the decoder network mirrors it.
        codebook_sizes: K_l for each level.
    """

    def __init__(self, network: NetworkConfig, codebook_sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.network = EncoderNetwork(network)
        self.quantizer = ResidualQuantizer(codebook_sizes, network.widths[-1])
        self.decoder = DecoderNetwork(network)

    def forward(self, embeddings: Tensor) -> Output:
        """(B, D) float -> `Output`, with gradients to all three parts."""
        latents = self.network(embeddings)
        quantization = self.quantizer.quantize(latents)
        quantized = latents + (self.quantizer.decode(quantization.codes) - latents).detach()
        return Output(latents, quantization, self.decoder(quantized))

    def losses(
        self,
        embeddings: Tensor,
        variances: Variances,
        pairs: tuple[Tensor, Tensor] | None = None,
        distance: float = 2.0,
    ) -> Losses:
        """The losses of a batch.

        Args:
            embeddings: (B, D) float.
            variances: V_x and V_z of the training set; a batch's own would be nothing at all in a batch of one row.
            pairs: Embeddings (P, D) of items and of others that share all their codes.
            distance: g.
        """
        output = self(embeddings)
        residuals = output.quantization.residuals
        codewords = self.quantizer.codewords(output.quantization.codes)
        codebook = (residuals[:, :-1].detach() - codewords).square().sum(dim=2).mean(dim=0) / variances.latents
        commitment = (residuals[:, :-1] - codewords.detach()).square().sum(dim=2).mean(dim=0) / variances.latents
        reconstruction = (embeddings - output.reconstruction).square().sum(dim=1).mean() / variances.embeddings
        repulsion = reconstruction.new_zeros(())
        if pairs is not None and len(pairs[0]):
            reach = distance * residuals[:, -1].detach().square().sum(dim=1).mean().sqrt()
            repulsion = _repulsion(self.network(pairs[0]), self.network(pairs[1]), reach)
        return Losses(reconstruction, codebook, commitment, repulsion)


def _repulsion(latents: Tensor, others: Tensor, reach: Tensor) -> Tensor:
    """Mean of the squared shortfall of each pair's distance to the reach, as a share of it; () float."""
    # Equal latents have no direction in which to part; the small number keeps their gradient finite.
    distances = ((latents - others).square().sum(dim=1) + 1e-12).sqrt()
    return (1 - distances / reach.clamp_min(1e-12)).clamp_min(0).square().mean()

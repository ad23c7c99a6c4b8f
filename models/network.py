"""Encoder networks: embedding (B, D) -> latent (B, d). Each is a frozen config beside its module."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class NetworkConfig:
    """The shape of an encoder network.

    Attributes:
        widths: D, the hidden widths, d. Two numbers make one linear map (a projection); more make an MLP with ReLU
            between its layers (TIGER: 768-512-256-128-32).
    """

    widths: tuple[int, ...]

    def __post_init__(self) -> None:
        """Refuse what is no network."""
        if len(self.widths) < 2 or min(self.widths) < 1:
            msg = f"a network needs at least an input and an output width, got {self.widths}"
            raise ValueError(msg)


class EncoderNetwork(nn.Module):
    """Centre the embedding, then a linear map or an MLP.

    Centring is part of the network's state: distances of uncentred float32 data lose their digits to the offset.
    """

    centre: Tensor

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("centre", torch.zeros(config.widths[0]))
        self.layers = mlp(config.widths)

    def forward(self, embeddings: Tensor) -> Tensor:
        """(B, D) -> (B, d)."""
        return self.of_centred(embeddings - self.centre)

    def of_centred(self, centred: Tensor) -> Tensor:
        """(B, D), less the centre, -> (B, d)."""
        latents: Tensor = self.layers(centred)
        return latents

    def gain(self) -> float:
        """By how much a centred embedding's norm grows at most, biases aside."""
        weights = [layer.weight.detach() for layer in self.layers if isinstance(layer, nn.Linear)]
        return float(torch.stack([torch.linalg.matrix_norm(weight, 2) for weight in weights]).prod())


def mlp(widths: tuple[int, ...]) -> nn.Sequential:
    """Linear layers with ReLU between them, none after the last."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


@torch.no_grad()
def start_linear(layers: nn.Sequential, first: Tensor, last: Tensor) -> None:
    """Make layers compute the linear map `last @ first` exactly, hidden ReLU or not, ready to be trained further.

    x = relu(x) - relu(-x): 2 k hidden units carry the k numbers through; the other units keep their random weights and
    count nothing at first.

    Args:
        layers: As `mlp` makes them.
        first: (k, inputs) float.
        last: (outputs, k) float.

    Raises:
        ValueError: A hidden layer is narrower than 2 k.
    """
    linears = [layer for layer in layers if isinstance(layer, nn.Linear)]
    for layer in linears:
        layer.bias.zero_()
    if len(linears) == 1:
        linears[0].weight.copy_(last @ first)
        return
    carried = 2 * len(first)
    if min(layer.out_features for layer in linears[:-1]) < carried:
        raise ValueError(f"hidden widths of at least {carried} are needed to start from a projection to {len(first)}")
    linears[0].weight[:carried] = torch.cat([first, -first])
    for layer in linears[1:-1]:
        layer.weight[:carried] = 0
        layer.weight[:carried, :carried] = torch.eye(carried)
    linears[-1].weight.zero_()
    linears[-1].weight[:, :carried] = torch.cat([last, -last], dim=1)


class DecoderNetwork(nn.Module):
    """The encoder's mirror: quantized latent (B, d) -> embedding (B, D). It moves no code."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("centre", torch.zeros(config.widths[0]))
        self.layers = mlp(config.widths[::-1])

    centre: Tensor

    def forward(self, quantized: Tensor) -> Tensor:
        """(B, d) -> (B, D)."""
        embeddings: Tensor = self.layers(quantized) + self.centre
        return embeddings

"""Linear maps with their weights laid out once for the processor, and an encoder network made of them.

oneDNN keeps a weight in the blocked layout that its product wants, which is several times faster than a plain product
through the BLAS of some processors, and does the activation behind it in the same pass.
"""

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import Tensor, nn

from models.network import EncoderNetwork

Activation = Literal["none", "relu", "gelu"]


def can_pack(device: torch.device) -> bool:
    """Whether there are packed products on this device."""
    return (
        device.type == "cpu" and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


class PackedLinear:
    """A linear map, and an activation behind it.

    Args:
        linear: Its weight (out, in) and bias (out,) on the CPU.
        dtype: float32 or bfloat16: of the product's factors and its result; sums are float32.
        activation: `gelu` is the exact one, by the error function.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype, activation: Activation = "none") -> None:
        self._dtype = dtype
        self._bias = linear.bias.detach().to(dtype)
        weight = linear.weight.detach().to(dtype).contiguous()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight)  # noqa: SLF001
        self._activation: tuple[str, list[float], str] = (activation, [], "none" if activation == "gelu" else "")

    def __call__(self, rows: Tensor) -> Tensor:
        """(T, in) -> (T, out) of this map's dtype."""
        product: Tensor = torch.ops.mkldnn._linear_pointwise(  # noqa: SLF001
            rows if rows.dtype == self._dtype else rows.to(self._dtype), self._weight, self._bias, *self._activation
        )
        return product


class FastNetwork:
    """An encoder network in float32: packed where that can be, else as it is.

    Args:
        network: To be copied.
        device: Where it runs.
    """

    def __init__(self, network: EncoderNetwork, device: torch.device) -> None:
        single = copy.deepcopy(network).to(device, torch.float32).eval().requires_grad_(requires_grad=False)
        self._plain = single
        self._packed: list[PackedLinear] = []
        if can_pack(device):
            layers = [layer for layer in single.layers if isinstance(layer, nn.Linear)]
            self._packed = [PackedLinear(layer, torch.float32, "relu") for layer in layers[:-1]]
            self._packed.append(PackedLinear(layers[-1], torch.float32))

    def __call__(self, embeddings: Tensor) -> Tensor:
        """(B, D) float32 -> (B, d) float32."""
        return self.of_centred(embeddings - self.centre)

    def of_centred(self, centred: Tensor) -> Tensor:
        """(B, D) float32, less the centre, -> (B, d) float32."""
        if not self._packed:
            return self._plain.of_centred(centred)
        for linear in self._packed:
            centred = linear(centred)
        return centred

    @property
    def centre(self) -> Tensor:
        """The embedding (D,) float32 that the network takes for the middle."""
        return self._plain.centre

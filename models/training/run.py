"""How a fit runs: on which device, at which precision, what it tells and where it keeps its state."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from models.training.history import TRAINING
from models.training.progress import Progress
from models.training.resume import Snapshot, StateDirectory

PRECISIONS = ("auto", "fp32", "bf16")


@dataclass(frozen=True)
class Run:
    """Beside the hyper-parameters, what a fit is given.

    Attributes:
        device: Where the model is trained; embeddings stay in the memory of the CPU and are moved batch by batch.
        bf16: Whether the matrix products of the networks are computed in bfloat16 while training. Weights, optimiser,
            quantizer and losses are float32, and so is everything that is measured.
        state: Where the unfinished training is kept; nowhere if None.
        progress: Is told of each epoch; nobody if None.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    bf16: bool = False
    state: StateDirectory | None = None
    progress: Progress | None = None

    def keep(self, good: Snapshot, words: str) -> str:
        """Write the state after the last good epoch, where states are kept; the words on why, and where it is."""
        if self.state is None:
            return words
        self.state.write(good)
        return f"{words}. The weights after {stage_words(good.stage)} {good.epoch} are kept in {self.state.directory}"


def stage_words(stage: str) -> str:
    """What an epoch of a stage is called."""
    return "epoch" if stage == TRAINING else f"{stage} epoch"


def device_of(name: str) -> torch.device:
    """The device of `auto` (CUDA where there is one), `cpu`, `cuda` or `cuda:N`.

    Raises:
        ValueError: It is none of these, or not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, number = name.partition(":")
    if name != "cpu" and (kind != "cuda" or (number and not number.isdecimal()) or name.endswith(":")):
        raise ValueError(f"the device {name!r} is none of auto, cpu, cuda and cuda:N")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise ValueError(f"the device {name!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices")
    return torch.device(name)


def bf16_of(precision: str, device: torch.device) -> bool:
    """Whether a precision of `PRECISIONS` means bfloat16 on a device: `auto` takes it where a GPU computes in it.

    Raises:
        ValueError: There is no such precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"the precision {precision!r} is none of {', '.join(PRECISIONS)}")
    if precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return precision == "bf16"

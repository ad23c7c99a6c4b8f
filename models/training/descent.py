"""Steps down the gradient, and why there are no more: what is said where a loss or its gradient is no finite number."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.training.history import Measure
from models.training.watch import LossMeans


class Batch(NamedTuple):
    """What a step is taken on.

    Attributes:
        rows: (n,) int64, row numbers.
        embeddings: (n, D) float, theirs.
        losses: Computes the losses by name under the model's present weights; "total" is what is minimised.
    """

    rows: Tensor
    embeddings: Tensor
    losses: Callable[[], Mapping[str, Tensor]]


@dataclass(frozen=True)
class FailedStep:
    """A step that cannot be taken.

    Attributes:
        number: Of the epoch's steps, from 1.
        batch: Its rows.
        losses: By name, as they were.
        gradient_norm: Of their total.
        last_norm: The same of the step before; None where there was none.
        learning_rate: Of the step.
    """

    number: int
    batch: Batch
    losses: Mapping[str, Tensor]
    gradient_norm: float
    last_norm: float | None
    learning_rate: float


class DivergedError(Exception):
    """A loss or its gradient is no finite number; the weights are as they were before the step."""

    def __init__(self, step: FailedStep) -> None:
        super().__init__()
        self.step = step


class Descent:
    """AdamW along a learning rate that falls to 0 by a cosine.

    Args:
        model: Its parameters are moved; there may be none that learns by gradient.
        learning_rate: At the start.
        steps: Until it is 0.
    """

    def __init__(self, model: nn.Module, learning_rate: float, steps: int) -> None:
        self._model = model
        self._optimiser = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
        self._schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self._optimiser, max(1, steps))
        self._last_norm: Tensor | None = None
        self._learns = any(parameter.requires_grad for parameter in model.parameters())

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        return float(self._schedule.get_last_lr()[0])

    def step(self, batch: Batch, means: LossMeans) -> None:
        """Follow the gradient of the total loss, and add what it was to the epoch's means.

        Raises:
            DivergedError: The loss or the gradient's norm is no finite number.
        """
        losses = batch.losses()
        norm = self._gradient(losses["total"]) if self._learns else losses["total"].new_zeros(())
        if not bool(torch.stack([losses["total"].detach(), norm]).isfinite().all()):
            last = None if self._last_norm is None else float(self._last_norm)
            raise DivergedError(FailedStep(means.steps + 1, batch, losses, float(norm), last, self.learning_rate))
        if self._learns:
            self._optimiser.step()
            self._schedule.step()
        self._last_norm = norm
        means.add(losses, norm, len(batch.rows))

    def _gradient(self, loss: Tensor) -> Tensor:
        """The norm () of the gradients, which the parameters have afterwards."""
        self._optimiser.zero_grad()
        loss.backward()
        return torch.nn.utils.get_total_norm([p.grad for p in self._model.parameters() if p.grad is not None])

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Copies of the states of the optimiser and of the learning rate."""
        return copy.deepcopy(self._optimiser.state_dict()), self._schedule.state_dict()

    def load(self, optimiser: Mapping[str, Any], schedule: Mapping[str, Any]) -> None:
        """Go on from such states."""
        self._optimiser.load_state_dict(dict(optimiser))
        self._schedule.load_state_dict(dict(schedule))


def reason(place: str, step: FailedStep, model: nn.Module, good: Mapping[str, Tensor]) -> str:
    """What happened, and whether the data or the learning rate is the likely cause.

    The batch is tried again under the weights of the last good epoch, which the model has afterwards: where the loss
    and its gradient are finite under those, the steps since have spoilt the weights; where they are not, the batch
    itself has.

    Args:
        place: Where, such as "epoch 3".
        step: What failed.
        model: Its parameters have the gradients of the step.
        good: The model's state after the last good epoch, or at the start.
    """
    faulty = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and not _finite(parameter.grad)
    ]
    words = f"training stopped in {place}, batch {step.number}: {_losses(step.losses)}"
    words += f"; the norm of the gradients is {step.gradient_norm:.3g}"
    words += f" ({', '.join(faulty[:3])}{', ...' if len(faulty) > 3 else ''})" if faulty else ""
    words += f", in the step before it was {step.last_norm:.3g}" if step.last_norm is not None else ""
    model.load_state_dict(good)
    again = _tried(step, model)
    if again is None:
        return f"{words}. {_data(step)}"
    return (
        f"{words}. Under the weights of the last good epoch the same batch has a loss of {again:.3g}: the steps "
        f"since have spoilt them. The learning rate ({step.learning_rate:.3g}) is the likely cause; lower it"
    )


def useless_epoch(measure: Measure) -> str:
    """What is said of an epoch whose every step could be taken and that cannot be measured."""
    return (
        f"training stopped after epoch {measure.epoch}: its held-out measure is {measure.value}. Lower the "
        "learning rate, or look for embeddings of an extreme size"
    )


def _tried(step: FailedStep, model: nn.Module) -> float | None:
    """The loss of the step's batch under the model's weights; None where it or its gradient is no finite number."""
    if not _finite(step.batch.embeddings):
        return None
    model.zero_grad()
    loss = step.batch.losses()["total"]
    if loss.requires_grad:
        loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    finite = _finite(loss) and _finite(torch.nn.utils.get_total_norm(gradients))
    return float(loss.detach()) if finite else None


def _data(step: FailedStep) -> str:
    norms = step.batch.embeddings.double().norm(dim=1).nan_to_num(nan=torch.inf)
    worst = int(norms.argmax())
    return (
        "Under the weights of the last good epoch the same batch fails too: the data is the likely cause. Its "
        f"largest embedding is row {int(step.batch.rows[worst]):,} (from 0), of norm {float(norms[worst]):.3g}; the "
        f"batch's median is {float(norms.median()):.3g}"
    )


def _losses(losses: Mapping[str, Tensor]) -> str:
    """The terms that are no finite number, or else the total."""
    faulty = []
    for name, loss in losses.items():
        levels = [f"{name} {level}" for level, one in enumerate(loss, 1) if not _finite(one)] if loss.ndim else [name]
        faulty += levels if name != "total" and not _finite(loss) else []
    total = f"the loss is {float(losses['total'].detach())}"
    return f"{total}, not finite: {', '.join(faulty)}" if faulty else total


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.detach().isfinite().all())

"""Trains the generator: every item of a sequence is a target after the items before it.

    windows --> batches of one length --> cross entropy of the L + 1 tokens --> AdamW

The step kept is the one with the best NDCG@10 on validation users (their last but one item, searched among all live
IDs), not the one with the smallest loss.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from models.configuration import at_least
from models.recommendation.beams import search
from models.recommendation.ranking import CUTOFFS, ranking, ranks
from models.recommendation.sequences import Windows, batches, histories, windows
from models.tiger import Tiger
from models.training.run import bf16_of
from models.trie import Trie


@dataclass(frozen=True)
class TrainingConfig:
    """Hyper-parameters of the training.

    Attributes:
        steps: Of the optimiser.
        batch_targets: Targets of a step, about.
        learning_rate: Of AdamW at its highest: it rises linearly over `warm_up`, then falls to 0 along a cosine.
        embedding_learning_rate: The same for the tables of tokens. T5 draws them with a deviation of 1, ten times that
            of its other weights, and AdamW moves each number by about its rate: at the rate of the others the tables
            would stay as they were drawn for most of a short training.
        warm_up: Share of the steps.
        weight_decay: Of AdamW.
        label_smoothing: Share of the probability that is spread over all tokens.
        gradient_norm: Gradients are cut to it.
        history: Items that a target is after, at most.
        measurements: How many times, evenly over the steps, the validation users are measured.
        validation_users: A sample of so many, at most.
        beams: Of that measurement.
        precision: Of the matrix products in training, see `models.training.run.bf16_of`; what is measured is float32.
        seed: Of everything drawn.
    """

    steps: int = 2000
    batch_targets: int = 256
    learning_rate: float = 2e-3
    embedding_learning_rate: float = 0.1
    warm_up: float = 0.05
    weight_decay: float = 0.01
    label_smoothing: float = 0.0
    gradient_norm: float = 1.0
    history: int = 20
    measurements: int = 5
    validation_users: int = 2000
    beams: int = 20
    precision: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be trained.

        Raises:
            ValueError: A number is out of its range, or there are fewer beams than the measures count.
        """
        at_least("training", self, steps=1, batch_targets=1, history=1, measurements=1, validation_users=1)
        at_least("training", self, beams=CUTOFFS[-1])
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"training.label_smoothing is a share from 0 to 1, not {self.label_smoothing:g}")


class Examples(NamedTuple):
    """What a generator is trained and validated on.

    Attributes:
        sequences: Of each user, rows of the catalogue.
        validation: Of each user, the item after the sequence; -1 where that is not to be used.
        users: (U,) int64, user tokens.
        tokens: (N, L + 1) int64, of each row of the catalogue.
        semantic_ids: (N, L + 1) int64, of each row of the catalogue.
        trie: What is live.
    """

    sequences: Sequence[Sequence[int]]
    validation: Tensor
    users: Tensor
    tokens: Tensor
    semantic_ids: Tensor
    trie: Trie


class Measurement(NamedTuple):
    """On the validation users, after so many steps; the loss is the mean since the last one, in nats a token."""

    step: int
    loss: float
    recall: float
    ndcg: float


class Trained(NamedTuple):
    """What became of a training: the model holds the weights of the best measurement."""

    best: Measurement
    history: tuple[Measurement, ...]
    seconds: float
    targets: int


def train(model: Tiger, examples: Examples, config: TrainingConfig, *, name: str = "training") -> Trained:
    """Train a generator in place.

    Args:
        model: With the weights it starts from, on the device where it trains.
        examples: What it learns.
        config: Hyper-parameters.
        name: Of the progress bar.

    Raises:
        ValueError: There is no target or no validation user, or the loss became NaN or infinite.
    """
    return _Training(model, examples, config).run(name)


class _Training:
    """The state of one training."""

    def __init__(self, model: Tiger, examples: Examples, config: TrainingConfig) -> None:
        self.model = model
        self.config = config
        self.examples = examples
        self.device = model.device
        self.bf16 = bf16_of(config.precision, self.device)
        self.tokens = examples.tokens.to(self.device)
        self.users = examples.users.to(self.device)
        self.trie = examples.trie.to(self.device)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.groups = windows(examples.sequences, config.history, one_target=model.config.looks_ahead)
        usable = ((examples.validation >= 0) & torch.tensor([len(s) > 0 for s in examples.sequences])).nonzero()[:, 0]
        if not self.groups or not len(usable):
            raise ValueError(
                "there is nothing to train on: no user has enough interactions with items of the catalogue"
            )
        order = torch.randperm(len(usable), generator=self.generator)
        self.validated = usable[order[: config.validation_users]]

    def run(self, name: str) -> Trained:
        config = self.config
        tables = [self.model.t5.shared.weight, self.model.users.weight]
        others = [each for each in self.model.parameters() if all(each is not table for table in tables)]
        groups = [
            {"params": tables, "lr": config.embedding_learning_rate},
            {"params": others, "lr": config.learning_rate},
        ]
        optimiser = torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, self._rate)
        measured = {math.ceil(config.steps * (n + 1) / config.measurements) for n in range(config.measurements)}
        history: list[Measurement] = []
        best, state = None, None
        total, seen, targets = torch.zeros((), device=self.device), 0, 0
        started = time.perf_counter()
        # Dropout draws from torch's own generator: seeded here, and nobody else's state is touched.
        with (
            torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []),
            tqdm(total=config.steps, desc=name, unit="step", disable=None) as bar,
        ):
            torch.manual_seed(config.seed)
            self.model.train()
            for step, batch in enumerate(self._batches(), 1):
                loss = self._loss(batch)
                optimiser.zero_grad(set_to_none=True)
                # A rest of a group, smaller than a batch, counts for what it is.
                share = batch.targets * len(batch.users) / config.batch_targets
                (loss * min(1.0, share)).backward()
                norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.gradient_norm)
                if not bool(norm.isfinite()):
                    msg = (
                        f"training stopped at step {step}: the loss is {float(loss.detach()):g} and the gradient "
                        f"{float(norm):g}; lower the learning rate"
                    )
                    raise ValueError(msg)
                optimiser.step()
                schedule.step()
                total, seen, targets = total + loss.detach(), seen + 1, targets + batch.targets * len(batch.users)
                bar.update()
                if step in measured:
                    history.append(found := self._measure(step, float(total) / seen))
                    total, seen = torch.zeros_like(total), 0
                    bar.set_postfix(
                        loss=f"{found.loss:.3f}", recall10=f"{found.recall:.4f}", ndcg10=f"{found.ndcg:.4f}"
                    )
                    if best is None or found.ndcg > best.ndcg:
                        best, state = found, copy.deepcopy(self.model.state_dict())
        assert best is not None
        assert state is not None
        self.model.load_state_dict(state)
        self.model.eval()
        return Trained(best, tuple(history), time.perf_counter() - started, targets)

    def _rate(self, step: int) -> float:
        """The learning rate's share of its highest."""
        rising = max(1, round(self.config.warm_up * self.config.steps))
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, self.config.steps - rising)))

    def _batches(self) -> Iterator[Windows]:
        """As many as there are steps, epoch after epoch."""
        given = 0
        while True:
            for batch in batches(self.groups, self.config.batch_targets, self.generator):
                if given == self.config.steps:
                    return
                given += 1
                yield batch

    def _loss(self, batch: Windows) -> Tensor:
        """The mean cross entropy of a batch's tokens, in nats."""
        items = self.tokens[batch.items.to(self.device)]
        users = self.users[batch.users.to(self.device)]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            logits = self.model(users, items, batch.first)
        wanted = items[:, batch.first :]
        return nn.functional.cross_entropy(
            logits.float().flatten(0, 2), wanted.flatten(), label_smoothing=self.config.label_smoothing
        )

    def _measure(self, step: int, loss: float) -> Measurement:
        self.model.eval()
        places = []
        wanted = self.examples.semantic_ids[self.examples.validation.clamp_min(0)]
        for users, items in histories(self.examples.sequences, self.validated, self.config.history, 128):
            asked = self.users[users.to(self.device)], self.tokens[items.to(self.device)]
            found = search(self.model, *asked, self.config.beams, self.trie)
            places.append(ranks(found.semantic_ids.cpu(), wanted[users]))
        self.model.train()
        measured = ranking(torch.cat(places))
        return Measurement(step, loss, measured.recall[10], measured.ndcg[10])

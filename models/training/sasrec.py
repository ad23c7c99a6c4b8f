"""SASRec: item embeddings from users' sequences by causal self-attention (Kang and McAuley, ICDM 2018).

With E the item embeddings (N, c) and P the positions' (T, c), a sequence s_1..s_t becomes x_i = E[s_i] + P[i]; each
block adds g(LayerNorm(x)) twice, g being causal self-attention (eq. 2 to 5) and then a point-wise network of two
layers (eq. 6); F is what the last block yields. The score of item j after i steps is F_i . E[j] (eq. 7): the same E
goes in and comes out, so items that are chosen in the same situations come to lie together.

The paper's loss sets one drawn item against each target. Here it is the cross-entropy of the target among many drawn
items, shared by the batch, or among all: so trained, SASRec ranks better in fewer epochs (Klenitskiy and Vasilev,
RecSys 2023).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from models.interactions import Split
from models.recommendation.ranking import ABSENT, Ranking, ranking

RANKED_AT_ONCE = 1024
NONE = -100


@dataclass(frozen=True)
class SASRecConfig:
    """Hyper-parameters of SASRec.

    Attributes:
        width: c, of the item embeddings and of all that is between.
        blocks: Of attention and point-wise network.
        heads: Of each attention; a divisor of c.
        max_length: T, steps of a sequence that are looked at, the latest ones.
        dropout: Of the input and of each g.
        negatives: Items drawn for each batch, against which each target is set; 0: all items.
        batch_users: Sequences of a step.
        epochs: At most.
        patience: Stop after so many epochs without a better NDCG@10 on what is held out.
        learning_rate: Of Adam.
        held_out: Share of the sequences whose last item is held out to choose the epoch.
        seed: Of everything drawn.
    """

    width: int = 32
    blocks: int = 2
    heads: int = 1
    max_length: int = 50
    dropout: float = 0.4
    negatives: int = 512
    batch_users: int = 128
    epochs: int = 80
    patience: int = 10
    learning_rate: float = 2e-3
    held_out: float = 0.1
    seed: int = 0


class SASRecFit(NamedTuple):
    """A trained SASRec.

    Attributes:
        model: As it was after the best epoch.
        epoch: That epoch, from 1.
        held_out: Its ranking of the held-out items.
        losses: Mean loss of each epoch.
    """

    model: SASRec
    epoch: int
    held_out: Ranking
    losses: tuple[float, ...]


class SASRec(nn.Module):
    """Scores of the next item after each step of a sequence.

    Args:
        items: N.
        config: Hyper-parameters.
    """

    def __init__(self, items: int, config: SASRecConfig) -> None:
        super().__init__()
        self.max_length = config.max_length
        self.items = nn.Embedding(items, config.width)
        self.positions = nn.Embedding(config.max_length, config.width)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(config.width)
        self.dropout = nn.Dropout(config.dropout)
        for embedding in (self.items, self.positions):
            nn.init.normal_(embedding.weight, std=config.width**-0.5)

    def forward(self, sequences: Tensor) -> Tensor:
        """(B, t) int64, t at most T -> F, (B, t, c) float. A step sees none after it, so what fills up does no harm."""
        steps = torch.arange(sequences.shape[1], device=sequences.device)
        states = self.dropout(self.items(sequences) + self.positions(steps))
        for block in self.blocks:
            states = block(states)
        return torch.as_tensor(self.norm(states))

    @torch.no_grad()
    def last_states(self, histories: Sequence[tuple[int, ...]]) -> Tensor:
        """F after the last step of each history, (B, c) float; histories have at least one row, and may be long."""
        latest = [history[-self.max_length :] for history in histories]
        device = self.items.weight.device
        ends = torch.tensor([len(history) - 1 for history in latest], device=device)
        states = self(_filled(latest, 0).to(device))
        return torch.as_tensor(states[torch.arange(len(latest), device=device), ends])


class _Block(nn.Module):
    """x + g(LayerNorm(x)), for attention and then for the point-wise network."""

    def __init__(self, config: SASRecConfig) -> None:
        super().__init__()
        if config.width % config.heads:
            msg = f"{config.heads} heads do not divide a width of {config.width}"
            raise ValueError(msg)
        self.heads = config.heads
        self.attention_norm = nn.LayerNorm(config.width)
        self.attended = nn.Linear(config.width, 3 * config.width)
        self.mixed = nn.Linear(config.width, config.width)
        self.pointwise_norm = nn.LayerNorm(config.width)
        self.pointwise = nn.Sequential(
            nn.Linear(config.width, config.width),
            nn.ReLU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.width, config.width),
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, states: Tensor) -> Tensor:
        users, steps, width = states.shape
        parts = self.attended(self.attention_norm(states)).view(users, steps, 3, self.heads, width // self.heads)
        queries, keys, values = parts.permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        states = states + self.dropout(self.mixed(attended.transpose(1, 2).reshape(users, steps, width)))
        return torch.as_tensor(states + self.dropout(self.pointwise(self.pointwise_norm(states))))


def fit_sasrec(
    sequences: Sequence[tuple[int, ...]], items: int, config: SASRecConfig, device: str = "cpu"
) -> SASRecFit:
    """Train SASRec on sequences; the epoch is chosen by the last items of some of them, which are not trained on.

    Args:
        sequences: Rows of items, oldest first: of the leave-one-out split the training part alone.
        items: N; rows are below it.
        config: Hyper-parameters.
        device: Where to train.

    Raises:
        ValueError: No sequence has two items, or the loss became NaN or infinite.
    """
    # Dropout draws from torch's own state: seeded here, and given back as it was.
    with torch.random.fork_rng(devices=[device] if device.startswith("cuda") else []):
        torch.manual_seed(config.seed)
        return _Fitting(sequences, items, config, device).run()


class _Fitting:
    """The state of one fit."""

    def __init__(self, sequences: Sequence[tuple[int, ...]], items: int, config: SASRecConfig, device: str) -> None:
        usable = [sequence for sequence in sequences if len(sequence) >= 2]
        if not usable:
            raise ValueError("no user has two interactions to learn from")
        self.config = config
        self.device = device
        self.items = items
        self.generator = torch.Generator().manual_seed(config.seed)
        chosen = torch.randperm(len(usable), generator=self.generator)[: max(1, round(config.held_out * len(usable)))]
        held_out = set(chosen.tolist())
        self.histories = [usable[user][:-1] for user in sorted(held_out)]
        self.targets = [usable[user][-1] for user in sorted(held_out)]
        kept = [sequence[:-1] if user in held_out else sequence for user, sequence in enumerate(usable)]
        # Where all are held out or too short for it, the held-out items are trained on rather than nothing.
        self.training = [s[-config.max_length - 1 :] for s in kept if len(s) >= 2] or usable
        self.lengths = torch.tensor([len(sequence) for sequence in self.training])
        self.model = SASRec(items, config).to(device)

    def run(self) -> SASRecFit:
        optimiser = torch.optim.Adam(self.model.parameters(), lr=self.config.learning_rate, betas=(0.9, 0.98))
        best: SASRecFit | None = None
        state = self.model.state_dict()
        losses: list[float] = []
        with tqdm(range(1, self.config.epochs + 1), desc="SASRec", unit="epoch", disable=None) as bar:
            for epoch in bar:
                losses.append(self._train_epoch(epoch, optimiser))
                found = evaluate_ranking(self.model, self.histories, self.targets)
                bar.set_postfix(loss=f"{losses[-1]:.3f}", ndcg_10=f"{found.ndcg[10]:.4f}")
                if best is None or found.ndcg[10] > best.held_out.ndcg[10]:
                    best = SASRecFit(self.model, epoch, found, ())
                    state = copy.deepcopy(self.model.state_dict())
                if epoch - best.epoch >= self.config.patience:
                    break
        if best is None:
            raise ValueError("SASRec needs at least one epoch")
        self.model.load_state_dict(state)
        return best._replace(model=self.model.eval(), losses=tuple(losses))

    def _train_epoch(self, epoch: int, optimiser: torch.optim.Optimizer) -> float:
        """Mean loss of the epoch's steps."""
        self.model.train()
        losses = []
        for users in self._batches():
            batch = [self.training[user] for user in users.tolist()]
            inputs = _filled([sequence[:-1] for sequence in batch], 0).to(self.device)
            targets = _filled([sequence[1:] for sequence in batch], NONE).to(self.device)
            there = targets != NONE
            loss = self._loss(self.model(inputs)[there], targets[there])
            if not bool(loss.isfinite()):
                msg = f"SASRec stopped in epoch {epoch}: the loss is {float(loss.detach())}; lower the learning rate"
                raise ValueError(msg)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.detach())
        return float(torch.stack(losses).mean())

    def _loss(self, states: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of targets (n,) after states (n, c), among the drawn items or all; () float."""
        table = self.model.items.weight
        if not self.config.negatives:
            return functional.cross_entropy(states @ table.T, targets)
        drawn = torch.randint(self.items, (self.config.negatives,), generator=self.generator).to(targets.device)
        right = (states * table[targets]).sum(dim=1, keepdim=True)
        # A target that was drawn is no wrong answer.
        wrong = (states @ table[drawn].T).masked_fill(drawn == targets[:, None], -torch.inf)
        return functional.cross_entropy(torch.cat([right, wrong], dim=1), torch.zeros_like(targets))

    def _batches(self) -> Iterator[Tensor]:
        """Users of like length together, in random order: what is filled up is computed in vain."""
        order = torch.randperm(len(self.training), generator=self.generator)
        order = order[self.lengths[order].argsort(stable=True)]
        batches = order.split(self.config.batch_users)
        for number in torch.randperm(len(batches), generator=self.generator).tolist():
            yield batches[number]


@torch.no_grad()
def evaluate_ranking(
    model: SASRec, histories: Sequence[tuple[int, ...]], targets: Sequence[int], *, repeats: bool = True
) -> Ranking:
    """Rank all items after each history and say how high the item lies that was chosen next.

    Args:
        model: A trained model.
        histories: Rows, oldest first; rows that the model does not have are passed over, and a history without any
            other ranks nothing.
        targets: What came next; a row that the model does not have is never found.
        repeats: Whether items of the history are ranked too. A target is, always.
    """
    model.eval()
    items = len(model.items.weight)
    known = [tuple(row for row in history if row < items) for history in histories]
    asked = [user for user, target in enumerate(targets) if known[user] and target < items]
    asked.sort(key=lambda user: min(len(known[user]), model.max_length))
    places = torch.full((len(targets),), ABSENT, dtype=torch.int64)
    chunks = torch.tensor(asked, dtype=torch.int64).split(RANKED_AT_ONCE) if asked else ()
    for users in chunks:
        batch = [known[user] for user in users.tolist()]
        scores = model.last_states(batch) @ model.items.weight.T
        right = torch.tensor([targets[user] for user in users.tolist()], device=scores.device)
        mine = scores.gather(1, right[:, None])
        above = scores > mine
        # Ties go to the lowest row.
        above |= (scores == mine) & (torch.arange(items, device=scores.device) < right[:, None])
        if not repeats:
            above[_pairs(batch).to(scores.device).unbind(1)] = False
        places[users] = above.sum(dim=1).cpu()
    return ranking(places)


def evaluate_split(model: SASRec, split: Split, *, repeats: bool = True) -> Ranking:
    """The test part of the leave-one-out split: s[-1] ranked after s[:-1]."""
    histories = [(*seen, row) for seen, row in zip(split.training, split.validation, strict=True)]
    return evaluate_ranking(model, histories, split.test, repeats=repeats)


def _filled(sequences: Sequence[tuple[int, ...]], value: int) -> Tensor:
    """(B, t) int64 of sequences of t rows at most, the shorter ones filled up at the end."""
    longest = max(map(len, sequences))
    return torch.tensor([[*sequence, *[value] * (longest - len(sequence))] for sequence in sequences])


def _pairs(histories: Sequence[tuple[int, ...]]) -> Tensor:
    """(n, 2) int64: position of the history, row of its item."""
    return torch.tensor([(number, row) for number, history in enumerate(histories) for row in history])

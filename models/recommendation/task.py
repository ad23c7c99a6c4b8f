"""What a generator is trained and tested on: a catalogue's IDs, the users' sequences, and the settings of both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from models.configuration import at_least
from models.interactions import leave_one_out
from models.recommendation.baselines import by_co_occurrence, by_last_item, by_popularity
from models.recommendation.ranking import CUTOFFS, Ranking, ranking, ranks
from models.recommendation.training import TrainingConfig
from models.trie import Trie

TOP = CUTOFFS[-1]


@dataclass(frozen=True)
class Shape:
    """The generator's size, see `TigerConfig`; the defaults suit a processor."""

    users: int = 2000
    width: int = 64
    encoder_layers: int = 2
    decoder_layers: int = 2
    heads: int = 4
    head_width: int = 16
    hidden: int = 256
    dropout: float = 0.1
    looks_ahead: bool = False

    def __post_init__(self) -> None:
        """Refuse what is no generator.

        Raises:
            ValueError: A number has to be larger.
        """
        at_least("shape", self, users=1, width=1, encoder_layers=1, decoder_layers=1, heads=1, head_width=1, hidden=1)


@dataclass(frozen=True)
class RecommendConfig:
    """What is trained and how it is measured.

    Attributes:
        shape: Of the generator.
        training: Of the generator.
        beams: Of the search on the test users.
        test_users: A sample of so many; 0 for all.
        free_users: Of these, a sample of so many is searched without the constraint too; 0 for all.
        cold: Share of the items taken out of all training sequences. They keep their IDs and are live.
        epsilon: Share of the first k recommendations that cold items get in the measure with reserved places.
        seed: Of everything drawn.
    """

    shape: Shape = field(default_factory=Shape)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    beams: int = 20
    test_users: int = 0
    free_users: int = 5000
    cold: float = 0.0
    epsilon: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be measured.

        Raises:
            ValueError: A number is out of its range, or there are fewer beams than the measures count.
        """
        at_least("", self, beams=TOP, test_users=0, free_users=0)
        for name, share in (("cold", self.cold), ("epsilon", self.epsilon)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} is a share from 0 to 1, not {share:g}")


# TIGER's own generator and training (Rajput et al., NeurIPS 2023, section 4.1): for a GPU.
PAPER = RecommendConfig(
    shape=Shape(width=128, encoder_layers=4, decoder_layers=4, heads=6, head_width=64, hidden=1024, looks_ahead=True),
    training=TrainingConfig(
        steps=200_000, batch_targets=256, learning_rate=1e-3, embedding_learning_rate=1e-2, measurements=40
    ),
)
SETTINGS = {"small": RecommendConfig(), "paper": PAPER}


class Identified(NamedTuple):
    """A catalogue with its Semantic IDs.

    Attributes:
        name: The tokenizer's.
        semantic_ids: (N, L + 1) int64, of each row of the catalogue.
        codebook_sizes: K_l for each of the L levels.
        trie: The live IDs as of now; asked again before the test.
        embeddings: (N, D) float32, or None where they are not known.
    """

    name: str
    semantic_ids: Tensor
    codebook_sizes: tuple[int, ...]
    trie: Callable[[], Trie]
    embeddings: Tensor | None


class Task:
    """One catalogue's sequences, split: the same for every tokenizer.

    Args:
        user_ids: Of each sequence.
        sequences: Rows of the catalogue, oldest first; those of fewer than three items are left out.
        items: N, the catalogue's rows.
        config: Which items are cold, and which users are tested.

    Raises:
        ValueError: No sequence has three items.
    """

    def __init__(
        self, user_ids: Sequence[str], sequences: Sequence[tuple[int, ...]], items: int, config: RecommendConfig
    ) -> None:
        long = [place for place, sequence in enumerate(sequences) if len(sequence) >= 3]
        if not long:
            raise ValueError("no user has three interactions with items of the catalogue: nothing can be left out")
        split = leave_one_out([sequences[place] for place in long])
        self.items = items
        self.user_ids = [user_ids[place] for place in long]
        generator = torch.Generator().manual_seed(config.seed)
        self.cold = torch.zeros(items, dtype=torch.bool)
        self.cold[torch.randperm(items, generator=generator)[: round(config.cold * items)]] = True
        cold = self.cold.tolist()
        self.training = [tuple(row for row in sequence if not cold[row]) for sequence in split.training]
        self.validation = torch.tensor([-1 if cold[row] else row for row in split.validation])
        self.histories = [(*sequence, row) for sequence, row in zip(split.training, split.validation, strict=True)]
        self.wanted = torch.tensor(split.test)
        order = torch.randperm(len(long), generator=generator)
        tested = order[: config.test_users or None]
        self.tested, self.free = tested.sort().values, tested[: config.free_users or None].sort().values

    @property
    def wants_cold(self) -> Tensor:
        """Which of the test users (U,) bool want an item that was taken out of all training sequences."""
        return self.cold[self.wanted[self.tested]]

    def baselines(self) -> dict[str, Ranking]:
        """What the recommenders that cost nothing reach on the same test users."""
        asked = [self.histories[user] for user in self.tested.tolist()]
        wanted = self.wanted[self.tested]
        popular = by_popularity(self.training, self.items, TOP)
        found = {
            "popularity": popular.expand(len(asked), -1),
            "most frequent next": by_last_item(self.training, asked, popular),
            "item-kNN": by_co_occurrence(self.training, asked, self.items, TOP),
        }
        return {name: ranking(ranks(rows, wanted)) for name, rows in found.items()}

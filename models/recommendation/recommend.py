"""A tokenizer measured by what it is for: a generator trained on its IDs, and how well that recommends.

    IDs + sequences --> leave one out --> cold items out --> training --> beams over the live trie --> measures

Every user's last item is to be found among all live IDs, after all that the user chose before it.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from models.recommendation.baselines import by_content
from models.recommendation.beams import search
from models.recommendation.ranking import CUTOFFS, Ranking, ranking, ranks
from models.recommendation.sequences import histories
from models.recommendation.task import TOP, Identified, RecommendConfig, Task
from models.recommendation.training import Examples, Trained, train
from models.tiger import Tiger, TigerConfig, user_tokens
from models.trie import Trie

BATCH_USERS = 128


@dataclass(frozen=True)
class Cold:
    """Users whose next item was taken out of all training sequences.

    Attributes:
        items: How many items were taken out.
        plain: Of the generator.
        reserved: The same, `epsilon` of the places given to the likeliest cold items (TIGER, section 4.3).
        by_content: Of the items nearest to the history by embedding; None without embeddings.
        by_content_reserved: The same, the cold ones among them in the reserved places; None without embeddings.
    """

    items: int
    plain: Ranking
    reserved: Ranking
    by_content: Ranking | None
    by_content_reserved: Ranking | None


@dataclass(frozen=True)
class Recommendation:
    """What was measured of one tokenizer.

    Attributes:
        name: The tokenizer's.
        test: On all test users, over the live trie.
        warm: On those who want none of the items taken out; None where no item was, or there are no such users.
        without: On a sample of them, without the constraint.
        invalid: Share of the first ten that are no live ID, over the live trie.
        invalid_without: The same without the constraint.
        cold: On the others; None where no item was taken out, or no test user wants one.
        parameters: Of the generator.
        trained: Its training.
        test_seconds: Of both searches.
    """

    name: str
    test: Ranking
    warm: Ranking | None
    without: Ranking
    invalid: float
    invalid_without: float
    cold: Cold | None
    parameters: int
    trained: Trained
    test_seconds: float


def recommend(
    identified: Identified, task: Task, config: RecommendConfig, device: torch.device | str = "cpu"
) -> tuple[Tiger, Recommendation]:
    """Train a generator on a tokenizer's IDs and measure it.

    Args:
        identified: The IDs.
        task: The sequences.
        config: What is trained.
        device: Where.

    Returns:
        The generator, and what was measured.

    Raises:
        ValueError: There is nothing to train on, or the training diverged.
    """
    trie = identified.trie()
    suffixes = max(trie.suffixes, int(identified.semantic_ids[:, -1].max()) + 1)
    # Seeded here, so that the random weights are the seed's and nobody else's state is touched.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        shape = TigerConfig(identified.codebook_sizes, suffixes, **vars(config.shape))
        model = Tiger(shape).to(device)
    users = user_tokens(task.user_ids, shape.users)
    tokens = model.vocabulary.write(identified.semantic_ids)
    examples = Examples(task.training, task.validation, users, tokens, identified.semantic_ids, trie)
    trained = train(model, examples, replace(config.training, seed=config.seed), name=identified.name)
    return model, _Test(model, identified, task, config).measured(trained)


class _Test:
    """The measurement of a trained generator."""

    def __init__(self, model: Tiger, identified: Identified, task: Task, config: RecommendConfig) -> None:
        self.model = model
        self.identified = identified
        self.task = task
        self.config = config
        self.users = user_tokens(task.user_ids, model.config.users)
        self.tokens = model.vocabulary.write(identified.semantic_ids)
        self.trie = identified.trie().with_suffixes_below(model.config.suffixes)

    def measured(self, trained: Trained) -> Recommendation:
        """Everything on the test users."""
        started = time.perf_counter()
        task = self.task
        wanted = self.identified.semantic_ids[task.wanted]
        found = self._found(task.tested, self.trie)
        free = self._found(task.free, None)
        seconds = time.perf_counter() - started
        places = ranks(found, wanted[task.tested])
        cold = task.wants_cold
        return Recommendation(
            name=self.identified.name,
            test=ranking(places),
            warm=ranking(places[~cold]) if bool(task.cold.any() and (~cold).any()) else None,
            without=ranking(ranks(free, wanted[task.free])),
            invalid=self._invalid(found),
            invalid_without=self._invalid(free),
            cold=self._cold(found[cold], task.tested[cold]) if bool(cold.any()) else None,
            parameters=sum(parameter.numel() for parameter in self.model.parameters()),
            trained=trained,
            test_seconds=seconds,
        )

    def _found(self, users: Tensor, trie: Trie | None) -> Tensor:
        """The first IDs (U, beams, L + 1) for users, in their order, -1 throughout where there were not so many."""
        beams, device = self.config.beams, self.model.device
        trie = None if trie is None else trie.to(device)
        place = {user: row for row, user in enumerate(users.tolist())}
        size = len(self.identified.codebook_sizes) + 1
        found = torch.full((len(users), beams, size), -1)
        for chosen, items in histories(self.task.histories, users, self.config.training.history, BATCH_USERS):
            asked = self.users[chosen].to(device), self.tokens[items].to(device)
            ids = search(self.model, *asked, beams, trie).semantic_ids.cpu()
            found[[place[user] for user in chosen.tolist()], : ids.shape[1]] = ids
        return found

    def _invalid(self, found: Tensor) -> float:
        """The share of the first ten IDs that are not live; places that a small catalogue left empty do not count."""
        first = found[:, :TOP].flatten(0, 1)
        if self.trie.suffixes and len(self.trie.semantic_ids()) < TOP:
            first = first[(first >= 0).any(dim=1)]
        return 1 - float(self.trie.holds(first).double().mean())

    def _cold(self, found: Tensor, users: Tensor) -> Cold:
        """The measures on users who want a cold item."""
        task, identified = self.task, self.identified
        wanted = identified.semantic_ids[task.wanted[users]]
        rows = task.cold.nonzero()[:, 0]
        unseen = self._found(users, Trie.of(identified.semantic_ids[rows], identified.codebook_sizes))
        near = near_reserved = None
        if identified.embeddings is not None:
            asked = [task.histories[user] for user in users.tolist()]
            every = torch.arange(task.items)
            by_all = identified.semantic_ids[by_content(identified.embeddings, asked, every, TOP)]
            by_cold = identified.semantic_ids[by_content(identified.embeddings, asked, rows, 2 * TOP)]
            near = ranking(ranks(by_all, wanted))
            near_reserved = reserved(by_all, by_cold, wanted, self.config.epsilon)
        return Cold(
            items=len(rows),
            plain=ranking(ranks(found, wanted)),
            reserved=reserved(found, unseen, wanted, self.config.epsilon),
            by_content=near,
            by_content_reserved=near_reserved,
        )


def reserved(found: Tensor, unseen: Tensor, wanted: Tensor, epsilon: float) -> Ranking:
    """The measures of rankings whose last places are reserved: of the first k, epsilon k (rounded up) for unseen items.

    Args:
        found: (U, n, L + 1) int64, best first.
        unseen: (U, m, L + 1) int64, unseen items alone, best first; those already in front are passed over.
        wanted: (U, L + 1) int64.
        epsilon: From 0 to 1.
    """
    of = {}
    for k in CUTOFFS:
        places = math.ceil(epsilon * k)
        front = found[:, : k - places]
        again = (unseen[:, :, None] == front[:, None]).all(dim=3).any(dim=2)
        order = again.int().argsort(dim=1, stable=True)[:, :places, None].expand(-1, -1, unseen.shape[2])
        of[k] = ranking(ranks(torch.cat([front, unseen.gather(1, order)], dim=1), wanted), (k,))
    recall, ndcg = {k: of[k].recall[k] for k in CUTOFFS}, {k: of[k].ndcg[k] for k in CUTOFFS}
    return Ranking(len(wanted), recall, ndcg, of[CUTOFFS[-1]].error)

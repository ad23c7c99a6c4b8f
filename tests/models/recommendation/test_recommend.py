"""A catalogue whose next item follows from the last one: the generator learns it, and everything is measured."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
import torch

from models import Trie
from models.recommendation.baselines import by_co_occurrence, by_content, by_last_item, by_popularity
from models.recommendation.ranking import ABSENT, ranking, ranks
from models.recommendation.recommend import recommend, reserved
from models.recommendation.report import HTML, JSON, table, write
from models.recommendation.task import Identified, RecommendConfig, Shape, Task
from models.recommendation.training import TrainingConfig

ITEMS = 40
SHAPE = Shape(users=4, width=32, encoder_layers=1, decoder_layers=1, heads=2, head_width=16, hidden=64, dropout=0.0)
CONFIG = RecommendConfig(
    shape=SHAPE,
    training=TrainingConfig(
        steps=100,
        batch_targets=128,
        learning_rate=1e-2,
        embedding_learning_rate=1e-2,
        measurements=2,
        validation_users=50,
    ),
    beams=12,
)


def sequences(users: int = 200) -> list[tuple[int, ...]]:
    """Every user walks on from item to item, all of them equally popular: 39 is followed by 0."""
    drawn = random.Random(5)
    return [
        tuple((start + place) % ITEMS for place in range(drawn.randint(4, 9)))
        for start in (drawn.randrange(ITEMS) for _ in range(users))
    ]


def identified() -> Identified:
    rows = torch.arange(ITEMS)
    semantic_ids = torch.stack([rows // 8, rows % 4, rows // 4 % 2], dim=1)  # two suffixes of equal codes
    trie = Trie.of(semantic_ids, (8, 8))
    angle = rows / ITEMS * 2 * torch.pi
    return Identified("walk", semantic_ids, (8, 8), lambda: trie, torch.stack([angle.cos(), angle.sin()], dim=1))


def task(config: RecommendConfig = CONFIG) -> Task:
    walks = sequences()
    return Task([str(user) for user in range(len(walks))], walks, ITEMS, config)


@pytest.fixture(scope="module")
def measured():
    config = replace(CONFIG, cold=0.1)
    return recommend(identified(), task(config), config)[1]


def test_the_generator_learns_what_popularity_cannot_know(measured) -> None:
    popularity = task(replace(CONFIG, cold=0.1)).baselines()["popularity"]

    assert popularity.recall[10] < 0.4
    assert measured.warm.recall[10] > 0.7
    assert measured.test.recall[10] > popularity.recall[10] + 0.2


def test_the_constraint_leaves_live_ids_alone(measured) -> None:
    assert measured.invalid == 0
    assert measured.invalid_without > 0.1
    assert measured.test.recall[10] >= measured.without.recall[10]


def test_cold_items_are_found_in_reserved_places(measured) -> None:
    assert measured.cold.items == 4
    assert measured.cold.plain.users + measured.warm.users == measured.test.users == 200
    assert measured.cold.reserved.recall[10] >= measured.cold.plain.recall[10]
    assert measured.cold.by_content.recall[10] == 1  # the nearest on the circle
    assert task(replace(CONFIG, cold=0.1)).cold.sum() == 4


def test_no_cold_item_is_trained_on_and_all_of_them_stay_in_the_histories() -> None:
    some = task(replace(CONFIG, cold=0.1))
    cold = set(some.cold.nonzero()[:, 0].tolist())

    assert not cold & {row for sequence in some.training for row in sequence}
    assert not cold & set(some.validation.tolist())
    assert [(*history, wanted) for history, wanted in zip(some.histories, some.wanted.tolist(), strict=True)] == [
        walk for walk in sequences() if len(walk) >= 3
    ]


def test_the_same_seed_gives_the_same_figures(measured) -> None:
    config = replace(CONFIG, training=replace(CONFIG.training, steps=10), test_users=20, free_users=10)

    first, again = (recommend(identified(), task(config), config)[1] for _ in range(2))

    assert first.trained.history == again.trained.history
    assert first.test == again.test
    assert first.test.users == 20
    assert first.without.users == 10


def test_the_encoder_of_the_paper_learns_too() -> None:
    longer = replace(CONFIG.training, steps=200)  # after 100 it depends on the processor
    config = replace(CONFIG, shape=replace(SHAPE, looks_ahead=True), training=longer)

    assert recommend(identified(), task(config), config)[1].test.recall[10] > 0.9


def test_a_training_that_diverges_says_so() -> None:
    config = replace(CONFIG, training=replace(CONFIG.training, learning_rate=1e38))

    with pytest.raises(ValueError, match=r"training stopped at step .* lower the learning rate"):
        recommend(identified(), task(config), config)


def test_nothing_to_train_on_is_said() -> None:
    with pytest.raises(ValueError, match="no user has three interactions"):
        Task(["a", "b"], [(1, 2), ()], ITEMS, CONFIG)


def test_recall_and_ndcg_are_those_of_one_right_answer() -> None:
    found = torch.tensor([[[1, 0], [2, 0]], [[1, 0], [2, 0]], [[1, 0], [2, 0]]])

    places = ranks(found, torch.tensor([[1, 0], [2, 0], [2, 1]]))

    assert places.tolist() == [0, 1, ABSENT]
    measures = ranking(places, (1, 2))
    assert measures.recall == pytest.approx({1: 1 / 3, 2: 2 / 3})
    assert measures.ndcg == pytest.approx({1: 1 / 3, 2: (1 + 0.63093) / 3}, abs=1e-5)
    assert measures.error == pytest.approx((2 / 9 / 3) ** 0.5)


def test_reserved_places_are_the_last_ones_and_hold_what_is_not_in_front() -> None:
    found = torch.arange(20).reshape(1, 20, 1)
    unseen = torch.tensor([[[3], [50], [60]]])

    def rank(wanted: int, epsilon: float) -> float:
        return reserved(found, unseen, torch.tensor([[wanted]]), epsilon).ndcg[10]

    assert rank(3, 0.1) == rank(3, 0.0)
    assert rank(50, 0.1) == pytest.approx(1 / torch.tensor(11.0).log2())
    assert rank(60, 0.1) == 0
    assert rank(60, 0.2) == rank(50, 0.1)
    assert rank(9, 0.0) > rank(9, 0.1) == 0


def test_the_baselines_count_what_they_say() -> None:
    walks = [(0, 1, 2), (0, 1, 3), (4, 1, 3)]
    popular = by_popularity(walks, 6, 3)

    assert popular.tolist() == [1, 0, 3]
    assert by_last_item(walks, [(0, 1), (2,)], popular).tolist() == [[3, 2, 1], [1, 0, 3]]
    assert by_co_occurrence(walks, [(0,), (4,)], 6, 2).tolist() == [[1, 2], [3, 1]]
    corners = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.0, 2.0]])
    assert by_content(corners, [(0,), (2,)], torch.tensor([1, 2, 3]), 1).tolist() == [[1], [3]]


def test_what_is_near_by_content_is_no_item_of_the_history_itself() -> None:
    angles = torch.arange(8) * 0.3
    embeddings = torch.stack([angles.cos(), angles.sin()], dim=1)

    assert by_content(embeddings, [(1, 2, 3)], torch.arange(8), 3).sort().values.tolist() == [[0, 4, 5]]


@pytest.mark.parametrize(
    ("kind", "setting", "words"),
    [
        (TrainingConfig, {"history": 0}, "training.history has to be at least 1, not 0"),
        (TrainingConfig, {"batch_targets": 0}, "training.batch_targets"),
        (TrainingConfig, {"measurements": 0}, "training.measurements"),
        (TrainingConfig, {"label_smoothing": 5.0}, "training.label_smoothing is a share from 0 to 1"),
        (TrainingConfig, {"beams": 9}, "training.beams has to be at least 10"),
        (Shape, {"users": 0}, "shape.users"),
        (RecommendConfig, {"beams": 9}, "beams has to be at least 10"),
        (RecommendConfig, {"test_users": -1}, "test_users"),
        (RecommendConfig, {"epsilon": 1.5}, "epsilon is a share from 0 to 1"),
    ],
)
def test_settings_without_sense_are_refused(kind, setting, words) -> None:
    with pytest.raises(ValueError, match=words):
        kind(**setting)


def test_the_report_has_a_row_for_each(measured, tmp_path) -> None:
    baselines = task().baselines()

    write(tmp_path / "new", {"seed": 0}, baselines, [measured])

    content = json.loads((tmp_path / "new" / JSON).read_text())
    assert content["tokenizers"][0]["test"]["recall"]["10"] == measured.test.recall[10]
    assert content["tokenizers"][0]["trained"]["best"]["step"] in (50, 100)
    rows = table(baselines, [measured]).splitlines()
    assert [row.split("|")[1].strip() for row in rows[2:]] == [*baselines, "walk"]
    assert f"{measured.test.recall[10]:.4f}".removeprefix("0") in rows[-1]
    shown = (tmp_path / "new" / HTML).read_text()
    for value in (measured.test.recall[10], measured.cold.reserved.recall[10], measured.warm.recall[10]):
        assert f">{value:.4f}<" in shown
    assert shown.count("<svg role") == 2

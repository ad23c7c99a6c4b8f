"""The metrics: their table in the docs, and what they count."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.parser import text_string_to_metric_families

from service.metrics import Metrics
from service.stats.drift import ErrorWindow
from service.stats.training import TrainingErrors

ROOT = Path(__file__).parents[3]
ROW = re.compile(r"^\| `(?P<name>\w+)` \| (?P<kind>counter|gauge|histogram) \| (?P<labels>[^|]*)\| ", re.MULTILINE)


def documented() -> dict[str, tuple[str, set[str]]]:
    """Name -> type and labels."""
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    return {row["name"]: (row["kind"], set(re.findall(r"\w+", row["labels"]))) for row in ROW.finditer(text)}


def told(text: str) -> dict[str, tuple[str, set[str]]]:
    """The same of an exposition, as far as there are samples."""
    found = {}
    for family in text_string_to_metric_families(text):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        found[name] = (family.type, labels)
    return found


def test_the_table_names_every_metric_with_its_type_and_nothing_else(service: Any, namespace: str) -> None:
    item = {"item_id": "lamp", "text": "a lamp"}
    service.tokenize(item, namespace=namespace)
    table, said = documented(), told(service.http.get("/metrics").text)

    assert {name: kind for name, (kind, _) in said.items()} == {name: kind for name, (kind, _) in table.items()}
    assert len(said) > 20
    for name, (_, labels) in said.items():
        assert labels in (set(), table[name][1])


def test_the_table_has_the_labels_of_every_metric() -> None:
    table = documented()
    wrappers = [value for value in vars(Metrics()).values() if isinstance(value, MetricWrapperBase)]

    assert len(wrappers) == len([name for name in table if name.startswith("semid_")])
    for wrapper in wrappers:
        name = f"{wrapper._name}_total" if wrapper._type == "counter" else wrapper._name
        assert table[name][1] == set(wrapper._labelnames)


@pytest.fixture
def grown(service: Any) -> Callable[..., float]:
    """By how much a metric has grown since the test began."""
    before: dict[tuple[Any, ...], float] = {}

    def since(name: str, **labels: str) -> float:
        key = (name, *sorted(labels.items()))
        now = service.metric(name, **labels)
        return now - before.setdefault(key, now)

    return since


@pytest.mark.parametrize("many", [False, True], ids=["one by one", "by columns"])
def test_items_with_a_suffix_above_0_are_collisions(
    service: Any, grown: Callable[..., float], namespace: str, *, many: bool
) -> None:
    grown("semid_collisions_total")
    rows = [{"item_id": f"{i}", "text": "the very same lamp"} for i in range(20 if many else 3)]

    service.tokenize(*rows, namespace=namespace)
    service.tokenize(*rows, namespace=namespace)  # known: no collisions anew

    assert grown("semid_collisions_total") == len(rows) - 1


@pytest.fixture
def ranked() -> Iterator[tuple[Metrics, ErrorWindow]]:
    metrics = Metrics()
    training = TrainingErrors(5.0, (1.0, 2.0, 3.0, 5.0, 7.0, 9.0, 10.0))
    window = ErrorWindow(training)
    window.begin("small@1", metrics.ranks_of_model("small@1"))
    return metrics, window


def test_drift_is_told_by_ranks_among_the_training_items(ranked: tuple[Metrics, ErrorWindow]) -> None:
    import torch

    metrics, window = ranked
    window.observe(torch.tensor([0.5, 1.0, 5.0, 8.0, 9.5, 11.0, 12.0]))
    window.observe(torch.tensor([4.0]))

    text = metrics.render().decode()
    found = {bound: float(count) for bound, count in re.findall(r'rank_bucket\{le="([\d.+Inf]+)".*\} (\S+)', text)}
    expected = {"0.01": 2, "0.05": 2, "0.25": 2, "0.5": 4, "0.75": 4, "0.95": 5, "0.99": 6, "+Inf": 8}
    assert found == expected
    total = float(re.search(r"rank_sum\{.*\} (\S+)", text)[1])
    assert total == pytest.approx(np.sum([0, 0.01, 0.5, 0.85, 0.97, 1, 1, 0.375]))

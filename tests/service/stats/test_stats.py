"""`GET /stats`: the figures of the live items, counted anew from their codes, and of the training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from models import Trie
from models.evaluation.measures import collisions, usage
from service.stats import queries
from service.stats.usage import use_of

MakeEmbedding = Callable[[int], list[float]]
SIZES = (4, 300, 7)


def of(service: Any, namespace: str, **query: Any) -> dict[str, Any]:
    response = service.http.get("/stats", params={"namespace": namespace, **query})
    assert response.status_code == 200, response.text
    return response.json()


def test_the_use_of_a_trie_is_that_of_its_codes() -> None:
    generator = torch.Generator().manual_seed(7)
    codes = torch.stack([torch.randint(size, (500,), generator=generator) ** 2 // size for size in SIZES], dim=1)
    groups, place = codes.unique(dim=0, return_inverse=True)
    suffixes = torch.tensor([int((place[:row] == place[row]).sum()) for row in range(len(codes))])

    use = use_of(Trie.of(torch.column_stack([codes, suffixes]), SIZES))

    assert (use.items, use.groups) == (500, len(groups))
    for level, (found, expected) in enumerate(zip(use.levels, usage(codes, SIZES), strict=True)):
        assert found.counts.tolist() == codes[:, level].bincount(minlength=SIZES[level]).tolist()
        assert found.used / SIZES[level] == pytest.approx(expected.used)
        assert (found.perplexity, found.entropy) == pytest.approx((expected.perplexity, expected.entropy))
    expected_collisions = collisions(codes)
    assert use.collision_rate == pytest.approx(expected_collisions.rate)
    assert use.group_sizes == expected_collisions.group_sizes
    assert use.largest_group == expected_collisions.largest_group


def test_the_statistics_follow_what_is_live(service: Any, namespace: str, make_embedding: MakeEmbedding) -> None:
    items = [{"item_id": f"{i}", "embedding": make_embedding(i % 20)} for i in range(40)]
    entries = service.tokenize(*items, namespace=namespace)
    service.until(lambda: of(service, namespace)["items"] == 40, "40 items are counted")
    service.http.delete("/assignment/3", params={"namespace": namespace})
    service.until(lambda: of(service, namespace)["items"] == 39, "the retired item is counted no more")

    stats = of(service, namespace, codewords=True)

    codes = torch.tensor([entry["codes"] for entry in entries if entry["item_id"] != "3"])
    counts = [codes[:, level].bincount(minlength=16).tolist() for level in range(3)]
    assert [level["counts"] for level in stats["levels"]] == counts
    assert [level["used"] for level in stats["levels"]] == [sum(count > 0 for count in level) for level in counts]
    assert sum(int(size) * groups for size, groups in stats["collisions"]["group_sizes"].items()) == 39
    assert stats["collisions"]["rate"] == pytest.approx(1 - len(codes.unique(dim=0)) / 39)
    assert stats["revision"] == 41
    assert of(service, namespace)["levels"][0]["counts"] is None


def test_a_record_that_has_not_changed_is_not_counted_again(
    service: Any, namespace: str, make_embedding: MakeEmbedding
) -> None:
    service.tokenize({"item_id": "a", "embedding": make_embedding(1)}, namespace=namespace)
    service.until(lambda: of(service, namespace)["items"] == 1, "the item is counted")

    told = {of(service, namespace)["counted_at"] for _ in range(5)}

    assert len(told) == 1


def test_counting_has_a_twentieth_of_the_time(
    service: Any, namespace: str, make_embedding: MakeEmbedding, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.tokenize({"item_id": "a", "embedding": make_embedding(1)}, namespace=namespace)
    first = of(service, namespace)
    monkeypatch.setattr(queries, "PAUSES", 1e6)

    service.tokenize({"item_id": "b", "embedding": make_embedding(2)}, namespace=namespace)
    soon = of(service, namespace)
    monkeypatch.setattr(queries, "PAUSES", 0)
    later = of(service, namespace)

    assert (soon["counted_at"], soon["items"]) == (first["counted_at"], 1)
    assert (later["items"], later["revision"]) == (2, 2)


def test_an_empty_record_has_figures_too(service: Any, namespace: str) -> None:
    stats = of(service, namespace)

    assert (stats["items"], stats["revision"]) == (0, 0)
    assert [level["perplexity"] for level in stats["levels"]] == [0, 0, 0]
    assert (stats["collisions"]["rate"], stats["collisions"]["largest_group"]) == (0, 0)


def test_the_figures_of_the_training_stand_beside_those_of_the_live_items(
    start_service: Callable[..., Any], families: dict[str, Any], data_dir: Any, make_embedding: MakeEmbedding
) -> None:
    service = start_service(checkpoint=families["rq-kmeans"], data_dir=data_dir)
    try:
        (manifest,) = service.http.get("/tokenizers").json()["tokenizers"]
        width = manifest["widths"][0]
        items = [{"item_id": f"{i}", "embedding": make_embedding(i)[:width]} for i in range(120)]
        service.tokenize(*items, assign=False)

        stats = of(service, "default")
    finally:
        service.stop()

    report = manifest["report"]
    assert [level["training"] for level in stats["levels"]] == report["levels"]
    assert stats["collisions"]["training"]["rate"] == report["collisions"]["rate"]
    assert stats["drift"]["training"] == report["quantization_error"]
    assert stats["drift"]["rows"] == sum(stats["drift"]["counts"]) == 120
    assert sum(stats["drift"]["expected_shares"]) == pytest.approx(1)
    assert stats["drift"]["verdict"] == "retrain"

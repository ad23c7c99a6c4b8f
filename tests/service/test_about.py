"""What the service says of itself over HTTP: health, manifests, metrics, pages, its API."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

MakeEmbedding = Callable[[int], list[float]]
TYPE = "urn:semid:problem:"


def test_the_service_says_that_it_is_well(service: Any) -> None:
    assert service.http.get("/healthz").json() == {"alive": True}
    assert service.http.get("/readyz").json() == {"ready": True}


def test_the_loaded_tokenizer_shows_its_manifest(service: Any, tokenizer: Any) -> None:
    answer = service.http.get("/tokenizers").json()

    (manifest,) = answer["tokenizers"]
    assert answer["default"] == manifest["tokenizer"] == tokenizer.full_name
    assert manifest["codebook_sizes"] == [16, 16, 16]
    assert manifest["components"]["text_encoder"]["weights"]["sha256"].startswith("53aa5117")


def test_the_metrics_count_items_by_outcome(service: Any, namespace: str) -> None:
    def count(outcome: str) -> float:
        return service.metric("semid_items_total", outcome=outcome)

    outcomes = ("created", "known", "existing", "dry_run", "failed")
    before = {outcome: count(outcome) for outcome in outcomes}

    service.tokenize(
        {"item_id": "a", "text": "x"}, {"item_id": "b", "text": "x"}, {"item_id": "c"}, namespace=namespace
    )
    service.tokenize({"item_id": "a", "text": "x"}, {"item_id": "b", "text": "y"}, namespace=namespace)
    service.tokenize({"item_id": "d", "text": "x"}, namespace=namespace, assign=False)

    assert {outcome: count(outcome) - before[outcome] for outcome in outcomes} == {
        "created": 2,
        "known": 1,
        "existing": 1,
        "dry_run": 1,
        "failed": 1,
    }


def test_the_metrics_name_routes_and_not_paths(service: Any) -> None:
    service.http.get("/assignment/secret-item")
    service.http.get("/nowhere/secret-item")

    response = service.http.get("/metrics")

    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "secret-item" not in response.text
    assert 'route="/assignment/{item_id}"' in response.text


def test_the_pages_need_nothing_from_elsewhere(service: Any) -> None:
    for path in ("/docs", "/"):
        page = service.http.get(path)
        assert page.status_code == 200
        assert page.headers["content-type"].startswith("text/html")
        assert 'src="http' not in page.text
        assert 'href="https://cdn' not in page.text


def test_the_openapi_document_knows_every_route(service: Any) -> None:
    document = service.http.get("/openapi.json").json()

    assert set(document["paths"]) >= {
        *("/tokenize", "/lookup", "/item/{semantic_id}", "/assignment/{item_id}", "/assignments", "/retire"),
        *("/tokenizers", "/healthz", "/readyz", "/metrics"),
    }


def test_an_answer_is_valid_json_whatever_the_numbers(service: Any, namespace: str) -> None:
    huge = np.full(384, 3e38).tolist()
    tiny = [1e-45, *[0.0] * 383]

    entries = service.tokenize(
        {"item_id": "huge", "embedding": huge}, {"item_id": "tiny", "embedding": tiny}, namespace=namespace
    )

    assert [entry["created"] for entry in entries] == [True, True]

"""Where those before were new, contents are encoded without asking the registry first; the answer is the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

from service.novelty import Novelty


class Called:
    """What was called for the requests within."""

    def __init__(self, service: Any) -> None:
        self._service = service

    def __enter__(self) -> Self:
        self._before = self._counts()
        return self

    def __exit__(self, *_: object) -> None:
        self.recalls, self.claims, self.texts = (
            after - before for after, before in zip(self._counts(), self._before, strict=True)
        )

    def _counts(self) -> tuple[float, ...]:
        calls = (self._service.metric("semid_registry_seconds_count", call=call) for call in ("recall", "claim"))
        return *calls, self._service.metric("semid_batch_rows_sum")


def embeddings(ids: range, make_embedding: Callable[[int], list[float]]) -> list[dict[str, Any]]:
    return [{"item_id": f"{i}", "embedding": make_embedding(i)} for i in ids]


def text(number: int) -> dict[str, str]:
    return {"item_id": f"{number}", "text": f"kettle {number}"}


def test_texts_of_a_feed_of_new_ones_are_not_asked_for_first(service: Any, namespace: str) -> None:
    first = [service.tokenize(text(i), namespace=namespace)[0] for i in range(10)]

    with Called(service) as called:
        later = [service.tokenize(text(i), namespace=namespace)[0] for i in range(10, 15)]

    assert all(entry["created"] for entry in first + later)
    assert (called.recalls, called.claims, called.texts) == (0, 5, 5)


def test_a_known_text_that_was_not_asked_for_is_answered_as_one_that_was(service: Any, namespace: str) -> None:
    created = [service.tokenize(text(i), namespace=namespace)[0] for i in range(10)]

    with Called(service) as called:
        unasked = service.tokenize(text(3), namespace=namespace)[0]
    with Called(service) as again:
        asked = service.tokenize(text(3), namespace=namespace)[0]

    assert (called.recalls, again.recalls, again.texts) == (0, 1, 0)
    assert unasked == asked
    assert unasked["semantic_id"] == created[3]["semantic_id"]
    assert not unasked["created"]


def test_a_changed_text_that_was_not_asked_for_keeps_its_id_and_says_so(service: Any, namespace: str) -> None:
    created = [service.tokenize(text(i), namespace=namespace)[0] for i in range(10)]

    changed = service.tokenize({"item_id": "3", "text": "a garden hose"}, namespace=namespace)[0]

    assert changed["semantic_id"] == created[3]["semantic_id"]
    assert changed["content_changed"]


def test_a_bulk_of_embeddings_after_new_ones_is_not_asked_for_first_and_is_answered_alike(
    service: Any, namespace: str, make_embedding: Callable[[int], list[float]]
) -> None:
    for start in range(0, 160, 20):
        service.tokenize(*embeddings(range(start, start + 20), make_embedding), namespace=namespace)

    with Called(service) as called:
        new = service.tokenize(*embeddings(range(160, 192), make_embedding), namespace=namespace)
    mixed = [*embeddings(range(8), make_embedding), *embeddings(range(192, 202), make_embedding)]
    mixed[1]["embedding"] = make_embedding(500)  # of a known item
    unasked = service.tokenize(*mixed, namespace=namespace)
    asked = service.tokenize(*mixed, namespace=namespace)

    assert (called.recalls, called.claims, called.texts) == (0, 1, 32)
    assert all(entry["created"] for entry in new)
    assert [entry["created"] for entry in unasked] == [False] * 8 + [True] * 10
    assert [entry["margin"] is None for entry in unasked] == [True, False, *[True] * 6, *[False] * 10]
    assert [entry["content_changed"] for entry in unasked] == [False, True, *[False] * 16]
    assert [entry["semantic_id"] for entry in unasked] == [entry["semantic_id"] for entry in asked]


def test_known_texts_are_asked_for_until_nearly_all_are_new() -> None:
    class Record:
        pass

    novelty, one, other = Novelty(), Record(), Record()
    expected = []
    for share in [1.0] * 9 + [0.0] + [1.0] * 3:
        novelty.saw(one, share)
        expected.append(novelty.expected(one))

    assert expected == [False] * 5 + [True] * 4 + [False] * 4
    assert not novelty.expected(other)


def test_new_texts_are_unlikely_once_hardly_any_came() -> None:
    class Record:
        pass

    novelty, one, other = Novelty(), Record(), Record()
    unlikely = []
    for share in [0.3] + [0.0] * 6 + [1.0]:
        novelty.saw(one, share)
        unlikely.append(novelty.unlikely(one))

    assert unlikely == [False] * 6 + [True, False]
    assert not novelty.unlikely(other)

"""Items whose codes are full: the next-nearest codeword that has a suffix left, where the namespace is so set."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from models import Tokenizer, load
from service.overflow import Overflow, OverflowPolicy
from service.schemas import TokenizeRequest

MakeEmbedding = Callable[[int], list[float]]
TYPE = "urn:semid:problem:"


@pytest.fixture(scope="module")
def narrow(make_checkpoint: Callable[..., Path]) -> Path:
    """A checkpoint with two suffixes for each codes."""
    return make_checkpoint("narrow", 4, 32, max_suffix=1, takes_text=False, seed=4)


@pytest.fixture(scope="module")
def few(make_checkpoint: Callable[..., Path]) -> Path:
    """A checkpoint with one suffix, and fewer codewords than alternatives are kept."""
    return make_checkpoint("few", 4, 3, max_suffix=0, takes_text=False, seed=5)


@pytest.fixture(scope="module")
def shop(start_service: Callable[..., Any], narrow: Path, few: Path) -> Iterator[Any]:
    """A service where every namespace overflows but the one named `strict`."""
    directory = Path(tempfile.mkdtemp(prefix="semid-"))
    policy = {"strict": "error", "*": "next_nearest"}
    running = start_service(data_dir=directory, checkpoint=narrow, further_checkpoints=(few,), overflow=policy)
    yield running
    running.stop()
    shutil.rmtree(directory, ignore_errors=True)


def nearest(tokenizer: Tokenizer, embedding: list[float]) -> tuple[list[int], list[int]]:
    """The codes of all levels but the last, and the last level's codewords by their distance, by brute force."""
    residual = tokenizer._exact_network(torch.tensor([embedding], dtype=torch.float64))[0]
    *upper, last = [codebook.detach() for codebook in tokenizer._exact_quantizer.codebooks]
    codes = []
    for codebook in upper:
        codes.append(int((codebook - residual).square().sum(1).argmin()))
        residual = residual - codebook[codes[-1]]
    return codes, (last - residual).square().sum(1).argsort(stable=True).tolist()


def test_equal_contents_go_to_the_next_nearest_codes_in_order_until_all_16_are_full(
    shop: Any, narrow: Path, namespace: str, make_embedding: MakeEmbedding
) -> None:
    upper, ranked = nearest(load(narrow), make_embedding(1))
    items = [{"item_id": f"{i}", "embedding": make_embedding(1)} for i in range(36)]

    entries = [
        entry for start in range(0, 36, 5) for entry in shop.tokenize(*items[start : start + 5], namespace=namespace)
    ]

    placed = entries[:32]
    assert [entry["codes"] for entry in placed] == [[*upper, code] for code in ranked[:16] for _ in range(2)]
    assert [entry["suffix"] for entry in placed] == [0, 1] * 16
    assert [entry.get("overflow") for entry in placed] == [None, None, *[True] * 30]
    assert all(entry["created"] and not entry["content_changed"] for entry in placed)
    assert {entry["error"]["type"] for entry in entries[32:]} == {TYPE + "suffix_exhausted"}


def test_an_item_placed_so_keeps_its_id_while_its_content_is_the_same(
    shop: Any, namespace: str, make_embedding: MakeEmbedding
) -> None:
    items = [{"item_id": f"{i}", "embedding": make_embedding(1)} for i in range(3)]
    *_, placed = shop.tokenize(*items, namespace=namespace)
    where = {"namespace": namespace}

    (again,) = shop.tokenize(items[2], **where)
    (reassigned,) = shop.tokenize(items[2], on_change="reassign", **where)
    found = shop.http.get(f"/item/{placed['semantic_id']}", params=where).json()
    explained, elsewhere = (
        shop.http.post("/explain", json={"item": {"item_id": "2", "embedding": make_embedding(seed)}, **where}).json()
        for seed in (1, 3)
    )
    shop.http.delete("/assignment/2", params=where)
    (returned,) = shop.tokenize(items[2], on_change="reassign", **where)

    assert placed["overflow"]
    for entry in (again, reassigned, returned):
        assert entry["semantic_id"] == placed["semantic_id"]
        assert not entry["created"]
        assert not entry["content_changed"]
        assert "overflow" not in entry
    assert (found["item_id"], found["content_changed"]) == ("2", False)
    assert (explained["semantic_id"], explained["content_changed"]) == (placed["semantic_id"], False)
    assert (elsewhere["semantic_id"], elsewhere["content_changed"]) == (placed["semantic_id"], True)


def test_content_that_comes_back_gets_its_codes_also_where_another_caller_was_faster(
    shop: Any, namespace: str, make_embedding: MakeEmbedding, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given a retired item, and a caller who brings it back with other content between our look and our claim
    mine, others = ({"item_id": "hot", "embedding": make_embedding(seed)} for seed in (1, 2))
    (held,) = shop.tokenize(mine, namespace=namespace)
    shop.http.delete("/assignment/hot", params={"namespace": namespace})
    tokenization = shop.state.entries._tokenization
    place, places = tokenization._place, list[Any]()

    async def overtaken(*arguments: Any) -> Any:
        places.append(arguments)
        monkeypatch.setattr(tokenization, "_place", place)
        request = TokenizeRequest(items=[others], namespace=namespace, on_change="reassign")
        (faster,) = (await shop.state.entries.tokenize(request))["items"]
        assert faster["codes"] != held["codes"]
        return await place(*arguments)

    monkeypatch.setattr(tokenization, "_place", overtaken)
    # when
    (answer,) = shop.tokenize(mine, namespace=namespace, on_change="reassign")
    # then
    assert places
    assert (answer["semantic_id"], answer["content_changed"]) == (held["semantic_id"], False)


def test_it_comes_back_to_its_id_also_where_the_namespace_no_longer_overflows(
    shop: Any, namespace: str, make_embedding: MakeEmbedding, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = [{"item_id": f"{i}", "embedding": make_embedding(1)} for i in range(3)]
    *_, placed = shop.tokenize(*items, namespace=namespace)
    shop.http.delete("/assignment/2", params={"namespace": namespace})
    monkeypatch.setattr(shop.state.entries._tokenization, "_overflow", OverflowPolicy({}))

    (returned,) = shop.tokenize(items[2], namespace=namespace, on_change="reassign")

    assert (returned["semantic_id"], returned["created"]) == (placed["semantic_id"], False)


def test_a_reassigned_item_may_overflow_too(
    shop: Any, narrow: Path, namespace: str, make_embedding: MakeEmbedding
) -> None:
    tokenizer = load(narrow)
    upper, ranked = nearest(tokenizer, make_embedding(1))
    elsewhere = next(seed for seed in range(2, 100) if nearest(tokenizer, make_embedding(seed))[0] != upper)
    shop.tokenize(*[{"item_id": f"{i}", "embedding": make_embedding(1)} for i in range(2)], namespace=namespace)
    shop.tokenize({"item_id": "moves", "embedding": make_embedding(elsewhere)}, namespace=namespace)

    (moved,) = shop.tokenize(
        {"item_id": "moves", "embedding": make_embedding(1)}, namespace=namespace, on_change="reassign"
    )

    assert (moved["codes"], moved["created"], moved["overflow"]) == ([*upper, ranked[1]], True, True)


def test_a_dry_run_shows_the_nearest_codes_and_that_they_are_full(
    shop: Any, namespace: str, make_embedding: MakeEmbedding
) -> None:
    first, _ = shop.tokenize(
        *[{"item_id": f"{i}", "embedding": make_embedding(1)} for i in range(2)], namespace=namespace
    )

    (preview,) = shop.tokenize({"item_id": "new", "embedding": make_embedding(1)}, namespace=namespace, assign=False)

    assert (preview["codes"], preview["group_size"], preview["semantic_id"]) == (first["codes"], 2, None)
    assert "overflow" not in preview
    assert shop.assigned(namespace).keys() == {"0", "1"}


def test_a_namespace_that_is_set_otherwise_has_the_error(shop: Any, make_embedding: MakeEmbedding) -> None:
    entries = shop.tokenize(
        *[{"item_id": f"{i}", "embedding": make_embedding(1)} for i in range(3)], namespace="strict"
    )

    assert [entry.get("suffix") for entry in entries] == [0, 1, None]
    assert entries[2]["error"]["type"] == TYPE + "suffix_exhausted"


def test_a_codebook_of_fewer_codewords_offers_all_it_has(
    shop: Any, few: Path, namespace: str, make_embedding: MakeEmbedding
) -> None:
    upper, ranked = nearest(load(few), make_embedding(1))
    counted = shop.metric("semid_overflows_total")
    items = [{"item_id": f"{i}", "embedding": make_embedding(1)} for i in range(4)]

    entries = shop.tokenize(*items, namespace=namespace, tokenizer="few")

    assert [entry.get("codes") for entry in entries] == [*[[*upper, code] for code in ranked], None]
    assert shop.metric("semid_overflows_total") == counted + 2


def test_callers_who_fill_the_same_codes_at_once_share_all_places_and_no_id(
    shop: Any, narrow: Path, namespace: str, make_embedding: MakeEmbedding
) -> None:
    upper, ranked = nearest(load(narrow), make_embedding(1))
    requests = [[{"item_id": f"{k}-{i}", "embedding": make_embedding(1)} for i in range(5)] for k in range(8)]

    with ThreadPoolExecutor(8) as callers:
        answers = list(callers.map(lambda items: shop.tokenize(*items, namespace=namespace), requests))

    held = [entry["semantic_id"] for answer in answers for entry in answer if "error" not in entry]
    prefix = "-".join(map(str, upper))
    assert sorted(held) == sorted(f"{prefix}-{code}-{suffix}" for code in ranked[:16] for suffix in (0, 1))
    assert sum("error" in entry for answer in answers for entry in answer) == 40 - 32


def test_only_items_whose_codes_are_full_go_through_the_model_again(
    shop: Any, namespace: str, make_embedding: MakeEmbedding
) -> None:
    rows = shop.metric("semid_batch_rows_sum")

    shop.tokenize(*[{"item_id": f"{i}", "embedding": make_embedding(1)} for i in range(5)], namespace=namespace)

    assert shop.metric("semid_batch_rows_sum") == rows + 5 + 3


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ({}, [0, 0]),
        ({"a": Overflow.NEXT_NEAREST}, [16, 0]),
        ({"*": Overflow.NEXT_NEAREST}, [16, 16]),
        ({"*": Overflow.NEXT_NEAREST, "a": Overflow.ERROR}, [0, 16]),
    ],
)
def test_alternatives_are_ranked_only_where_the_namespace_wants_them(
    policy: dict[str, Overflow], expected: list[int]
) -> None:
    assert [OverflowPolicy(policy).candidates(namespace) for namespace in ("a", "b")] == expected

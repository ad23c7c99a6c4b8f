"""How a content comes to its codes, over HTTP; the oracle is plain arithmetic in float64 on the frozen parts."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models import Explanation, Tokenizer, read_manifest
from models.checkpoint import load_parts
from service.errors import EncodingFailed, Overloaded
from service.explaining.explainer import WAITING, Explainer
from service.explaining.explainer import Path as Codepath

MakeEmbedding = Callable[[int], list[float]]
TYPE = "urn:semid:problem:"


def explain(service: Any, item: dict[str, Any], **members: Any) -> dict[str, Any]:
    response = service.http.post("/explain", json={"item": item, **members})
    assert response.status_code == 200, response.text
    return response.json()


def oracle(checkpoint: Path, embedding: torch.Tensor) -> list[tuple[int, float, float]]:
    """Of each level the code, its margin and the norm of what is left, of one embedding (D,) float64."""
    parts = load_parts(checkpoint, read_manifest(checkpoint))
    residual = parts.network.double()(embedding[None])[0].detach()
    found = []
    for codebook in (one.detach().double() for one in parts.quantizer.codebooks):
        distances = [float((residual - codeword).square().sum()) for codeword in codebook]
        code = min(range(len(distances)), key=distances.__getitem__)
        margin = min(
            (distances[other] - distances[code]) / (2 * float((codebook[other] - codebook[code]).norm()))
            for other in range(len(distances))
            if other != code
        )
        residual = residual - codebook[code]
        found.append((code, margin, float(residual.norm())))
    return found


def test_each_level_tells_its_code_its_margin_and_what_is_left(
    service: Any, checkpoint: Path, namespace: str, make_embedding: MakeEmbedding
) -> None:
    for seed in range(5):
        answer = explain(service, {"embedding": make_embedding(seed)}, namespace=namespace)

        expected = oracle(checkpoint, torch.tensor(make_embedding(seed), dtype=torch.float32).double())
        assert answer["codes"] == [code for code, _, _ in expected]
        assert [level["margin"] for level in answer["levels"]] == pytest.approx([margin for _, margin, _ in expected])
        assert [level["residual_norm"] for level in answer["levels"]] == pytest.approx([n for _, _, n in expected])
        assert answer["margin"] == min(level["margin"] for level in answer["levels"])
        assert answer["quantization_error"] == pytest.approx(answer["levels"][-1]["residual_norm"] ** 2)


def test_a_text_has_the_codes_that_it_is_tokenized_to(service: Any, tokenizer: Tokenizer, namespace: str) -> None:
    text = "Cordless electric kettle, stainless steel, 1.7 l"
    (entry,) = service.tokenize({"item_id": "kettle", "text": text}, namespace=namespace)

    answer = explain(service, {"text": text}, namespace=namespace)

    assert answer["codes"] == entry["codes"]
    assert answer["latent_norm"] == pytest.approx(
        float(tokenizer.canonical_latents(tokenizer.split([text])).norm()), rel=1e-9
    )
    assert answer["quantization_error"] == pytest.approx(entry["quantization_error"], rel=1e-3)  # final in int16


@pytest.mark.parametrize("second", ["second", "-"])
def test_the_id_it_would_get_is_the_one_it_gets(
    service: Any, namespace: str, make_embedding: MakeEmbedding, second: str
) -> None:
    service.tokenize({"item_id": "first", "embedding": make_embedding(1)}, namespace=namespace)

    told = explain(service, {"item_id": second, "embedding": make_embedding(1)}, namespace=namespace)
    (given,) = service.tokenize({"item_id": second, "embedding": make_embedding(1)}, namespace=namespace)
    again = explain(service, {"item_id": second, "embedding": make_embedding(2)}, namespace=namespace)

    assert (told["semantic_id"], told["tokens"]) == (given["semantic_id"], given["tokens"])
    assert (told["held"], told["group_size"], told["content_changed"]) == (False, 1, False)
    assert told["item_id"] == second
    assert (again["semantic_id"], again["held"], again["content_changed"]) == (given["semantic_id"], True, True)


def test_nothing_is_written(service: Any, namespace: str, make_embedding: MakeEmbedding) -> None:
    explain(service, {"item_id": "a", "embedding": make_embedding(1)}, namespace=namespace)

    assert service.assigned(namespace) == {}


def test_the_nearest_items_share_the_longest_prefixes(
    service: Any, namespace: str, make_embedding: MakeEmbedding
) -> None:
    items = [{"item_id": f"{seed}", "embedding": make_embedding(seed)} for seed in range(60)]
    entries = service.tokenize(*items, namespace=namespace)

    answer = explain(service, {"item_id": "7", "embedding": make_embedding(7)}, namespace=namespace, neighbours=5)

    def shared(codes: list[int]) -> int:
        pairs = zip(codes, answer["codes"], strict=True)
        return next((level for level, (one, other) in enumerate(pairs) if one != other), len(codes))

    lengths = sorted((shared(entry["codes"]) for entry in entries if entry["item_id"] != "7"), reverse=True)
    assert [near["shared_levels"] for near in answer["nearest"]] == [length for length in lengths[:5] if length]
    assert [shared(near["codes"]) for near in answer["nearest"]] == [n["shared_levels"] for n in answer["nearest"]]
    assert "7" not in [near["item_id"] for near in answer["nearest"]]
    counts = [sum(shared(entry["codes"]) >= level for entry in entries) for level in (1, 2, 3)]
    assert [level["count"] for level in answer["levels"]] == counts


@pytest.mark.parametrize(
    ("item", "kind"),
    [({"text": " "}, "invalid_text"), ({}, "invalid_content"), ({"embedding": [1.0]}, "invalid_embedding")],
)
def test_a_faulty_content_is_a_problem_with_the_items_own_type(service: Any, item: dict[str, Any], kind: str) -> None:
    response = service.http.post("/explain", json={"item": item})

    assert response.status_code == 422
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["type"] == TYPE + kind


def test_a_namespace_that_is_looked_into_is_not_made(service: Any, namespace: str) -> None:
    answer = explain(service, {"text": "lamp"}, namespace=namespace)

    assert [level["count"] for level in answer["levels"]] == [0, 0, 0]
    assert answer["nearest"] == []
    assert answer["semantic_id"] == "-".join(map(str, [*answer["codes"], 0]))


async def test_whoever_comes_when_many_wait_is_told_to_come_again(tokenizer: Tokenizer) -> None:
    explainer = Explainer(tokenizer)

    answers = await asyncio.gather(*(explainer.explain("lamp") for _ in range(WAITING + 3)), return_exceptions=True)
    again = await explainer.explain("lamp")

    assert [type(answer) for answer in answers] == [Codepath] * WAITING + [Overloaded] * 3
    assert again == answers[0]


class SlowTokenizer:
    """One whose answers come when the test says so."""

    def __init__(self) -> None:
        self.begun: list[float] = []
        self.free = threading.Event()

    def explain(self, content: torch.Tensor) -> Explanation:
        self.begun.append(float(content[0]))
        self.free.wait(10)
        return Explanation(torch.zeros(1, dtype=torch.int64), torch.ones(1), torch.ones(2))


async def test_a_caller_who_leaves_makes_no_room_for_a_second_one_beside_its_own() -> None:
    slow = SlowTokenizer()
    explainer = Explainer(slow)  # type: ignore[arg-type]
    first, second, third = (asyncio.create_task(explainer.explain(np.float32([n]))) for n in range(3))
    async with asyncio.timeout(5):
        while not slow.begun:  # noqa: ASYNC110 - a thread, which nobody tells of
            await asyncio.sleep(0.001)

    first.cancel()
    second.cancel()
    await asyncio.wait({first, second})
    await asyncio.sleep(0.05)
    begun = list(slow.begun)
    slow.free.set()
    await third

    assert begun == [0]
    assert slow.begun == [0, 2]


async def test_what_the_model_fails_on_is_the_items_own_fault(tokenizer: Tokenizer) -> None:
    with pytest.raises(EncodingFailed):
        await Explainer(tokenizer).explain(torch.ones(3).numpy())

"""One service with a tokenizer of every family: nothing in it asks which family a tokenizer is of."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models import load, read_manifest
from models.configuration import configured
from models.tokenizer import FAMILIES
from models.training.train import TrainConfig, config_of, train_checkpoint

Start = Callable[..., Any]
ROWS = np.random.default_rng(5).standard_normal((400, 18)).astype(np.float32)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small checkpoint of each family."""
    directory = tmp_path_factory.mktemp("families")
    np.save(directory / "rows.npy", ROWS)
    for family in FAMILIES:
        settings = ["codebook_sizes=[8, 8, 8]", *(["latent=4", "epochs=1"] if family == "rqvae" else [])]
        config = TrainConfig(name=family, family=family, fit=configured(config_of(family), settings))
        train_checkpoint([directory / "rows.npy"], directory / family, config, say=lambda _: None)
    return {family: directory / family for family in FAMILIES}


@pytest.fixture(scope="module")
def service(start_service: Start, checkpoints: dict[str, Path]) -> Iterator[Any]:
    directory = Path(tempfile.mkdtemp(prefix="semid-"))
    running = start_service(data_dir=directory, further_checkpoints=tuple(checkpoints.values()))
    yield running
    running.stop()
    shutil.rmtree(directory, ignore_errors=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_items_are_tokenized_found_listed_and_masked_under_every_family(
    family: str, service: Any, checkpoints: dict[str, Path], namespace: str
) -> None:
    where = {"namespace": namespace, "tokenizer": family}
    items = [{"item_id": str(n), "embedding": ROWS[n].tolist()} for n in range(40)]

    entries = service.tokenize(*items, **where)
    again = service.tokenize(*items, **where)

    expected = load(checkpoints[family]).encode(torch.from_numpy(ROWS[:40])).codes.tolist()
    assert [entry["codes"] for entry in entries] == expected
    assert [entry["semantic_id"] for entry in again] == [entry["semantic_id"] for entry in entries]
    for entry in entries[:5]:
        first = str(entry["codes"][0])
        assert service.http.get(f"/item/{entry['semantic_id']}", params=where).json()["item_id"] == entry["item_id"]
        listing = service.http.get(f"/prefix/{first}", params=where).json()
        assert entry["item_id"] in [item["item_id"] for item in listing["items"]]
        following = service.http.post("/next", json={"prefixes": [first], **where}).json()["next"][0]["allowed"]
        assert following == sorted({codes[1] for codes in expected if str(codes[0]) == first})


@pytest.mark.parametrize("family", FAMILIES)
def test_prefix_calls_say_whether_a_prefix_is_a_coarser_description(
    family: str, service: Any, checkpoints: dict[str, Path], namespace: str
) -> None:
    where = {"namespace": namespace, "tokenizer": family}
    (entry,) = service.tokenize({"item_id": "a", "embedding": ROWS[0].tolist()}, **where)

    listings = [service.http.get(f"/prefix/{p}", params=where).json() for p in ("", str(entry["codes"][0]))]
    following = service.http.post("/next", json={"prefixes": [""], **where}).json()
    manifests = {each["name"]: each for each in service.http.get("/tokenizers").json()["tokenizers"]}

    coarse = family not in {"pq", "opq"}
    assert [listing["prefix_is_coarse_to_fine"] for listing in listings] == [coarse, coarse]
    assert following["prefix_is_coarse_to_fine"] == coarse
    assert [[item["item_id"] for item in listing["items"]] for listing in listings] == [["a"], ["a"]]
    assert manifests[family]["prefix_is_coarse_to_fine"] == coarse
    assert read_manifest(checkpoints[family]).prefix_is_coarse_to_fine == coarse

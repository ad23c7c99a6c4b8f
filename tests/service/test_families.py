"""One service with a tokenizer of every family: nothing in it asks which family a tokenizer is of."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from models import load, read_manifest
from models.tokenizer import FAMILIES
from tests.families import MAX_SUFFIX, rows_of_families

Start = Callable[..., Any]
ROWS = rows_of_families()[:200]
ITEMS = [{"item_id": str(number), "embedding": row.tolist()} for number, row in enumerate(ROWS[:40])]

every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def service(start_service: Start, families: dict[str, Path]) -> Iterator[Any]:
    directory = Path(tempfile.mkdtemp(prefix="semid-"))
    running = start_service(
        data_dir=directory, further_checkpoints=tuple(families.values()), overflow={"full": "next_nearest"}
    )
    yield running
    running.stop()
    shutil.rmtree(directory, ignore_errors=True)


@every_family
def test_items_are_tokenized_found_listed_and_masked_under_every_family(
    family: str, service: Any, families: dict[str, Path], namespace: str
) -> None:
    where = {"namespace": namespace, "tokenizer": family}

    dry = service.tokenize(*ITEMS, assign=False, **where)
    entries = service.tokenize(*ITEMS, **where)
    again = service.tokenize(*ITEMS, **where)

    expected = load(families[family]).encode(ROWS[:40])
    codes = expected.codes.tolist()
    assert [entry["codes"] for entry in dry] == [entry["codes"] for entry in entries] == codes
    assert [entry["quantization_error"] for entry in entries] == pytest.approx(expected.quantization_error.tolist())
    assert [entry["margin"] for entry in entries] == pytest.approx(expected.margin.tolist(), rel=1e-6)
    assert [entry["semantic_id"] for entry in again] == [entry["semantic_id"] for entry in entries]
    for entry in entries[:5]:
        first = str(entry["codes"][0])
        assert service.http.get(f"/item/{entry['semantic_id']}", params=where).json()["item_id"] == entry["item_id"]
        listing = service.http.get(f"/prefix/{first}", params=where).json()
        assert entry["item_id"] in [item["item_id"] for item in listing["items"]]
        following = service.http.post("/next", json={"prefixes": [first], **where}).json()["next"][0]["allowed"]
        assert following == sorted({path[1] for path in codes if str(path[0]) == first})


@every_family
def test_prefix_calls_say_whether_a_prefix_is_a_coarser_description(
    family: str, service: Any, families: dict[str, Path], namespace: str
) -> None:
    where = {"namespace": namespace, "tokenizer": family}
    (entry,) = service.tokenize(ITEMS[0], **where)

    listings = [service.http.get(f"/prefix/{p}", params=where).json() for p in ("", str(entry["codes"][0]))]
    following = service.http.post("/next", json={"prefixes": [""], **where}).json()
    manifests = {each["name"]: each for each in service.http.get("/tokenizers").json()["tokenizers"]}

    coarse = family not in {"pq", "opq"}
    assert [listing["prefix_is_coarse_to_fine"] for listing in listings] == [coarse, coarse]
    assert following["prefix_is_coarse_to_fine"] == coarse
    assert [[item["item_id"] for item in listing["items"]] for listing in listings] == [["0"], ["0"]]
    assert manifests[family]["prefix_is_coarse_to_fine"] == coarse
    assert read_manifest(families[family]).prefix_is_coarse_to_fine == coarse


@every_family
def test_full_codes_overflow_to_the_next_nearest_codes_of_every_family(
    family: str, service: Any, families: dict[str, Path]
) -> None:
    # given the row with the most alternatives: a node of a tree has as many leaves as it has
    alternatives = load(families[family]).encode(ROWS, alternatives=16).alternatives.tolist()
    row, codes = max(enumerate(map(dict.fromkeys, alternatives)), key=lambda ranked: len(ranked[1]))
    assert len(codes) > 2
    suffixes = range(MAX_SUFFIX + 1)
    items = [{"item_id": f"{i}", "embedding": ROWS[row].tolist()} for i in range(len(codes) * len(suffixes) + 1)]
    # when
    entries = [
        entry
        for start in range(0, len(items), 16)
        for entry in service.tokenize(*items[start : start + 16], namespace="full", tokenizer=family)
    ]
    # then
    path = entries[0]["codes"][:-1]
    placed = [[*path, code, suffix] for code in codes for suffix in suffixes]
    assert [[*entry["codes"], entry["suffix"]] for entry in entries[:-1]] == placed
    assert entries[-1]["error"]["type"] == "urn:semid:problem:suffix_exhausted"

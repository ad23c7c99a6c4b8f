"""Many JSON items are answered by columns as a few are one by one."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from models import Tokenizer
from service.bulk import entries as module
from service.bulk.entries import read_entries
from service.content import Item, ItemReader
from service.errors import ItemError
from tests.service.bulk.test_arrow import LIVES, WORDS, rounded

MakeEmbedding = Callable[[int], list[float]]
SIGNALLING_NAN = 0x7F80_0001  # the bits of a float32 that arithmetic may trap on


def written(numbers: Any) -> str:
    return base64.b64encode(np.asarray(numbers, "<f4").tobytes()).decode()


@pytest.fixture
def reader(tokenizer: Tokenizer) -> ItemReader:
    return ItemReader(tokenizer, max_text_bytes=100)


@pytest.mark.parametrize("life", LIVES.values(), ids=LIVES.keys())
@pytest.mark.parametrize("kind", ["text", "base64", "list", "both"])
def test_a_large_request_is_answered_as_a_small_one(
    service: Any,
    namespace: str,
    make_embedding: MakeEmbedding,
    monkeypatch: pytest.MonkeyPatch,
    life: list[Any],
    kind: str,
) -> None:
    read: list[int] = []
    spied = lambda entries, *rest, **more: read.append(len(entries)) or read_entries(entries, *rest, **more)  # noqa: E731
    for options, items in life:
        if items == [("gone", 0)]:
            for each in (f"{namespace}-few", f"{namespace}-many"):
                assert service.http.delete("/assignment/a", params={"namespace": each}).status_code == 200
            continue
        entries = [
            {"item_id": item_id, "text": WORDS[seed]}
            if kind == "text" or (kind == "both" and seed == 1)
            else {
                "item_id": item_id,
                "embedding": make_embedding(seed) if kind == "list" else written(make_embedding(seed)),
            }
            for item_id, seed in items
        ]
        few = service.tokenize(*entries, namespace=f"{namespace}-few", **options)

        with monkeypatch.context() as patched:
            patched.setattr(module, "FEW", 0)
            patched.setattr(module, "read_entries", spied)
            many = service.tokenize(*entries, namespace=f"{namespace}-many", **options)

        assert rounded(many) == rounded(few)
        assert read.pop() == len(entries)


@pytest.mark.parametrize("base64_is", ["malformed", "sound"])
def test_every_entry_is_read_or_refused_as_it_is_alone(
    reader: ItemReader, make_embedding: MakeEmbedding, base64_is: str
) -> None:
    good = written(make_embedding(1))
    width = reader.shape.dimension
    contents = [good, good[:-4], "", written(np.zeros(width))]
    if base64_is == "malformed":  # then none is decoded with the others
        contents += [good[:-1] + "*", good[:9] + "\n" + good[10:]]
    contents += [written(np.full(width, value)) for value in (np.nan, np.inf)] + [make_embedding(2), [1.0], 7, None]
    for one in (True, False, None, "1", [1.0], 10**400, 1e39, -0.0, 2**70, 1, float("nan")):
        contents.append([*make_embedding(3)[1:], one])
    contents.append(base64.b64encode(np.full(width, SIGNALLING_NAN, "<u4").tobytes()).decode())
    ids = ["a", "", "é" * 128, "é" * 129, "a\0", "\ud800", 7, None]
    entries: list[Any] = [{"item_id": f"item {i}", "embedding": content} for i, content in enumerate(contents)]
    entries += [{"item_id": item_id, "embedding": good} for item_id in ids]
    entries += [None, [], {"item_id": "more", "embedding": good, "colour": "red"}, {"embedding": good, "text": "x"}]

    columns = read_entries(entries, reader)

    assert columns is not None
    for place, entry in enumerate(entries):
        alone = read_alone(reader, entry)
        if isinstance(alone, ItemError):
            assert columns.failures[place].as_error() == alone.as_error()
            continue
        assert columns.item_ids[place] == alone.item_id.encode()
        assert columns.digests[place].tobytes() == alone.digest
        (content,) = columns.contents.at(np.array([place]))
        assert content.tobytes() == alone.content.tobytes()
    assert len(columns.failures) == (29 if base64_is == "malformed" else 27)


def test_tiny_and_huge_embeddings_are_no_zeros_and_no_infinities(reader: ItemReader) -> None:
    width = reader.shape.dimension
    rows = [np.full(width, value, "<f4") for value in (1e-38, 1e-45, 1e38, -1e38, 0.0)]

    columns = read_entries([{"item_id": f"{i}", "embedding": written(row)} for i, row in enumerate(rows)], reader)

    assert columns is not None
    assert list(columns.failures) == [4]


def read_alone(reader: ItemReader, entry: object) -> Item | ItemError:
    try:
        return reader.read(entry)
    except ItemError as error:
        return error


def test_texts_beside_embeddings_are_no_columns(reader: ItemReader, make_embedding: MakeEmbedding) -> None:
    embedding, text = {"item_id": "a", "embedding": make_embedding(1)}, {"item_id": "b", "text": "kettle"}

    assert read_entries([embedding, text], reader) is None
    assert read_entries([embedding, {"item_id": "b", "text": ""}], reader) is not None

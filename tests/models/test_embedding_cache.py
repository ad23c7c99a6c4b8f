"""Embeddings kept between runs, by several processes at once."""

from __future__ import annotations

import io
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tqdm import tqdm

from models.embedding_cache import TOLD_TEXTS, EmbeddingCache, embed_texts
from models.text_encoder import TextEncoder
from models.training.data import Reading, read_training_data


def test_writers_at_the_same_time_lose_nothing_of_each_other(tmp_path: Path, text_encoder: TextEncoder) -> None:
    # given writers that know nothing of each other
    caches = [EmbeddingCache(tmp_path, text_encoder) for _ in range(4)]

    def write(writer: int) -> None:
        for number in range(20):
            caches[writer].add([f"{writer} {number}"], torch.full((1, 3), 100.0 * writer + number))

    # when
    with ThreadPoolExecutor(len(caches)) as threads:
        list(threads.map(write, range(len(caches))))
    # then
    whole = EmbeddingCache(tmp_path, text_encoder)
    for writer in range(len(caches)):
        for number in range(20):
            assert whole.get(f"{writer} {number}").tolist() == [100.0 * writer + number] * 3


def test_the_embedding_that_was_written_last_is_answered(tmp_path: Path, text_encoder: TextEncoder) -> None:
    cache = EmbeddingCache(tmp_path, text_encoder)
    for number in range(20):
        cache.add(["kettle"], torch.full((1, 3), float(number)))

    assert cache.get("kettle").tolist() == [19.0] * 3
    assert EmbeddingCache(tmp_path, text_encoder).get("kettle").tolist() == [19.0] * 3


def test_the_bar_of_a_parquet_file_knows_how_many_texts_there_are(
    tmp_path: Path, text_encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given a row without a text, and the same rows in a file that does not tell their number
    drawn = io.StringIO()

    class Shown(tqdm):  # type: ignore[type-arg]
        def __init__(self, **options: Any) -> None:
            super().__init__(**{**options, "disable": False, "file": drawn})

    monkeypatch.setattr("models.embedding_cache.tqdm", Shown)
    titles = ["kettle", "", "lamp"]
    pq.write_table(pa.table({"item_id": ["1", "2", "3"], "title": titles}), tmp_path / "items.parquet")
    (tmp_path / "items.csv").write_text("item_id,title\n" + "".join(f"{n},{t}\n" for n, t in enumerate(titles)))
    for name, total in (("items.parquet", "2/2"), ("items.csv", "2text")):
        # when
        drawn.truncate(0)
        read_training_data([tmp_path / name], Reading(), text_encoder, lambda _: None)
        # then
        last = drawn.getvalue().rpartition("\r")[2]
        assert re.search(rf"\b{total}\b", last), last


def test_where_no_bar_is_drawn_a_line_says_that_many_texts_are_embedded(
    tmp_path: Path, text_encoder: TextEncoder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # given a log for standard error, and what is many
    assert TOLD_TEXTS > 2
    monkeypatch.setattr("models.embedding_cache.TOLD_TEXTS", 2)
    # when
    embed_texts(text_encoder, ["kettle", "lamp"], tmp_path)
    # then
    assert capsys.readouterr().err == "embedding 2 texts\n"
    # and what the cache has, or is few, is not told
    embed_texts(text_encoder, ["kettle", "lamp", "chair"], tmp_path)
    assert capsys.readouterr().err == ""

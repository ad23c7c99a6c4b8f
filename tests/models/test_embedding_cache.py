"""Embeddings kept between runs, by several processes at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from models.embedding_cache import EmbeddingCache
from models.text_encoder import TextEncoder


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

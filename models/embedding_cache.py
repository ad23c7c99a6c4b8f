"""Embeddings of texts, computed once: a directory outside the repository, keyed by text encoder and text.

A long catalogue takes minutes to embed; an interrupted or repeated training goes on where the cache ends. Layout:
`<digest of the text encoder>/<number>.safetensors`, each with `keys` (n, 16) uint8 and `embeddings` (n, D) float32.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from models.text_encoder import TextEncoder, WordPieces

# Texts embedded between two writes of the cache.
SHARD_TEXTS = 8192

# Padded word pieces of one forward pass.
BATCH_TOKENS = 4096

KEY_BYTES = 16


class EmbeddingCache:
    """Embeddings by text, of one text encoder.

    Args:
        directory: Made where it does not exist.
        text_encoder: Whose embeddings these are; another one's are never answered.
    """

    def __init__(self, directory: Path, text_encoder: TextEncoder) -> None:
        settings = json.dumps(text_encoder.components, sort_keys=True).encode()
        self._directory = directory / hashlib.sha256(settings).hexdigest()[:32]
        self._directory.mkdir(parents=True, exist_ok=True)
        self._place: dict[bytes, tuple[int, int]] = {}
        self._shards: list[Tensor] = []
        for path in sorted(self._directory.glob("*.safetensors")):
            shard = load_file(path)
            self._take(shard["keys"], shard["embeddings"])

    def get(self, text: str) -> Tensor | None:
        """The embedding (D,) float32, or None where it is not here."""
        place = self._place.get(key(text))
        return None if place is None else self._shards[place[0]][place[1]]

    def add(self, texts: Sequence[str], embeddings: Tensor) -> None:
        """Keep embeddings (n, D) float32 of n texts, written whole or not at all."""
        keys = torch.from_numpy(np.frombuffer(b"".join(map(key, texts)), np.uint8).reshape(-1, KEY_BYTES).copy())
        number = len(list(self._directory.glob("*.safetensors")))
        while (target := self._directory / f"{number:06d}.safetensors").exists():
            number += 1
        draft = target.with_suffix(".draft")
        save_file({"keys": keys, "embeddings": embeddings.float().contiguous()}, draft)
        draft.replace(target)
        self._take(keys, embeddings)

    def _take(self, keys: Tensor, embeddings: Tensor) -> None:
        number = len(self._shards)
        for row, stored in enumerate(keys.numpy()):
            self._place[stored.tobytes()] = (number, row)
        self._shards.append(embeddings)


def key(text: str) -> bytes:
    """What a text is kept under."""
    return hashlib.sha256(text.strip().encode("utf-8", "surrogatepass")).digest()[:KEY_BYTES]


def embed_texts(text_encoder: TextEncoder, texts: Sequence[str], cache_directory: Path | None = None) -> Tensor:
    """The embeddings (N, D) float32 of texts, with a progress bar; what the cache has is not computed again."""
    cache = EmbeddingCache(cache_directory, text_encoder) if cache_directory else None
    embeddings = torch.empty(len(texts), text_encoder.dimension)
    missing = []
    for row, text in enumerate(texts):
        known = cache.get(text) if cache else None
        if known is None:
            missing.append(row)
        else:
            embeddings[row] = known
    with tqdm(total=len(missing), desc="embedding", unit="text", disable=not missing) as bar:
        for start in range(0, len(missing), SHARD_TEXTS):
            rows = missing[start : start + SHARD_TEXTS]
            embeddings[rows] = _embed_shard(text_encoder, [texts[row] for row in rows], bar)
            if cache:
                cache.add([texts[row] for row in rows], embeddings[rows])
    return embeddings


def _embed_shard(text_encoder: TextEncoder, texts: Sequence[str], bar: tqdm[None]) -> Tensor:
    """Embed texts in batches of similar length."""
    pieces = text_encoder.split(texts)
    embeddings = torch.empty(len(texts), text_encoder.dimension)
    for rows in length_sorted_batches(pieces):
        embeddings[rows] = text_encoder.embed([pieces[row] for row in rows]).float().cpu()
        bar.update(len(rows))
    return embeddings


def length_sorted_batches(pieces: Sequence[WordPieces], budget: int = BATCH_TOKENS) -> Iterator[list[int]]:
    """Row numbers in batches of similar length, each within a budget of padded word pieces."""
    batch: list[int] = []
    for row in sorted(range(len(pieces)), key=lambda row: len(pieces[row])):
        if batch and len(pieces[row]) * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch

"""Embeddings of texts, computed once: a directory outside the repository, keyed by text encoder and text.

A long catalogue takes minutes to embed; an interrupted or repeated training goes on where the cache ends, and several
processes may write at once. Layout: `<digest of the text encoder>/<time>-<lot>.safetensors`, each with `keys` (n, 16)
uint8 and `embeddings` (n, D) float32.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from operator import length_hint
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from models.text_encoder import TextEncoder, WordPieces

# Texts embedded between two writes of the cache.
SHARD_TEXTS = 8192

# Texts to embed from which on it is said in a line where no bar is drawn: fewer take seconds.
TOLD_TEXTS = 512

# Padded word pieces of one forward pass.
BATCH_TOKENS = 4096

KEY_BYTES = 16

# Shards that are searched one by one before they join the index.
RECENT_SHARDS = 16

_Starts: TypeAlias = np.ndarray[tuple[int], np.dtype[np.uint64]]
_Places: TypeAlias = np.ndarray[tuple[int], np.dtype[np.int64]]


class EmbeddingCache:
    """Embeddings by text, of one text encoder. They stay on disk; memory holds 16 bytes of each.

    Args:
        directory: Made where it does not exist.
        text_encoder: Whose embeddings these are; another one's are never answered.
    """

    def __init__(self, directory: Path, text_encoder: TextEncoder) -> None:
        settings = json.dumps(text_encoder.components, sort_keys=True).encode()
        self._directory = directory / hashlib.sha256(settings).hexdigest()[:32]
        self._directory.mkdir(parents=True, exist_ok=True)
        self._shards: list[dict[str, Tensor]] = []
        # The start of each key and where it lies, sorted; and those of the shards that came since.
        self._index = (np.empty(0, np.uint64), np.empty(0, np.int64))
        self._recent: list[tuple[_Starts, _Places]] = []
        for path in sorted(self._directory.glob("*.safetensors")):
            self._take(path)
        self._merge()

    def get(self, text: str) -> Tensor | None:
        """The embedding (D,) float32, or None where it is not here."""
        whole = key(text)
        start = np.frombuffer(whole[:8], np.uint64)
        for starts, places in (*reversed(self._recent), self._index):
            # The last of equals is the latest.
            for place in places[np.searchsorted(starts, start)[0] : np.searchsorted(starts, start, "right")[0]][::-1]:
                shard = self._shards[int(place) >> 32]
                row = int(place) & 0xFFFFFFFF
                if shard["keys"][row].numpy().tobytes() == whole:
                    return shard["embeddings"][row]
        return None

    def add(self, texts: Sequence[str], embeddings: Tensor) -> None:
        """Keep embeddings (n, D) float32 of n texts, written whole or not at all."""
        keys = torch.from_numpy(np.frombuffer(b"".join(map(key, texts)), np.uint8).reshape(-1, KEY_BYTES).copy())
        target = self._directory / f"{time.time_ns():020d}-{secrets.token_hex(4)}.safetensors"
        draft = target.with_suffix(".draft")
        save_file({"keys": keys, "embeddings": embeddings.float().contiguous()}, draft)
        draft.replace(target)
        self._take(target)
        if len(self._recent) >= RECENT_SHARDS:
            self._merge()

    def _take(self, path: Path) -> None:
        # Mapped: what is not looked at is not in memory.
        shard = load_file(path)
        starts = np.ascontiguousarray(shard["keys"].numpy()[:, :8]).view(np.uint64)[:, 0]
        order = starts.argsort(kind="stable")
        self._recent.append((starts[order], order + (len(self._shards) << 32)))
        self._shards.append(shard)

    def _merge(self) -> None:
        starts, places = (np.concatenate(parts) for parts in zip(self._index, *self._recent, strict=True))
        order = starts.argsort(kind="stable")
        self._index, self._recent = (starts[order], places[order]), []


def key(text: str) -> bytes:
    """What a text is kept under."""
    return hashlib.sha256(text.strip().encode("utf-8", "surrogatepass")).digest()[:KEY_BYTES]


def embed_texts(text_encoder: TextEncoder, texts: Sequence[str], cache_directory: Path | None = None) -> Tensor:
    """The embeddings (N, D) float32 of texts, with a progress bar; what the cache has is not computed again."""
    embeddings = torch.empty(len(texts), text_encoder.dimension)

    def keep(rows: Sequence[int], values: Tensor) -> None:
        embeddings[rows] = values

    embed_stream(text_encoder, texts, keep, cache_directory)
    return embeddings


def embed_stream(
    text_encoder: TextEncoder,
    texts: Iterable[str],
    keep: Callable[[Sequence[int], Tensor], None],
    cache_directory: Path | None = None,
) -> None:
    """Embed texts as they come, with a progress bar; what the cache has is not computed again.

    Where standard error is no terminal there is a line instead, before each shard that takes long.

    Args:
        text_encoder: Of the texts.
        texts: Any number; `SHARD_TEXTS` of them are held. What `operator.length_hint` says of them is the bar's total,
            asked again as they come: it may fall where some turn out to be no texts.
        keep: Takes row numbers, increasing, and their embeddings (n, D) float32; what was known comes first.
        cache_directory: Where embeddings are kept between runs.
    """
    cache = EmbeddingCache(cache_directory, text_encoder) if cache_directory else None
    numbered = enumerate(texts)
    missing: list[tuple[int, str]] = []
    with tqdm(total=length_hint(texts) or None, desc="embedding", unit="text", disable=None) as bar:

        def embed() -> None:
            rows, absent = [row for row, _ in missing], [text for _, text in missing]
            if bar.disable and len(absent) >= TOLD_TEXTS:
                tqdm.write(f"embedding {len(absent):,} texts", file=sys.stderr)
            embeddings = _embed_shard(text_encoder, absent, bar)
            keep(rows, embeddings)
            if cache:
                cache.add(absent, embeddings)
            missing.clear()

        while batch := list(islice(numbered, SHARD_TEXTS)):
            bar.total = length_hint(texts) or None
            found = [(row, cache.get(text) if cache else None) for row, text in batch]
            if known := [(row, embedding) for row, embedding in found if embedding is not None]:
                keep([row for row, _ in known], torch.stack([embedding for _, embedding in known]))
                bar.update(len(known))
            for (row, text), (_, embedding) in zip(batch, found, strict=True):
                if embedding is None:
                    missing.append((row, text))
                    if len(missing) == SHARD_TEXTS:
                        embed()
        if missing:
            embed()


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

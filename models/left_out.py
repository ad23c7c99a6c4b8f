"""Which contents a training leaves out, so that tokenizers can be compared on items that none of them saw."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def content_digest(content: bytes) -> bytes:
    """What tells equal contents and decides whether one is left out: 16 bytes."""
    return hashlib.sha256(content).digest()[:16]


def text_digest(text: str) -> bytes:
    """The `content_digest` of a text; white space around it does not count."""
    return content_digest(text.strip().encode("utf-8", "surrogatepass"))


def is_left_out(digest: bytes, share: float) -> bool:
    """Whether the content of this digest is left out of a training that leaves out such a share of all contents.

    The same contents are left out of every training of the same share, whatever the file, family or seed, and those of
    a smaller share are among those of a larger one.
    """
    return int.from_bytes(digest[:8], "big") < share * 2**64


def embedding_digests(embeddings: Tensor) -> list[bytes]:
    """The `content_digest` of each of embeddings (n, D) float32: of its bytes, little-endian."""
    return [content_digest(row.astype("<f4", copy=False).tobytes()) for row in embeddings.cpu().numpy()]


def left_out_rows(embeddings: Tensor, share: float) -> Tensor:
    """(n,) bool: which of embeddings (n, D) float32 a training leaves out."""
    if not share:
        return torch.zeros(len(embeddings), dtype=torch.bool)
    return torch.tensor([is_left_out(digest, share) for digest in embedding_digests(embeddings)], dtype=torch.bool)

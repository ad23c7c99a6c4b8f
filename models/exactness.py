"""Calibration of the fast paths: by how much their latents differ from the canonical ones, and the bound drawn from it.

A row whose margin is within the bound is computed again (P4). The bound is the largest error seen, times a safety
factor that leaves room for other processors, batch shapes and texts.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.tokenizer import ErrorBounds, Tokenizer, TokenizerParts

SAFETY_FACTOR = 32.0
SAMPLE_TEXTS = 96

# Batch size and order of the texts: mixed lengths pad much, sorted ones little.
PASSES = ((1, "mixed"), (3, "mixed"), (7, "sorted"), (32, "mixed"), (96, "mixed"), (96, "sorted"))

# No bound falls below this share of the latents' root mean square, whatever was seen here.
TEXT_FLOOR = 1e-5
EMBEDDING_FLOOR = 1e-10


class Calibration(NamedTuple):
    """Bounds, and how they came about (for the manifest)."""

    bounds: ErrorBounds
    notes: dict[str, Any]


def calibrate(parts: TokenizerParts, embeddings: Tensor, texts: Sequence[str]) -> Calibration:
    """Measure the fast paths of a tokenizer.

    Args:
        parts: What is to be frozen.
        embeddings: (N, D) float32, a sample of the catalogue.
        texts: A sample of the catalogue's texts; empty where the tokenizer takes embeddings only.
    """
    # Unbounded, so that the fast paths answer alone.
    tokenizer = Tokenizer("calibration", parts, ErrorBounds(text=-1.0, embedding=-1.0))
    scale = _latent_scale(parts, embeddings)
    embedding_error = _embedding_error(parts, embeddings)
    embedding_bound = max(SAFETY_FACTOR * embedding_error, EMBEDDING_FLOOR * scale)
    text_errors = _text_errors(parts, texts)
    text_error = max(text_errors.values(), default=0.0)
    text_bound = max(SAFETY_FACTOR * text_error, TEXT_FLOOR * scale)
    margins = tokenizer.encode(embeddings).margin
    notes = {
        "safety_factor": SAFETY_FACTOR,
        "latent_root_mean_square": scale,
        "largest_error": {"text": text_error, "embedding": embedding_error},
        "texts": len(texts[:SAMPLE_TEXTS]),
        "text_errors_by_batch": text_errors,
        "embeddings": len(embeddings),
        "recomputed_share": {
            "text": float((margins <= text_bound).double().mean()),
            "embedding": float((margins <= embedding_bound).double().mean()),
        },
        "canonical_below_float64": _below_float64(parts, texts),
        "torch": torch.__version__,
    }
    return Calibration(ErrorBounds(text=text_bound, embedding=embedding_bound), notes)


def _below_float64(parts: TokenizerParts, texts: Sequence[str]) -> list[str]:
    """Operations of the text encoder's canonical path that are not float64; none, for most."""
    if parts.text_encoder is None or not texts:
        return []
    (pieces,) = parts.text_encoder.split(texts[:1])
    return parts.text_encoder.operations_below_float64(pieces)


@torch.inference_mode()
def _text_errors(parts: TokenizerParts, texts: Sequence[str]) -> dict[str, float]:
    """Largest latent error of each pass over the sample."""
    if parts.text_encoder is None or not texts:
        return {}
    network = copy.deepcopy(parts.network).double()
    mixed = parts.text_encoder.split(texts[:SAMPLE_TEXTS])
    # Once for all passes: the canonical path is slow.
    canonical = torch.cat([network(parts.text_encoder.embed_exactly(pieces)) for pieces in mixed])
    orders = {"mixed": list(range(len(mixed))), "sorted": sorted(range(len(mixed)), key=lambda row: len(mixed[row]))}
    errors: dict[str, float] = {}
    for size, order in PASSES:
        largest = 0.0
        for start in range(0, len(mixed), size):
            rows = orders[order][start : start + size]
            latents = network(parts.text_encoder.embed([mixed[row] for row in rows]).cpu().double())
            largest = max(largest, float((latents - canonical[rows]).norm(dim=1).max()))
        errors[f"{size} {order}"] = largest
    return errors


@torch.inference_mode()
def _embedding_error(parts: TokenizerParts, embeddings: Tensor) -> float:
    """Largest difference of the float64 latents in one batch from those alone."""
    network = copy.deepcopy(parts.network).double()
    rows = embeddings[:1024].double()
    batch = network(rows)
    return max(float((network(row[None])[0] - latent).norm()) for row, latent in zip(rows, batch, strict=True))


@torch.inference_mode()
def _latent_scale(parts: TokenizerParts, embeddings: Tensor) -> float:
    latents = parts.network(embeddings)
    return float((latents - latents.mean(dim=0)).square().sum(dim=1).mean().sqrt())

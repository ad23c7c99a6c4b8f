"""The canonical codes: each content alone, in float64, on the CPU; what every other path has to equal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

from models import DEFAULT_CHECKPOINT, Tokenizer, load, read_manifest
from models.checkpoint import load_parts
from models.quantizer import Quantizer
from models.residual import ResidualQuantizer
from models.tokenizer import TokenizerParts

RQVAE_CHECKPOINT = DEFAULT_CHECKPOINT.with_name("tiger-beauty")


@cache
def tokenizer() -> Tokenizer:
    """The default tokenizer, with the paths that the service takes."""
    return load(DEFAULT_CHECKPOINT, text_precision="auto", tests_itself=True)


@cache
def rqvae() -> Tokenizer:
    """The RQ-VAE that comes along, a network of five layers and three levels, without its text encoder."""
    return load(RQVAE_CHECKPOINT, tests_itself=True).for_embeddings()


@cache
def parts() -> TokenizerParts:
    """What it is made of, in float64."""
    found = load_parts(DEFAULT_CHECKPOINT, read_manifest(DEFAULT_CHECKPOINT))
    found.network.double().eval()
    found.quantizer.double().eval()
    return found


def residual_quantizer() -> ResidualQuantizer:
    """The default tokenizer's quantizer, in float64; raises TypeError where it is of another family."""
    quantizer: Quantizer = parts().quantizer
    if not isinstance(quantizer, ResidualQuantizer):
        raise TypeError("the default checkpoint is not of residual codebooks")
    return quantizer


@torch.inference_mode()
def canonical_codes(texts: Sequence[str]) -> Iterator[list[int]]:
    """Codes of each text."""
    for pieces in tokenizer().split(texts) if texts else []:
        latent = tokenizer().canonical_latents([pieces])
        yield parts().quantizer.quantize(latent, exact=True).codes[0].tolist()


@torch.inference_mode()
def canonical_codes_of_embeddings(embeddings: Tensor) -> Tensor:
    """Codes (B, L) of embeddings (B, D), a row at a time."""
    rows = embeddings.double().split(1)
    return torch.cat([parts().quantizer.quantize(parts().network(row), exact=True).codes for row in rows])

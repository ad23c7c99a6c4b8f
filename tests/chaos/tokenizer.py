"""A frozen tokenizer for embeddings alone, so small that a service starts at once and codes collide at will."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from models.checkpoint import freeze, save
from models.network import DecoderNetwork, EncoderNetwork, NetworkConfig
from models.residual import ResidualQuantizer
from models.template import TextTemplate
from models.tokenizer import ErrorBounds, TokenizerParts
from tests.chaos.workload import CONTENTS

DIMENSION = 16
CODEBOOK_SIZES = (4, 4, 4)


def write_checkpoint(directory: Path, name: str = "chaos", seed: int = 20240229) -> Path:
    """Writes the checkpoint; the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = NetworkConfig((DIMENSION, 8))
        quantizer = ResidualQuantizer(CODEBOOK_SIZES, 8)
        for level, codebook in enumerate(quantizer.codebooks):
            torch.nn.init.normal_(codebook, std=0.1 / 2**level)
        quantizer.initialised.fill_(True)
        parts = TokenizerParts(
            family="rqvae",
            template=TextTemplate(),
            text_encoder=None,
            network=EncoderNetwork(config),
            quantizer=quantizer,
            decoder=DecoderNetwork(config),
        )
    save(directory, parts, freeze(name, parts, ErrorBounds()))
    return directory


def embeddings() -> list[list[float]]:
    """An embedding (D,) for each content. Two neighbours differ by so little that they mostly have equal codes."""
    vectors = []
    for content in range(CONTENTS):
        near = np.random.default_rng(content // 2).standard_normal(DIMENSION)
        nudge = np.random.default_rng(1000 + content).standard_normal(DIMENSION) * 1e-3
        vectors.append((near / np.linalg.norm(near) + nudge).astype(np.float32).tolist())
    return vectors

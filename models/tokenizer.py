"""Tokenizer = text encoder . encoder network . quantizer: content in, codes out, frozen.

Codes are a function of the content and the tokenizer alone (P4). The fast path computes a batch at once and yields
each row's margin: how far its latent would have to move before any code changed. A row whose margin is within the
path's error bound is computed again on the canonical path: alone, in float64, on the CPU.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from models.network import DecoderNetwork, EncoderNetwork
from models.product import ProductQuantizer
from models.quantizer import Quantizer, Ranking
from models.residual import ResidualQuantizer
from models.template import TextTemplate
from models.text_encoder import TextEncoder, WordPieces
from models.tree import TreeQuantizer

M = TypeVar("M", bound=nn.Module)

# Every family a checkpoint can hold, by the name its manifest gives.
FAMILIES: Mapping[str, Callable[[Sequence[int], int], Quantizer]] = {
    "rqvae": ResidualQuantizer,
    "rq-kmeans": ResidualQuantizer,
    "rk-means": ResidualQuantizer,
    "r-vq": ResidualQuantizer,
    "hierarchical": TreeQuantizer,
    "pq": ProductQuantizer,
    "opq": ProductQuantizer,
}

# Families in which a shorter prefix is no coarser description of an item.
PREFIX_IS_NOT_COARSER = frozenset({"pq", "opq"})


class Encoding(NamedTuple):
    """What a tokenizer makes of B contents.

    Attributes:
        codes: (B, L) int64.
        margin: (B,) float64, the smallest margin over the levels, in units of the latent.
        quantization_error: (B,) float64, squared norm of the residual that no level took.
        recomputed: (B,) bool, rows that were near a tie and went to the canonical path.
        alternatives: (B, n) int64, codes of the last level by their distance, the chosen one first; n is 0 where none
            were asked for.
    """

    codes: Tensor
    margin: Tensor
    quantization_error: Tensor
    recomputed: Tensor
    alternatives: Tensor


@dataclass(frozen=True)
class ErrorBounds:
    """Latent errors (norms) of the fast paths against the canonical one, on the safe side.

    Attributes:
        text: Of texts embedded in a float32 batch.
        embedding: Of embeddings encoded in a float64 batch, of usual size: rounding is relative, so the bound grows
            with a larger embedding.
    """

    text: float = 1e-4
    embedding: float = 1e-9


@dataclass(frozen=True)
class TokenizerParts:
    """What is frozen into a tokenizer. The text encoder is None where the tokenizer takes embeddings only."""

    family: str
    template: TextTemplate
    text_encoder: TextEncoder | None
    network: EncoderNetwork
    quantizer: Quantizer
    decoder: DecoderNetwork


class Tokenizer:
    """A frozen tokenizer.

    Not thread-safe: one thread owns it. `split` alone may be called from others.

    Args:
        full_name: `name@fingerprint`, the manifest's.
        parts: The frozen modules; moved to float64 on `device`.
        bounds: Below which margins a row is computed again.
        device: Where the fast path runs.
    """

    def __init__(
        self,
        full_name: str,
        parts: TokenizerParts,
        bounds: ErrorBounds,
        device: torch.device | str = "cpu",
    ) -> None:
        self.full_name = full_name
        self.family = parts.family
        self.template = parts.template
        self.bounds = bounds
        self.device = torch.device(device)
        self._text_encoder = parts.text_encoder
        self._network = _frozen(parts.network, self.device)
        self._quantizer = _frozen(parts.quantizer, self.device)
        self._decoder = _frozen(parts.decoder, self.device)
        self._quantizer.prepare()
        self._latents_per_norm = self._network.gain() / max(self._quantizer.scale, 1e-12)
        on_cpu = self.device.type == "cpu"
        self._exact_network = self._network if on_cpu else _frozen(parts.network, torch.device("cpu"))
        self._exact_quantizer = self._quantizer if on_cpu else _frozen(parts.quantizer, torch.device("cpu"))

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """K_l for each level."""
        return self._quantizer.codebook_sizes

    @property
    def dimension(self) -> int:
        """D, the width of an embedding."""
        return self._network.config.widths[0]

    @property
    def takes_text(self) -> bool:
        """Whether there is a text encoder."""
        return self._text_encoder is not None

    @property
    def text_encoder(self) -> TextEncoder | None:
        """What embeds texts; None where the tokenizer takes embeddings only."""
        return self._text_encoder

    def for_embeddings(self) -> Tokenizer:
        """The same tokenizer without its text encoder, by far its largest part; it shares everything else."""
        light = copy.copy(self)
        light._text_encoder = None  # noqa: SLF001 - its own copy
        return light

    def split(self, texts: Sequence[str]) -> list[list[int]]:
        """Word pieces of texts, for `encode_texts`; safe to call from any thread."""
        return self._require_text_encoder().split(texts)

    @torch.inference_mode()
    def encode(self, embeddings: Tensor, *, alternatives: int = 0) -> Encoding:
        """Codes of embeddings (B, D), float.

        Args:
            embeddings: (B, D) float.
            alternatives: How many codes of the last level to rank for each row, at most.

        Raises:
            ValueError: The shape is wrong, or a number is not finite or too large to have a finite latent.
        """
        self._check_embeddings(embeddings)
        embeddings = embeddings.to(torch.float64)
        encoding, certain = self._encode_batch(embeddings.to(self.device), alternatives)
        size = (embeddings.cpu() - self._exact_network.centre).norm(dim=1) * self._latents_per_norm
        near = ~(certain > self.bounds.embedding * size.clamp_min(1))
        return self._recompute(
            encoding,
            near,
            lambda row: embeddings[row : row + 1].cpu(),
            lambda row: embeddings[row].cpu().numpy().tobytes(),
        )

    @torch.inference_mode()
    def encode_texts(self, pieces: Sequence[WordPieces], *, alternatives: int = 0) -> Encoding:
        """Codes of B texts, given as word pieces; of similar length, or the padding costs. Equal texts cost one.

        Args:
            pieces: Of `split`.
            alternatives: As in `encode`.

        Raises:
            ValueError: This tokenizer takes embeddings only, or an embedding came out not finite.
        """
        text_encoder = self._require_text_encoder()
        places: dict[tuple[int, ...], int] = {}
        place = [places.setdefault(tuple(row), len(places)) for row in pieces]
        distinct = list(places)
        encoding, certain = self._encode_batch(text_encoder.embed(distinct).to(torch.float64), alternatives)
        near = ~(certain > self.bounds.text)
        encoding = self._recompute(encoding, near, lambda row: text_encoder.embed_exactly(distinct[row]))
        return Encoding(*(tensor[place] for tensor in encoding))

    @torch.inference_mode()
    def embed(self, pieces: Sequence[WordPieces]) -> Tensor:
        """The embeddings (B, D) float32 of texts, on the CPU."""
        return self._require_text_encoder().embed(pieces).cpu()

    @torch.inference_mode()
    def decode(self, codes: Tensor) -> Tensor:
        """Embeddings (B, D) float64 that codes (B, L) int64 stand for.

        Raises:
            ValueError: The shape is wrong or a code is out of range.
        """
        embeddings: Tensor = self._decoder(self._quantizer.decode(codes.to(self.device)))
        return embeddings.cpu()

    @torch.inference_mode()
    def latent_error(self, pieces: Sequence[WordPieces]) -> Tensor:
        """Norm (B,) of what each text's latent in this batch differs by from its canonical latent."""
        fast = self._network(self._require_text_encoder().embed(pieces).to(torch.float64)).cpu()
        error: Tensor = (fast - self.canonical_latents(pieces)).norm(dim=1)
        return error

    @torch.inference_mode()
    def canonical_latents(self, pieces: Sequence[WordPieces]) -> Tensor:
        """Latents (B, d) float64 of texts, each alone on the canonical path."""
        text_encoder = self._require_text_encoder()
        return torch.cat([self._exact_network(text_encoder.embed_exactly(row)) for row in pieces])

    def _encode_batch(self, embeddings: Tensor, alternatives: int) -> tuple[Encoding, Tensor]:
        """The encoding, and what (B,) each latent may be off by before its codes or its alternatives change."""
        encoding, ranking = _encoding(self._quantizer, self._network(embeddings), alternatives)
        return encoding, encoding.margin if ranking is None else encoding.margin.minimum(ranking.margin.cpu())

    def _recompute(
        self,
        encoding: Encoding,
        near: Tensor,
        canonical_embedding: Callable[[int], Tensor],
        key: Callable[[int], Hashable] = lambda row: row,
    ) -> Encoding:
        """The encoding with the rows near a tie replaced by their canonical one; rows of equal keys are computed once.

        Raises:
            ValueError: A canonical row is not finite.
        """
        codes, margin, error, _, alternatives = encoding
        known: dict[Hashable, Encoding] = {}
        for row in near.nonzero().flatten().tolist():
            exact = known.get(key(row))
            if exact is None:
                exact = known[key(row)] = self._canonical(canonical_embedding(row), alternatives.shape[1])
            codes[row], margin[row], error[row] = exact.codes[0], exact.margin[0], exact.quantization_error[0]
            alternatives[row] = exact.alternatives[0]
        return Encoding(codes, margin, error, near, alternatives)

    def _canonical(self, embedding: Tensor, alternatives: int = 0) -> Encoding:
        """The encoding of one canonical embedding (1, D) float64."""
        encoding, _ = _encoding(self._exact_quantizer, self._exact_network(embedding), alternatives, exact=True)
        if bool(encoding.margin.isnan()) or not bool(encoding.quantization_error.isfinite()):
            raise ValueError("the canonical latent of an item is not finite; it has no codes")
        return encoding

    def _check_embeddings(self, embeddings: Tensor) -> None:
        if embeddings.ndim != 2 or embeddings.shape[1] != self.dimension:
            msg = f"embeddings have shape {tuple(embeddings.shape)}, expected (B, {self.dimension})"
            raise ValueError(msg)
        if not bool(embeddings.isfinite().all()):
            msg = "an embedding has a number that is not finite"
            raise ValueError(msg)

    def _require_text_encoder(self) -> TextEncoder:
        if self._text_encoder is None:
            msg = f"the tokenizer {self.full_name} has no text encoder: it takes embeddings only"
            raise ValueError(msg)
        return self._text_encoder


def _frozen(module: M, device: torch.device) -> M:
    """A float64 copy on the device, without gradients."""
    frozen = copy.deepcopy(module)
    frozen.to(device, torch.float64).eval().requires_grad_(requires_grad=False)
    return frozen


def _encoding(
    quantizer: Quantizer, latents: Tensor, alternatives: int, *, exact: bool = False
) -> tuple[Encoding, Ranking | None]:
    """The encoding of latents (B, d), and the ranking of its alternatives where any are asked for."""
    quantization = quantizer.quantize(latents, exact=exact)
    ranking = quantizer.rank(quantization, alternatives, exact=exact) if alternatives else None
    codes, margins, residuals = (tensor.cpu() for tensor in quantization)
    margin = margins.amin(dim=1)
    error = residuals[:, -1].square().sum(dim=1)
    ranked = codes[:, :0] if ranking is None else ranking.codes.cpu()
    return Encoding(codes, margin, error, torch.zeros_like(margin, dtype=torch.bool), ranked), ranking

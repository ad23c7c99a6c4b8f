"""Tokenizer = text encoder . encoder network . quantizer: content in, codes out, frozen.

Codes are a function of the content and the tokenizer alone (P4). A batch is computed at once on a fast path, and rows
near a tie again on more exact ones, down to the canonical one: alone, in float64, on the CPU; see `models.ladder`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from models.ladder import Encoding, ErrorBounds, Precision, Rung, climb
from models.network import DecoderNetwork, EncoderNetwork
from models.packed_linear import FastNetwork
from models.precision import full_precision
from models.product import ProductQuantizer
from models.quantizer import Codes, Quantization, Quantizer, Ranking
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

# Embeddings whose distances to a level's codewords fit into the processor's cache.
EMBEDDINGS_AT_ONCE = 512

# On a device each part costs a dozen starts of kernels and a wait; scores of 256 codewords in float64 take 64 MiB.
EMBEDDINGS_AT_ONCE_ON_DEVICE = 32_768

# Families in which a shorter prefix is no coarser description of an item.
PREFIX_IS_NOT_COARSER = frozenset({"pq", "opq"})


@dataclass(frozen=True)
class TokenizerParts:
    """What is frozen into a tokenizer. The text encoder is None where the tokenizer takes embeddings only."""

    family: str
    template: TextTemplate
    text_encoder: TextEncoder | None
    network: EncoderNetwork
    quantizer: Quantizer
    decoder: DecoderNetwork


class Explanation(NamedTuple):
    """What the canonical path makes of one content, level by level.

    Attributes:
        codes: (L,) int64.
        margins: (L,) float64, see `NearestCodeword.margin`.
        residual_norms: (L + 1,) float64; `[l]` is of what level l receives, `[L]` of what no level took.
    """

    codes: Tensor
    margins: Tensor
    residual_norms: Tensor


class Tokenizer:
    """A frozen tokenizer.

    Not thread-safe: one thread owns it. `split` and `explain` alone may be called from others.

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
        self._fast_network = FastNetwork(parts.network, self.device)
        on_cpu = self.device.type == "cpu"
        self._at_once = EMBEDDINGS_AT_ONCE if on_cpu else EMBEDDINGS_AT_ONCE_ON_DEVICE
        self._exact_network = self._network if on_cpu else _frozen(parts.network, torch.device("cpu"))
        self._exact_quantizer = self._quantizer if on_cpu else _frozen(parts.quantizer, torch.device("cpu"))
        # By the processor's arithmetic on every device: bounds are multiples of it.
        self._latents_per_norm = self._exact_network.gain() / max(self._exact_quantizer.scale, 1e-12)

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """K_l for each level."""
        return self._quantizer.codebook_sizes

    @property
    def dimension(self) -> int:
        """D, the width of an embedding."""
        return self._network.config.widths[0]

    @property
    def search(self) -> str:
        """What looks for the nearest codewords, in words for a person."""
        return self._quantizer.search

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
            CheckpointError: Float32 arithmetic is lowered for the whole process.
        """
        sizes = self._checked_sizes(embeddings)

        def encode_fast(rows: Tensor) -> tuple[Encoding, Tensor]:
            some = embeddings if len(rows) == len(embeddings) else embeddings[rows]
            as_it_is = some.dtype == torch.float32 and some.device == self.device
            single = some if as_it_is else some.to(self.device, torch.float32)
            return self._encode_latents(self._fast_network(single).to(torch.float64), alternatives)

        def encode(rows: Tensor) -> tuple[Encoding, Tensor]:
            return self._encode_latents(self._network(embeddings[rows].to(self.device, torch.float64)), alternatives)

        rungs = [Rung(Precision.FLOAT64, encode, self.bounds.embedding * sizes)]
        # Numbers of more digits would lose some in float32 before anything is computed.
        if self.bounds.embedding_float32 is not None and embeddings.dtype != torch.float64:
            rungs.insert(0, Rung(Precision.FLOAT32, encode_fast, self.bounds.embedding_float32 * sizes))
        with full_precision(self.device):
            return climb(
                [rung._replace(encode=_in_parts(rung.encode, self._at_once)) for rung in rungs],
                len(embeddings),
                lambda row: self._canonical(embeddings[row : row + 1].to("cpu", torch.float64), alternatives),
                lambda row: embeddings[row].to("cpu", torch.float64).numpy().tobytes(),
            )

    @torch.inference_mode()
    def encode_texts(self, pieces: Sequence[WordPieces], *, alternatives: int = 0) -> Encoding:
        """Codes of B texts, given as word pieces; of similar length, or the padding costs. Equal texts cost one.

        Args:
            pieces: Of `split`.
            alternatives: As in `encode`.

        Raises:
            ValueError: This tokenizer takes embeddings only, or an embedding came out not finite.
            CheckpointError: As in `encode`.
        """
        text_encoder = self._require_text_encoder()
        if not pieces:
            return self.encode(torch.empty(0, self.dimension), alternatives=alternatives)
        places: dict[tuple[int, ...], int] = {}
        place = [places.setdefault(tuple(row), len(places)) for row in pieces]
        distinct = list(places)

        def rung(precision: Precision, dtype: torch.dtype, bound: float) -> Rung:
            def encode(rows: Tensor) -> tuple[Encoding, Tensor]:
                embeddings = text_encoder.embed([distinct[row] for row in rows.tolist()], dtype)
                return self._encode_latents(self._network(embeddings.to(torch.float64)), alternatives)

            return Rung(precision, encode, torch.full((len(distinct),), bound, dtype=torch.float64))

        rungs = [rung(Precision.FLOAT32, torch.float32, self.bounds.text)]
        if self.bounds.text_float16 is not None:
            rungs.insert(0, rung(Precision.FLOAT16, torch.float16, self.bounds.text_float16))
        if self.bounds.text_bfloat16 is not None:
            rungs.insert(0, rung(Precision.BFLOAT16, torch.bfloat16, self.bounds.text_bfloat16))
        if self.bounds.text_float64 is not None:
            rungs.append(rung(Precision.FLOAT64, torch.float64, self.bounds.text_float64))
        with full_precision(self.device):
            encoding = climb(
                rungs,
                len(distinct),
                lambda row: self._canonical(text_encoder.embed_exactly(distinct[row]), alternatives),
            )
        return Encoding(*(tensor[place] for tensor in encoding))

    @torch.inference_mode()
    def explain(self, content: WordPieces | Tensor) -> Explanation:
        """How one content comes to its codes, on the canonical path; safe to call from any thread.

        Args:
            content: Word pieces of `split`, or an embedding (D,) float.

        Raises:
            ValueError: As in `encode` and `encode_texts`.
            CheckpointError: As in `encode`.
        """
        with full_precision(self.device):
            if isinstance(content, Tensor):
                self._checked_sizes(content[None])
                embedding = content[None].to("cpu", torch.float64)
            else:
                embedding = self._require_text_encoder().embed_exactly(content)
            quantization = self._exact_quantizer.quantize(self._exact_network(embedding), exact=True)
        norms = quantization.residuals[0].norm(dim=1)
        if not bool(norms.isfinite().all()):
            raise ValueError("the canonical latent of an item is not finite; it has no codes")
        return Explanation(quantization.codes[0], quantization.margins[0], norms)

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
    def text_latents(self, pieces: Sequence[WordPieces], dtype: torch.dtype = torch.float32) -> Tensor:
        """Latents (B, d) float64 of texts, embedded together on a fast path, on the CPU."""
        latents: Tensor = self._network(self._require_text_encoder().embed(pieces, dtype).to(torch.float64))
        return latents.cpu()

    @torch.inference_mode()
    def canonical_latents(self, pieces: Sequence[WordPieces]) -> Tensor:
        """Latents (B, d) float64 of texts, each alone on the canonical path."""
        text_encoder = self._require_text_encoder()
        return torch.cat([self._exact_network(text_encoder.embed_exactly(row)) for row in pieces])

    @torch.inference_mode()
    def latents(self, embeddings: Tensor, *, exact: bool = False) -> Tensor:
        """Latents (B, d) float64 of embeddings (B, D), encoded in a float64 batch; on the CPU throughout if exact."""
        network, device = (self._exact_network, "cpu") if exact else (self._network, self.device)
        latents: Tensor = network(embeddings.to(device, torch.float64))
        return latents.cpu()

    @torch.inference_mode()
    def fast_latents(self, embeddings: Tensor) -> Tensor:
        """Latents (B, d) float64 of embeddings (B, D), encoded in a float32 batch."""
        return self._fast_network(embeddings.to(self.device, torch.float32)).to("cpu", torch.float64)

    @torch.inference_mode()
    def quantize(self, latents: Tensor, *, exact: bool = False) -> Quantization:
        """What the quantizer makes of latents (B, d) float64, on the CPU; `exact` as in `Quantizer.quantize`."""
        quantization = self._quantizer.quantize(latents.to(self.device), exact=exact)
        return Quantization(*(tensor.cpu() for tensor in quantization))

    @property
    def centre(self) -> Tensor:
        """The embedding (D,) float64 that the network takes for the middle."""
        return self._exact_network.centre

    @property
    def scale(self) -> float:
        """The size of a usual latent."""
        return self._quantizer.scale

    def sizes(self, embeddings: Tensor) -> Tensor:
        """How many times a usual latent those of embeddings (B, D) may be, (B,) float64 of 1 at least.

        Rounding is relative, so the bounds of embeddings grow by it.
        """
        # As many at a time as stay in the cache.
        parts = [embeddings] if len(embeddings) <= EMBEDDINGS_AT_ONCE else embeddings.split(EMBEDDINGS_AT_ONCE)
        distances = [torch.linalg.vector_norm(part.to("cpu", torch.float64) - self.centre, dim=1) for part in parts]
        whole = distances[0] if len(distances) == 1 else torch.cat(distances)
        return whole.mul_(self._latents_per_norm).clamp_min_(1)

    def _encode_latents(self, latents: Tensor, alternatives: int) -> tuple[Encoding, Tensor]:
        """The encoding, and what (B,) each latent may be off by before its codes or its alternatives change."""
        encoding, ranking = _encoding(self._quantizer, latents, alternatives)
        return encoding, encoding.margin if ranking is None else encoding.margin.minimum(ranking.margin.cpu())

    def _canonical(self, embedding: Tensor, alternatives: int = 0) -> Encoding:
        """The encoding of one canonical embedding (1, D) float64."""
        encoding, _ = _encoding(self._exact_quantizer, self._exact_network(embedding), alternatives, exact=True)
        if bool(encoding.margin.isnan()) or not bool(encoding.quantization_error.isfinite()):
            raise ValueError("the canonical latent of an item is not finite; it has no codes")
        return encoding

    def _checked_sizes(self, embeddings: Tensor) -> Tensor:
        """The `sizes` of embeddings; raises ValueError where these are no finite (B, D)."""
        if embeddings.ndim != 2 or embeddings.shape[1] != self.dimension:
            msg = f"embeddings have shape {tuple(embeddings.shape)}, expected (B, {self.dimension})"
            raise ValueError(msg)
        sizes = self.sizes(embeddings)
        # A norm is finite only where all numbers are, and there are fewer of them to look at.
        if not bool(sizes.isfinite().all()) and not bool(embeddings.isfinite().all()):
            raise ValueError("an embedding has a number that is not finite")
        return sizes

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


def _in_parts(
    encode: Callable[[Tensor], tuple[Encoding, Tensor]], at_once: int
) -> Callable[[Tensor], tuple[Encoding, Tensor]]:
    """The same, of so many rows at a time: few enough for a processor's cache, or a device's memory."""

    def encode_parts(rows: Tensor) -> tuple[Encoding, Tensor]:
        if len(rows) <= at_once:
            return encode(rows)
        parts = [encode(some) for some in rows.split(at_once)]
        columns = zip(*(encoding for encoding, _ in parts), strict=True)
        return Encoding(*map(torch.cat, columns)), torch.cat([certain for _, certain in parts])

    return encode_parts


def _encoding(
    quantizer: Quantizer, latents: Tensor, alternatives: int, *, exact: bool = False
) -> tuple[Encoding, Ranking | None]:
    """The encoding of latents (B, d), and the ranking of its alternatives where any are asked for."""
    if not (exact or alternatives):
        # Each call of torch, be it for nothing, gives the interpreter to other threads, which may keep it for long.
        codes, margin, error = (tensor if tensor.is_cpu else tensor.cpu() for tensor in quantizer.encode(latents))
        precision = torch.full((len(codes),), Precision.CANONICAL, dtype=torch.int64)
        return Encoding(codes, margin, error, precision, codes[:, :0]), None
    quantization = quantizer.quantize(latents, exact=exact)
    ranking = quantizer.rank(quantization, alternatives, exact=exact) if alternatives else None
    codes, margin, error = (tensor.cpu() for tensor in Codes.of(quantization))
    ranked = codes[:, :0] if ranking is None else ranking.codes.cpu()
    return Encoding(codes, margin, error, torch.full_like(codes[:, 0], Precision.CANONICAL), ranked), ranking

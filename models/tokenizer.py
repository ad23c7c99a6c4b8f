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

from models.device.transfer import overlaps, together, uploaded
from models.ladder import Encoding, ErrorBounds, Precision, Rung, climb
from models.native.niceness import give_way, send_behind
from models.network import DecoderNetwork, EncoderNetwork
from models.packed_linear import FastNetwork
from models.precision import full_precision
from models.product import ProductQuantizer
from models.quantizer import Codes, Quantization, Quantizer
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

    Any thread may call it, on processors. On a device `encode` and `encode_texts` are for one thread at a time.

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
        if self.device.type == "cuda":
            overlaps(self.device)  # tried at the start, not at the first bulk
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

    def give_way(self, steps: int) -> None:
        """Let all others go before the forward passes that the calling thread asks for from now on, on processors.

        Where texts are embedded by compiled passes, other threads make them and give way, and the calling one waits;
        the little that is left to torch, it does as before. Else it gives way itself.

        Args:
            steps: Of niceness.
        """
        send_behind(steps)
        if self._text_encoder is None or not self._text_encoder.is_compiled:
            give_way(steps)

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
        self._check_shape(embeddings)

        def rung(precision: Precision, network: EncoderNetwork | FastNetwork, dtype: torch.dtype, bound: float) -> Rung:
            def encode(rows: Tensor) -> tuple[Encoding, Tensor]:
                some = embeddings if len(rows) == len(embeddings) else embeddings[rows]
                parts = uploaded(some, self.device, self._at_once)
                encoding, certain = _joined(
                    [self._search_embeddings(part, network, dtype, alternatives) for part in parts]
                )
                # Rows with a number that is not finite are certain of nothing, so that all of them come to this rung.
                if precision is Precision.FLOAT64 and not bool((certain > 0).all()):
                    _check_finite(some)
                return encoding, certain

            return Rung(precision, encode, bound)

        rungs = [rung(Precision.FLOAT64, self._network, torch.float64, self.bounds.embedding)]
        # Numbers of more digits would lose some in float32 before anything is computed.
        if self.bounds.embedding_float32 is not None and embeddings.dtype != torch.float64:
            rungs.insert(0, rung(Precision.FLOAT32, self._fast_network, torch.float32, self.bounds.embedding_float32))
        with full_precision(self.device):
            return climb(
                rungs,
                len(embeddings),
                lambda row: self._canonical(embeddings[row : row + 1].to("cpu", torch.float64), alternatives),
                lambda row: embeddings[row].to("cpu", torch.float64).numpy().tobytes(),
            )

    @torch.inference_mode()
    def encode_texts(
        self, pieces: Sequence[WordPieces], *, alternatives: int = 0, leave_undecided: bool = False
    ) -> Encoding:
        """Codes of B texts, given as word pieces; of similar length, or the padding costs. Equal texts cost one.

        Args:
            pieces: Of `split`.
            alternatives: As in `encode`.
            leave_undecided: Whether rows that no fast path decides are left to `encode_text_alone`.

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
                latents = self._network(embeddings.to(torch.float64))
                return _joined([_searched(self._quantizer, latents, alternatives)])

            return Rung(precision, encode, bound)

        rungs = [rung(Precision.FLOAT32, torch.float32, self.bounds.text)]
        if self.bounds.text_int16 is not None:
            rungs.insert(0, rung(Precision.INT16, torch.int16, self.bounds.text_int16))
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
                None
                if leave_undecided
                else lambda row: self._canonical(text_encoder.embed_exactly(distinct[row]), alternatives),
            )
        return encoding if len(distinct) == len(place) else Encoding(*(tensor[place] for tensor in encoding))

    @torch.inference_mode()
    def encode_text_alone(self, pieces: WordPieces, *, alternatives: int = 0) -> Encoding:
        """Codes of one text on the canonical path; safe to call from any thread.

        Args:
            pieces: Of `split`.
            alternatives: As in `encode`.

        Raises:
            ValueError: As in `encode_texts`.
            CheckpointError: As in `encode`.
        """
        with full_precision(self.device):
            return self._canonical(self._require_text_encoder().embed_exactly(pieces), alternatives)

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
                self._check_shape(content[None])
                _check_finite(content)
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
        parts = uploaded(embeddings, self.device, self._at_once)
        return torch.cat([self._sizes(part.to(torch.float64) - self._network.centre) for part in parts]).cpu()

    def _sizes(self, centred: Tensor) -> Tensor:
        """The `sizes` of embeddings on the device, given less the centre, there; of their dtype.

        Infinite of some that float32 can hold but not square: they are certain of nothing, and float64 is next.
        """
        distances: Tensor = torch.linalg.vector_norm(centred, dim=1)
        return distances.mul_(self._latents_per_norm).clamp_min_(1)

    def _search_embeddings(
        self, embeddings: Tensor, network: EncoderNetwork | FastNetwork, dtype: torch.dtype, alternatives: int
    ) -> _Searched:
        """What is found for embeddings on the device in a precision; what is certain, as a share of their sizes."""
        # Each call of torch, be it for nothing, gives the interpreter to other threads, which may keep it for long.
        rows = embeddings if embeddings.dtype == dtype else embeddings.to(dtype)
        centred = rows - network.centre
        found = _searched(self._quantizer, network.of_centred(centred).to(torch.float64), alternatives)
        return found._replace(certain=found.certain / self._sizes(centred))

    def _canonical(self, embedding: Tensor, alternatives: int = 0) -> Encoding:
        """The encoding of one canonical embedding (1, D) float64."""
        latents = self._exact_network(embedding)
        encoding, _ = _joined([_searched(self._exact_quantizer, latents, alternatives, exact=True)])
        if bool(encoding.margin.isnan()) or not bool(encoding.quantization_error.isfinite()):
            raise ValueError("the canonical latent of an item is not finite; it has no codes")
        return encoding

    def _check_shape(self, embeddings: Tensor) -> None:
        """Raise ValueError where embeddings are no (B, D)."""
        if embeddings.ndim != 2 or embeddings.shape[1] != self.dimension:
            msg = f"embeddings have shape {tuple(embeddings.shape)}, expected (B, {self.dimension})"
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


def _check_finite(embeddings: Tensor) -> None:
    """Raise ValueError where a number of embeddings is not finite."""
    if not bool(embeddings.isfinite().all()):
        raise ValueError("an embedding has a number that is not finite")


class _Searched(NamedTuple):
    """What is found for B latents, where they are.

    Attributes:
        codes: As in `Codes`, as are margin and error.
        certain: (B,) float64, what each latent may be off by before its codes or its alternatives change.
        alternatives: (B, n) int64, as in `Encoding`.
    """

    codes: Tensor
    margin: Tensor
    error: Tensor
    certain: Tensor
    alternatives: Tensor


def _searched(quantizer: Quantizer, latents: Tensor, alternatives: int, *, exact: bool = False) -> _Searched:
    """What a quantizer finds for latents (B, d) float64, with the ranking of alternatives where any are asked for."""
    if not (exact or alternatives):
        codes, margin, error = quantizer.encode(latents)
        return _Searched(codes, margin, error, margin, codes[:, :0])
    quantization = quantizer.quantize(latents, exact=exact)
    codes, margin, error = Codes.of(quantization)
    if not alternatives:
        return _Searched(codes, margin, error, margin, codes[:, :0])
    ranking = quantizer.rank(quantization, alternatives, exact=exact)
    return _Searched(codes, margin, error, margin.minimum(ranking.margin), ranking.codes)


def _joined(parts: Sequence[_Searched]) -> tuple[Encoding, Tensor]:
    """The encoding of all parts' rows (B), and what is `certain` of each; on the CPU."""
    codes, margin, error, certain, alternatives = together(parts)
    precision = torch.full((len(codes),), Precision.CANONICAL, dtype=torch.int64)
    return Encoding(codes, margin, error, precision, alternatives), certain

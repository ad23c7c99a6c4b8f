"""Text -> embedding: a frozen sentence-transformers model and its word pieces.

Splitting texts into word pieces and running the model are separate calls, so that a server can do the first off its
event loop and count a batch's tokens before the second.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.device.attention import ways
from models.device.graphs import ReplayedBert, with_graphs
from models.device.unpadded_bert import UnpaddedBert
from models.errors import CheckpointError
from models.native.forward import PRECISIONS, CompiledBert, compiled_bert
from models.native.niceness import give_way
from models.packed_bert import PackedBert, is_packable, is_plain_bert
from models.precision import require_full_precision
from models.text_encoder_files import (
    MINILM,
    digest,
    digest_of_settings,
    locate,
    weight_files,
    word_piece_files,
    word_piece_settings,
)

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

log = logging.getLogger(__name__)

WordPieces = Sequence[int]

# Texts whose word pieces and latents a checkpoint remembers: case, accents, scripts, signs, spaces.
CANARY_TEXTS = (
    "Crème BRÛLÉE torch. Küchenprofi. İstanbul ﬁne print, naïve coöperation",
    "無線マウス 2.4GHz 🎧👩‍🔬 ½ oz.\tA4\u00a0copy-paper [SEP] 500x",
)

# So few and short texts the calling thread splits, which holds the interpreter's lock meanwhile, for less than a
# millisecond: to wake the library's threads takes as long, and they may be at others' texts.
FEW_TEXTS, FEW_CHARACTERS = 16, 2_048

# How far an embedding of the packed forward pass may be from sentence-transformers' own in float32: usual are 1e-6.
PACKED_TOLERANCE = 1e-4

# The same of halves, to tell rounding from what computes something else; what they may err by is calibrated.
UNPADDED_TOLERANCE = {torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class TextEncoderConfig:
    """Which text encoder, as the manifest names it.

    Attributes:
        source: A Hugging Face id or a local path.
        revision: The hub's revision, where the source is an id; None takes the one at hand.
    """

    source: str = MINILM
    revision: str | None = None


class TextEncoder:
    """A sentence-transformers model, frozen in float32 with TF32 off.

    Args:
        config: What to load. An id whose package is installed is loaded from there; else from a local directory or
            the local hub cache; else from the hub.
        device: Where the fast path runs.

    Raises:
        CheckpointError: The model cannot be found or has no safetensors weights.
    """

    def __init__(self, config: TextEncoderConfig, device: torch.device | str = "cpu") -> None:
        self.config = config
        self.device = torch.device(device)
        self._directory = locate(config.source, config.revision)
        self._model = _load(self._directory, self.device)
        self._word_piece_tokenizer = self._model.tokenizer
        self._splitter = _splitter(self._model.tokenizer, self.max_tokens)
        self._unpadded_passes: dict[torch.dtype, UnpaddedBert | ReplayedBert | None] = {}
        self.prompt = self._model.prompts.get(self._model.default_prompt_name or "", "") or ""

    @property
    def dimension(self) -> int:
        """D, the width of an embedding."""
        return int(self._model.get_embedding_dimension() or 0)

    @property
    def max_tokens(self) -> int:
        """Word pieces of one text beyond which it is cut."""
        return int(self._model.max_seq_length or 512)

    def split(self, texts: Sequence[str]) -> list[list[int]]:
        """Word pieces of each text with the special ones, cut at `max_tokens`."""
        prompted = [self.prompt + text.strip() for text in texts]
        if self._splitter is not None:
            if len(texts) <= FEW_TEXTS and sum(map(len, texts)) <= FEW_CHARACTERS:
                return [self._splitter.encode(text).ids for text in prompted]
            return [encoding.ids for encoding in self._splitter.encode_batch_fast(prompted)]
        encoded = self._word_piece_tokenizer(prompted, truncation=True, max_length=self.max_tokens)
        pieces: list[list[int]] = encoded["input_ids"]
        return pieces

    @property
    def is_compiled(self) -> bool:
        """Whether a compiled forward pass embeds texts in float32."""
        return isinstance(self._packed, CompiledBert)

    @property
    def forward_pass(self) -> str:
        """What embeds texts in float32, in words for a person."""
        names = {CompiledBert: "compiled, AVX-512", PackedBert: "torch, packed"}
        if self._packed is None and (unpadded := self._unpadded(torch.float32)) is not None:
            return f"torch, unpadded on {self.device}, attention {unpadded.attention}"
        return names.get(type(self._packed), "sentence-transformers")

    def embed(self, pieces: Sequence[WordPieces], dtype: torch.dtype = torch.float32) -> Tensor:
        """One forward pass: packed where that can be, else padded.

        Args:
            pieces: B texts as word pieces; of similar length, or the padding costs.
            dtype: float32; or bfloat16, float16, or int16 where it `has_int16`, for what may be computed in it; or
                float64 where it `has_float64`.

        Returns:
            (B, D) on `device`, float64 where that was asked for, else float32. The last bits depend on the neighbours;
            see `embed_exactly`.
        """
        if isinstance(self._packed, CompiledBert) and dtype in PRECISIONS:
            return self._packed(pieces, dtype)
        if self._packed is not None and dtype in {torch.float32, torch.bfloat16}:
            return (self._packed if dtype == torch.float32 else self._packed_in_bfloat16)(pieces)
        if (unpadded := self._unpadded(dtype)) is not None:
            return unpadded(pieces)
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32):
            return self._forward(self._model, pieces, self.device).float()

    @property
    def has_int16(self) -> bool:
        """Whether `embed` takes int16: products of whole numbers, in half the time of float32."""
        return isinstance(self._packed, CompiledBert) and self._packed.has_int16

    @property
    def has_float64(self) -> bool:
        """Whether `embed` takes float64, for less than `embed_exactly` does."""
        if self.device.type == "cpu":
            return self.is_compiled
        return self._unpadded(torch.float64) is not None

    def embed_exactly(self, pieces: WordPieces) -> Tensor:
        """One text alone in float64 on the CPU: (1, D) float64, the canonical embedding."""
        return self._forward(self._exact_model, [pieces], torch.device("cpu"))

    @cached_property
    def components(self) -> dict[str, Any]:
        """Everything here that can move an embedding, as digests and settings for the fingerprint."""
        return {
            "weights": {"sha256": digest(weight_files(self._directory))},
            "network": {"sha256": digest_of_settings(self._directory / "config.json")},
            "word_pieces": {
                "sha256": digest(word_piece_files(self._directory)),
                "settings": word_piece_settings(self._directory),
                "canary": {"sha256": self._word_piece_canary()},
            },
            "modules": [_module_settings(module) for module in self._model],
            "max_tokens": self.max_tokens,
            "prompt": self.prompt,
        }

    def operations_below_float64(self, pieces: WordPieces) -> list[str]:
        """Operations of the canonical path that compute in less than float64, whatever its weights are (T5's norms)."""
        self._exact_model  # noqa: B018 - made outside the watch: its copy passes through float32
        with _PrecisionWatch() as watch:
            self.embed_exactly(pieces)
        return sorted(watch.lowered)

    def _word_piece_canary(self) -> str:
        """sha256 of known texts' word pieces, one of them cut: what the tokenizer does, whatever its files say."""
        long = " ".join(map(str, range(self.max_tokens)))
        return hashlib.sha256(json.dumps(self.split([*CANARY_TEXTS, long])).encode()).hexdigest()

    @cached_property
    def _packed(self) -> CompiledBert | PackedBert | None:
        """The packed forward pass in float32, where it gives known texts the embeddings they have without it.

        The compiled one where there is one, else torch's.
        """
        if not is_packable(self._model):
            return None
        if (compiled := compiled_bert(self._model)) is not None and self._agrees(compiled):
            return compiled
        packed = PackedBert(self._model, torch.float32)
        return packed if self._agrees(packed) else None

    def _agrees(self, forward: CompiledBert | PackedBert) -> bool:
        pieces = self.split(CANARY_TEXTS)
        differences = forward(pieces) - self._padded(pieces)
        return bool((differences.norm(dim=1) <= PACKED_TOLERANCE).all())

    @cached_property
    def _packed_in_bfloat16(self) -> PackedBert:
        return PackedBert(self._model, torch.bfloat16)

    def _unpadded(self, dtype: torch.dtype) -> UnpaddedBert | ReplayedBert | None:
        """The forward pass without padding in a precision: on a device, and what the packed ones do not have."""
        if dtype not in self._unpadded_passes:
            packs = self.device.type == "cpu" and dtype in {torch.float32, torch.bfloat16}
            self._unpadded_passes[dtype] = None if packs else self._unpadded_pass(dtype)
        return self._unpadded_passes[dtype]

    def _unpadded_pass(self, dtype: torch.dtype) -> UnpaddedBert | ReplayedBert | None:
        """The first that runs here and gives known texts the embeddings they have with padding; None: log says why."""
        if self.device.type == "cuda":
            # For the process: its attention, torch's first choice on Hopper, plans for tens of milliseconds at each new
            # number of texts and length, and keeps every plan.
            torch.backends.cuda.enable_cudnn_sdp(enabled=False)
        if not is_plain_bert(self._model):
            return None
        pieces = self.split(CANARY_TEXTS)
        for attention in ways(self.device, dtype):
            try:
                forward = UnpaddedBert(self._model, self.device, dtype, attention)
                # One alone too: texts of one length take a way of their own.
                errors = torch.cat([forward(batch) - self._padded(batch) for batch in (pieces, pieces[:1])])
                error = float(errors.norm(dim=1).max())
            except Exception as fault:  # noqa: BLE001 - whatever a kernel lacks here, there is a slower one
                log.warning("no forward pass with %s attention in %s on %s: %s", attention, dtype, self.device, fault)
                continue
            if error <= (tolerance := UNPADDED_TOLERANCE.get(dtype, PACKED_TOLERANCE)):
                return with_graphs(forward, pieces, tolerance)
            log.warning("%s attention in %s on %s errs by %.2g", attention, dtype, self.device, error)
        return None

    def _padded(self, pieces: Sequence[WordPieces]) -> Tensor:
        """Embeddings (B, D) float32 of sentence-transformers' own forward pass."""
        return self._forward(self._model, pieces, self.device)

    @cached_property
    def _exact_model(self) -> SentenceTransformer:
        return copy.deepcopy(self._model).to("cpu").double()

    @torch.inference_mode()
    def _forward(self, model: SentenceTransformer, pieces: Sequence[WordPieces], device: torch.device) -> Tensor:
        padded = self._word_piece_tokenizer.pad({"input_ids": [list(row) for row in pieces]}, return_tensors="pt")
        features = {name: tensor.to(device) for name, tensor in padded.items()}
        embeddings: Tensor = model(features)["sentence_embedding"]
        return embeddings


class _PrecisionWatch(TorchDispatchMode):
    """Notes the operations whose results are floats of less than float64."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lowered: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dtype != torch.float64:
                self.lowered.add(str(func))
        return result


def split_behind(steps: int) -> None:
    """Have the threads that split many texts let all others go before them; only before any text was split here.

    The library starts them once a process, and they have the niceness of the thread that asks first.

    Args:
        steps: Of niceness.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    def start() -> None:
        give_way(steps)
        Tokenizer(WordLevel({"": 0}, unk_token="")).encode_batch_fast(["a", "b"])

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()


def _load(directory: Path, device: torch.device) -> SentenceTransformer:
    # These import transformers, which takes seconds: so only where needed.
    from sentence_transformers import SentenceTransformer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        model = SentenceTransformer(
            str(directory),
            device=str(device),
            local_files_only=True,
            model_kwargs={"use_safetensors": True, "dtype": torch.float32},
        )
    except Exception as error:
        msg = f"the text encoder at {directory} cannot be loaded: {error}"
        raise CheckpointError(msg) from error
    require_full_precision()
    return model.eval().requires_grad_(requires_grad=False)


def _splitter(word_piece_tokenizer: Any, max_tokens: int) -> Any:
    """A copy of what a fast tokenizer does its work by, which cuts texts as asked; None where it is no fast one.

    The tokenizer's own call takes five times as long for a text, most of it for what is not wanted here.
    """
    if not getattr(word_piece_tokenizer, "is_fast", False):
        return None
    backend = copy.deepcopy(word_piece_tokenizer.backend_tokenizer)
    backend.no_padding()
    backend.enable_truncation(max_tokens, direction=word_piece_tokenizer.truncation_side)
    backend.encode_special_tokens = getattr(word_piece_tokenizer, "split_special_tokens", False)
    return backend


def _module_settings(module: Any) -> dict[str, Any]:
    """A pipeline module's class and the settings that move an embedding; not those a library release may add."""
    settings: dict[str, Any] = getattr(module, "get_config_dict", dict)()
    telling = ("pooling_mode", "in_features", "out_features", "bias", "activation_function")
    return {"class": type(module).__name__, **{name: settings[name] for name in telling if name in settings}}

"""The compiled forward pass of a BERT encoder, see `packed_bert.c`; for processors with AVX-512.

What a text comes to depends neither on the texts beside it nor on the number of threads, to the last bit.
"""

from __future__ import annotations

import ctypes
import functools
import threading
import weakref
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from models.native.libraries import Interface, opened
from models.native.niceness import behind
from models.packed_bert import network_of, pooling_of

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_ADDRESS, _NUMBER, _COUNT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int

INTERFACE = Interface(
    file="_packed_bert",
    prefix="packed_bert",
    version=4,
    functions={
        "can": (ctypes.c_bool, [_NUMBER] * 5),
        "new": (_ADDRESS, [*[_NUMBER] * 3, ctypes.c_double, _COUNT, _COUNT, *[_ADDRESS] * 4]),
        "fill": (None, [_ADDRESS, _NUMBER, _ADDRESS, _ADDRESS]),
        "free": (None, [_ADDRESS]),
        "cuts": (ctypes.c_bool, [_ADDRESS]),
        "room": (_NUMBER, [_ADDRESS, _NUMBER, _NUMBER, _COUNT, _COUNT]),
        "embed": (ctypes.c_bool, [*[_ADDRESS] * 3, _NUMBER, _NUMBER, _ADDRESS, _ADDRESS, _NUMBER, *[_COUNT] * 3]),
    },
)

# What a pass is computed in, in the order of `packed_bert.c`.
PRECISIONS = (torch.float32, torch.int16, torch.float64)

# Word pieces that go through all layers together: their activations stay in a core's cache.
ROWS = 128

# Of a layer: squares of weights and vectors, in the order of `packed_bert.c`.
SQUARES, VECTORS = 12, 13

# Bytes of a cache line, where a thread's room begins.
LINE = 64


class CompiledBert:
    """The forward pass of a sentence-transformers model that `models.packed_bert.is_packable`.

    Threads may call it side by side: each has room of its own, where a call works in that of the one before it.

    Args:
        library: Of `models.native.libraries.open_library`.
        model: Its weights, float32 on the CPU; the embedding tables are shared with it.

    Raises:
        ValueError: The library has nothing for a model of this shape, or for this processor.
        MemoryError: There is no room for the weights.
    """

    def __init__(self, library: ctypes.CDLL, model: SentenceTransformer) -> None:
        network = network_of(model)
        config, embeddings = network.config, network.embeddings
        self._width, self._longest = config.hidden_size, config.max_position_embeddings
        shape = (config.num_hidden_layers, self._width, config.intermediate_size, config.num_attention_heads)
        if not library.packed_bert_can(*shape, self._longest):
            msg = f"no compiled forward pass for {shape} on this processor"
            raise ValueError(msg)
        norm = embeddings.LayerNorm
        words = embeddings.word_embeddings.weight
        self._tables = [
            _dense(words, len(words), self._width),
            _dense(embeddings.position_embeddings.weight, self._longest, self._width),
            _dense(embeddings.token_type_embeddings.weight[0], self._width),
            _dense(torch.cat([norm.weight, norm.bias]), 2 * self._width),
        ]
        self._embed, self._room_of = library.packed_bert_embed, library.packed_bert_room
        self._rooms = threading.local()
        self._handle = library.packed_bert_new(
            self._width,
            config.num_hidden_layers,
            config.num_attention_heads,
            norm.eps,
            pooling_of(model) == "mean",
            len(model) == 3,
            *(table.data_ptr() for table in self._tables),
        )
        if not self._handle:
            raise MemoryError("no memory for the weights of a compiled forward pass")
        # Not at the end of the process: another thread may be within a call.
        weakref.finalize(self, library.packed_bert_free, self._handle).atexit = False
        for number, layer in zip(range(config.num_hidden_layers), network.encoder.layer, strict=True):
            squares = _dense(_squares(layer), SQUARES * self._width, self._width)
            vectors = _dense(_vectors(layer), VECTORS * self._width)
            library.packed_bert_fill(self._handle, number, squares.data_ptr(), vectors.data_ptr())
        self.has_int16: bool = library.packed_bert_cuts(self._handle)

    @torch.inference_mode()
    def __call__(self, pieces: Sequence[Sequence[int]], dtype: torch.dtype = torch.float32) -> Tensor:
        """Embeddings of texts as word pieces, each of one piece at least: (B, D), in the order given.

        Args:
            pieces: Of B texts.
            dtype: float32; or int16, to multiply in it, in half the time, where it `has_int16`; or float64.

        Returns:
            (B, D) float64 where that was asked for, else float32.

        Raises:
            IndexError: There is no such word piece, or a text has none or more than there are positions for.
            MemoryError: There is no room to work in.
            ValueError: It has no such precision.
        """
        ids = torch.tensor(list(chain.from_iterable(pieces)), dtype=torch.int64)
        counts = [len(row) for row in pieces]
        longest, threads = max(counts), torch.get_num_threads()
        if dtype not in PRECISIONS or (dtype == torch.int16 and not self.has_int16):
            msg = f"no compiled forward pass in {dtype} on this processor"
            raise ValueError(msg)
        precision = PRECISIONS.index(dtype)
        if not (0 < min(counts) <= longest <= self._longest) or not (
            0 <= ids.min() <= ids.max() < len(self._tables[0])
        ):
            raise IndexError("a text has no word pieces, too many, or one that is not in the vocabulary")
        lengths = torch.tensor(counts, dtype=torch.int64)
        number = torch.float64 if dtype == torch.float64 else torch.float32
        embeddings = torch.empty(len(pieces), self._width, dtype=number)
        room = self._room(self._room_of(self._handle, longest, ROWS, threads, precision))
        if not behind(
            lambda steps: self._embed(
                self._handle,
                ids.data_ptr(),
                lengths.data_ptr(),
                len(pieces),
                longest,
                embeddings.data_ptr(),
                room,
                ROWS,
                threads,
                precision,
                steps,
            )
        ):
            raise MemoryError("no memory for a compiled forward pass")
        return embeddings

    def _room(self, size: int) -> int:
        """Where the calling thread has room for so many bytes, at the beginning of a line."""
        room: Tensor | None = getattr(self._rooms, "room", None)
        if room is None or len(room) < size + LINE:
            room = self._rooms.room = torch.empty(size + LINE, dtype=torch.uint8)
        return -(-room.data_ptr() // LINE) * LINE


def compiled_bert(model: SentenceTransformer) -> CompiledBert | None:
    """The forward pass of a model that is packable; None where there is none for it, or for this processor."""
    library = installed_library()
    try:
        return CompiledBert(library, model) if library is not None else None
    except ValueError:
        return None


@functools.cache
def installed_library() -> ctypes.CDLL | None:
    """The library that the installation compiled, if it did."""
    return opened(INTERFACE)


def _squares(layer: Any) -> Tensor:
    """A layer's weights as squares (12, D, D), each (out, in): query, key, value, attended, 4 up and 4 down."""
    own, up, down = layer.attention.self, layer.intermediate.dense.weight, layer.output.dense.weight
    parts = [own.query.weight, own.key.weight, own.value.weight, layer.attention.output.dense.weight, up]
    return torch.cat([*parts, *down.split(len(down), dim=1)])


def _vectors(layer: Any) -> Tensor:
    """A layer's biases in the same order, then weights and biases of its norms: (13 D)."""
    own, attended, output = layer.attention.self, layer.attention.output, layer.output
    parts = [own.query, own.key, own.value, attended.dense, layer.intermediate.dense, output.dense]
    norms = [attended.LayerNorm.weight, attended.LayerNorm.bias, output.LayerNorm.weight, output.LayerNorm.bias]
    return torch.cat([*(part.bias for part in parts), *norms])


def _dense(numbers: Tensor, *shape: int) -> Tensor:
    """A model's numbers as the library reads them; ValueError where it would look for others."""
    if numbers.shape != shape or numbers.dtype != torch.float32 or not numbers.is_cpu:
        msg = f"weights {tuple(numbers.shape)} of {numbers.dtype} on {numbers.device}, not {shape} of float32"
        raise ValueError(msg)
    return numbers.detach().contiguous()

"""A BERT encoder's forward pass over packed texts: no padding, and matrices laid out once for the processor.

BERT (Devlin et al., NAACL 2019) as sentence-transformers runs it, for texts on the CPU. What makes it fast there: the
word pieces of a batch stand one after the other, so that nothing is computed for padding; texts of equal length share
one call of attention, which needs no mask; and weights are packed, see `models.packed_linear`.

In bfloat16 the products' factors are bfloat16 and their sums float32; layer norms, the residual stream, attention and
pooling stay float32: less error leaves fewer rows near a tie.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.packed_linear import PackedLinear, can_pack

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

# Rows of a product: fewer take other kernels (their last bits change), and each new number costs a millisecond once.
FEWEST_ROWS = 16
ROW_STEP = 8
LARGE_ROW_STEP = 32
LARGE = 256


class Norm(NamedTuple):
    """A layer norm's weight and bias (D,), and its epsilon."""

    weight: Tensor
    bias: Tensor
    epsilon: float

    def __call__(self, rows: Tensor) -> Tensor:
        """Normalise rows (T, D)."""
        return functional.layer_norm(rows, self.weight.shape, self.weight, self.bias, self.epsilon)


class Layer(NamedTuple):
    """One transformer layer: attention, then two linear maps, each with a residual and a layer norm behind it."""

    query_key_value: PackedLinear
    attended: PackedLinear
    attended_norm: Norm
    up: PackedLinear
    down: PackedLinear
    norm: Norm


class PackedBert:
    """The forward pass of a sentence-transformers model that `is_packable`.

    Args:
        model: Its weights, float32 on the CPU; the embedding tables are shared with it.
        dtype: float32 or bfloat16, of the products' factors.
    """

    def __init__(self, model: SentenceTransformer, dtype: torch.dtype) -> None:
        network = network_of(model)
        embeddings = network.embeddings
        self._heads: int = network.config.num_attention_heads
        self._words = embeddings.word_embeddings.weight.detach()
        self._positions = (embeddings.position_embeddings.weight + embeddings.token_type_embeddings.weight[0]).detach()
        self._norm = _norm(embeddings.LayerNorm)
        self._layers = [_layer(layer, dtype) for layer in network.encoder.layer]
        self._pools_mean = pooling_of(model) == "mean"
        self._normalizes = len(model) == 3

    @torch.inference_mode()
    def __call__(self, pieces: Sequence[Sequence[int]]) -> Tensor:
        """Embeddings of texts as word pieces, each of one piece at least: (B, D) float32, in the order given."""
        order = sorted(range(len(pieces)), key=lambda row: len(pieces[row]))
        counts = [len(pieces[row]) for row in order]
        lengths = torch.tensor(counts)
        starts = lengths.cumsum(0) - lengths
        ids = torch.tensor([piece for row in order for piece in pieces[row]])
        places = torch.arange(len(ids)) - starts.repeat_interleave(lengths)
        spare = _rows_of_a_product(len(ids)) - len(ids)
        rows = self._norm(
            self._words[functional.pad(ids, (0, spare))] + self._positions[functional.pad(places, (0, spare))]
        )
        runs = _runs(counts)
        for layer in self._layers:
            rows = self._transform(layer, rows, runs)
        pooled = self._pool(rows[: len(ids)], starts, lengths)
        embeddings = torch.empty_like(pooled)
        embeddings[order] = functional.normalize(pooled) if self._normalizes else pooled
        return embeddings

    def _transform(self, layer: Layer, rows: Tensor, runs: Sequence[tuple[int, int, int]]) -> Tensor:
        """One layer over rows (T, D) float32."""
        context = self._attend(layer.query_key_value(rows).float(), runs)
        rows = layer.attended_norm(rows + layer.attended(context))
        return layer.norm(rows + layer.down(layer.up(rows)))

    def _attend(self, query_key_value: Tensor, runs: Sequence[tuple[int, int, int]]) -> Tensor:
        """Each word piece's context (T, D) from (T, 3 D); zeros for what stands behind the last run."""
        width = query_key_value.shape[1] // 3
        context = query_key_value.new_zeros(len(query_key_value), width)
        for start, texts, length in runs:
            stop = start + texts * length
            parts = query_key_value[start:stop].view(texts, length, 3, self._heads, -1).permute(2, 0, 3, 1, 4)
            attended = functional.scaled_dot_product_attention(*parts)
            context[start:stop].view(texts, length, self._heads, -1).copy_(attended.transpose(1, 2))
        return context

    def _pool(self, rows: Tensor, starts: Tensor, lengths: Tensor) -> Tensor:
        """One row (B, D) for each text: the mean of its word pieces, or its first."""
        if not self._pools_mean:
            return rows[starts]
        text = torch.arange(len(lengths)).repeat_interleave(lengths)
        return rows.new_zeros(len(lengths), rows.shape[1]).index_add_(0, text, rows) / lengths[:, None]


def is_packable(model: SentenceTransformer) -> bool:
    """Whether `PackedBert` computes what this model does, on this processor."""
    return can_pack(model.device) and is_plain_bert(model)


def is_plain_bert(model: SentenceTransformer) -> bool:
    """Whether a model is the BERT of this forward pass: its modules, its activation, its positions, its pooling."""
    classes = [type(module).__name__ for module in model]
    network = network_of(model)
    config = getattr(network, "config", None)
    return (
        classes in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"])
        and type(network).__name__ == "BertModel"
        and pooling_of(model) in ("mean", "cls")
        and getattr(config, "hidden_act", None) == "gelu"
        and getattr(config, "position_embedding_type", "absolute") == "absolute"
        and not getattr(config, "is_decoder", True)
        and all(parameter.dtype == torch.float32 for parameter in network.parameters())
    )


def network_of(model: SentenceTransformer) -> Any:
    """The transformer in it; None where there is none."""
    return getattr(model[0], "auto_model", None)


def pooling_of(model: SentenceTransformer) -> str | None:
    """How it pools, such as `mean` or `cls`."""
    settings: dict[str, Any] = getattr(model[1], "get_config_dict", dict)()
    return settings.get("pooling_mode")


def _layer(layer: Any, dtype: torch.dtype) -> Layer:
    attention = layer.attention.self
    parts = (attention.query, attention.key, attention.value)
    together = nn.Linear(parts[0].in_features, 3 * parts[0].out_features)
    together.weight = nn.Parameter(torch.cat([part.weight for part in parts]))
    together.bias = nn.Parameter(torch.cat([part.bias for part in parts]))
    return Layer(
        PackedLinear(together, dtype),
        PackedLinear(layer.attention.output.dense, dtype),
        _norm(layer.attention.output.LayerNorm),
        PackedLinear(layer.intermediate.dense, dtype, "gelu"),
        PackedLinear(layer.output.dense, dtype),
        _norm(layer.output.LayerNorm),
    )


def _norm(norm: nn.LayerNorm) -> Norm:
    return Norm(norm.weight.detach(), norm.bias.detach(), norm.eps)


def _rows_of_a_product(pieces: int) -> int:
    """Rows that so many word pieces are computed in: not too few, and of not too many numbers."""
    step = ROW_STEP if pieces <= LARGE else LARGE_ROW_STEP
    return max(FEWEST_ROWS, -(-pieces // step) * step)


def _runs(counts: Sequence[int]) -> list[tuple[int, int, int]]:
    """Where each run of texts of equal length begins, how many they are, and their length; of sorted lengths."""
    runs: list[tuple[int, int, int]] = []
    start = 0
    for length in sorted(set(counts)):
        texts = counts.count(length)
        runs.append((start, texts, length))
        start += texts * length
    return runs

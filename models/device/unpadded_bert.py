"""A BERT encoder's forward pass over texts without padding, on any device: what `models.packed_bert` is on a CPU.

In float16 and bfloat16 the products and the attention are of that precision with sums in float32; embeddings, layer
norms, the residual stream and pooling are float32. In float64 everything is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from models.device.attention import WAYS, Layout, attend_padded
from models.packed_bert import Norm, network_of, pooling_of

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


class UnpaddedBert:
    """The forward pass of a sentence-transformers model that `models.packed_bert.is_plain_bert`.

    Args:
        model: Its weights.
        device: Where it runs.
        dtype: float16, bfloat16, float32 or float64.
        attention: One of `models.device.attention.WAYS`; texts of one length take `by runs`, which is one call then.
    """

    def __init__(
        self, model: SentenceTransformer, device: torch.device, dtype: torch.dtype, attention: str = "by runs"
    ) -> None:
        network = network_of(model)
        embeddings = network.embeddings
        self.attention = attention
        self.device, self.dtype = device, dtype
        # Of what is no product: half precision would cost more error there than time.
        self._wide = torch.float64 if dtype == torch.float64 else torch.float32
        self._heads: int = network.config.num_attention_heads
        self._words = self._widened(embeddings.word_embeddings.weight)
        # Each widened first: their sum in float32 would be off by more than all of float64's work.
        token_type = self._widened(embeddings.token_type_embeddings.weight[0])
        self._positions = self._widened(embeddings.position_embeddings.weight) + token_type
        self._norm = self._normed(embeddings.LayerNorm)
        self._layers = [self._layer(layer) for layer in network.encoder.layer]
        self._pools_mean = pooling_of(model) == "mean"
        self._normalizes = len(model) == 3

    @property
    def longest(self) -> int:
        """Word pieces of a text that there are positions for."""
        return len(self._positions)

    def __call__(self, pieces: Sequence[Sequence[int]]) -> Tensor:
        """Embeddings of texts as word pieces, each of one piece at least.

        Returns:
            (B, D) on the device, float64 where the pass is, else float32; in the order given.
        """
        # Nested tensors cannot be made of tensors of inference mode.
        with torch.inference_mode(mode=False), torch.no_grad():
            return self._embed(pieces)

    def _embed(self, pieces: Sequence[Sequence[int]]) -> Tensor:
        order = sorted(range(len(pieces)), key=lambda row: len(pieces[row]))
        counts = [len(pieces[row]) for row in order]
        starts = list(accumulate(counts, initial=0))
        ids = list(chain.from_iterable(pieces[row] for row in order))
        places = list(chain.from_iterable(map(range, counts)))
        back = sorted(range(len(order)), key=order.__getitem__)
        sent = self._sent([*ids, *places, *starts, *back])
        words, positions, offsets, undo = sent.split([len(ids), len(ids), len(starts), len(back)])
        layout = Layout(counts, offsets, self._heads)
        attend = WAYS["by runs" if counts[0] == counts[-1] else self.attention]
        rows = self._encode(words, positions, lambda query_key_value: attend(query_key_value, layout))
        return self._normalized(self._pool(rows, offsets)).index_select(0, undo)

    def padded(self, numbers: Tensor, texts: int, length: int) -> Tensor:
        """Embeddings (texts, D) of texts that are filled up to one length: all shapes fixed, and nothing waited for.

        Args:
            numbers: (texts * length + texts,) int64 on the device: word pieces of each text, filled up by any; then how
                many are each text's own, one at least.
            texts: How many.
            length: Word pieces of each.
        """
        with torch.inference_mode(mode=False), torch.no_grad():
            words, counts = numbers.split([texts * length, texts])
            places = torch.arange(length, device=self.device)
            own = places < counts.unsqueeze(1)
            rows = self._encode(
                words, places.repeat(texts), lambda query_key_value: attend_padded(query_key_value, own, self._heads)
            ).view(texts, length, -1)
            mean = (rows * own.unsqueeze(2)).sum(dim=1) / counts.unsqueeze(1)
            return self._normalized(mean if self._pools_mean else rows.select(1, 0))

    def _encode(self, words: Tensor, positions: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        """What the last layer makes (T, D) of T word pieces at their positions in their texts."""
        rows = self._norm(self._words.index_select(0, words) + self._positions.index_select(0, positions))
        for query_key_value, attended, attended_norm, up, down, norm in self._layers:
            context = attend(functional.linear(rows.to(self.dtype), *query_key_value))
            rows = attended_norm(rows + functional.linear(context, *attended).to(self._wide))
            inner = functional.gelu(functional.linear(rows.to(self.dtype), *up))
            rows = norm(rows + functional.linear(inner, *down).to(self._wide))
        return rows

    def _normalized(self, pooled: Tensor) -> Tensor:
        return functional.normalize(pooled) if self._normalizes else pooled

    def _pool(self, rows: Tensor, offsets: Tensor) -> Tensor:
        """One row (B, D) for each text: the mean of its word pieces, each summed in order, or its first."""
        if not self._pools_mean:
            return rows.index_select(0, offsets.narrow(0, 0, len(offsets) - 1))
        return torch.segment_reduce(rows, "sum", offsets=offsets, axis=0) / offsets.diff().unsqueeze(1)

    def _sent(self, numbers: list[int]) -> Tensor:
        """Whole numbers on the device, all in one copy that nobody waits for."""
        here = torch.tensor(numbers)
        return here.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else here

    def _widened(self, weight: Tensor) -> Tensor:
        return weight.detach().to(self.device, self._wide)

    def _normed(self, norm: Any) -> Norm:
        return Norm(self._widened(norm.weight), self._widened(norm.bias), norm.eps)

    def _linear(self, *parts: Any) -> tuple[Tensor, Tensor]:
        """Weight (out, in) and bias (out,) of linear maps, one below the other."""
        weight, bias = torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts])
        return weight.detach().to(self.device, self.dtype), bias.detach().to(self.device, self.dtype)

    def _layer(self, layer: Any) -> tuple[Any, ...]:
        """A layer's linear maps and norms, in the order of their work."""
        own, attended, output = layer.attention.self, layer.attention.output, layer.output
        return (
            self._linear(own.query, own.key, own.value),
            self._linear(attended.dense),
            self._normed(attended.LayerNorm),
            self._linear(layer.intermediate.dense),
            self._linear(output.dense),
            self._normed(output.LayerNorm),
        )

"""Attention among word pieces of texts that stand one after the other, without padding: three ways to the same.

- by runs: one call for all texts of a length. Any device and precision; many calls where lengths are mixed.
- jagged: one call over nested tensors. On a GPU in float32 that is the memory-efficient kernel (Rabe and Staats, 2021).
- varlen: one call of the flash kernel (Dao, 2023), on a GPU, in float16 and bfloat16.

And with padding, for batches of a fixed shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class Layout(NamedTuple):
    """Where each of B texts stands among T word pieces.

    Attributes:
        counts: B, word pieces of each text, in ascending order.
        offsets: (B + 1,) int64, where each begins and the last ends, on the device.
        heads: H, of the attention.
    """

    counts: Sequence[int]
    offsets: Tensor
    heads: int


# Query, key and value (T, 3 D) of all word pieces, and where the texts stand -> the context of each (T, D).
Attend = Callable[[Tensor, Layout], Tensor]


def attend_by_runs(query_key_value: Tensor, layout: Layout) -> Tensor:
    """One call for all texts of a length."""
    contexts = []
    start = 0
    for length in sorted(set(layout.counts)):
        texts = layout.counts.count(length)
        rows = query_key_value.narrow(0, start, texts * length)
        parts = rows.view(texts, length, 3, layout.heads, -1).permute(2, 0, 3, 1, 4)
        contexts.append(functional.scaled_dot_product_attention(*parts).transpose(1, 2).reshape(len(rows), -1))
        start += len(rows)
    return torch.cat(contexts)


def attend_jagged(query_key_value: Tensor, layout: Layout) -> Tensor:
    """One call over nested tensors."""
    query, key, value = (
        torch.nested.nested_tensor_from_jagged(
            part.contiguous(), layout.offsets, min_seqlen=layout.counts[0], max_seqlen=layout.counts[-1]
        ).transpose(1, 2)
        for part in _heads(query_key_value, layout).unbind(1)
    )
    attended = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)
    return attended.values().reshape(len(query_key_value), -1)


def attend_varlen(query_key_value: Tensor, layout: Layout) -> Tensor:
    """One call of the flash kernel."""
    from torch.nn.attention.varlen import varlen_attn

    offsets, longest = layout.offsets.to(torch.int32), layout.counts[-1]
    query, key, value = _heads(query_key_value, layout).unbind(1)
    attended = varlen_attn(query, key, value, offsets, offsets, longest, longest)
    assert isinstance(attended, Tensor)
    return attended.reshape(len(query_key_value), -1)


def attend_padded(query_key_value: Tensor, own: Tensor, heads: int) -> Tensor:
    """One call for texts that are filled up to one length.

    Args:
        query_key_value: (B * length, 3 D) of all word pieces.
        own: (B, length) bool, which word pieces are the text's own; one at least of each.
        heads: H, of the attention.

    Returns:
        The context of each, (B * length, D).
    """
    query, key, value = query_key_value.view(*own.shape, 3, heads, -1).permute(2, 0, 3, 1, 4)
    attended = functional.scaled_dot_product_attention(query, key, value, own.unsqueeze(1).unsqueeze(1))
    return attended.transpose(1, 2).reshape(len(query_key_value), -1)


def _heads(query_key_value: Tensor, layout: Layout) -> Tensor:
    """(T, 3 D) as (T, 3, H, D / H)."""
    return query_key_value.view(len(query_key_value), 3, layout.heads, -1)


WAYS: Mapping[str, Attend] = {"varlen": attend_varlen, "jagged": attend_jagged, "by runs": attend_by_runs}


def ways(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Which of `WAYS` to try on a device in a precision, the fastest first; the last one works everywhere."""
    if device.type != "cuda" or dtype == torch.float64:
        return ["by runs"]
    return ["jagged", "by runs"] if dtype == torch.float32 else ["varlen", "jagged", "by runs"]

"""Beam search for Semantic IDs: exactly L + 1 steps, all beams of all users at once, over the live trie or without.

The encoder runs once for each user, and what the decoder made of earlier tokens is kept. It finds what `generate` of
transformers finds with `models.constraint.LiveSemanticIds`, with the same scores.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from models.tiger import START, Tiger
from models.trie import DeadPrefix, Trie


class Beams(NamedTuple):
    """What a search found, best first.

    Attributes:
        semantic_ids: (B, beams, L + 1) int64; -1 for what is no number of its level, and throughout where there were
            fewer live IDs than beams.
        scores: (B, beams) float32, log-likelihood of the tokens; -inf where there is no ID.
    """

    semantic_ids: Tensor
    scores: Tensor


@torch.inference_mode()
def search(model: Tiger, users: Tensor, items: Tensor, beams: int, trie: Trie | None) -> Beams:
    """The likeliest Semantic IDs after histories.

    Args:
        model: In evaluation mode.
        users: (B,) int64 user tokens.
        items: (B, n, L + 1) int64 tokens, see `Tiger.encode`.
        beams: How many are kept at each step.
        trie: What is live, on the model's device; None: any token may be said at any place.

    Raises:
        DeadPrefix: The trie is empty.
        ValueError: The trie has a suffix that the generator cannot say.
    """
    if trie is not None:
        _check_fit(model, trie)
    vocabulary = model.vocabulary.to(users.device)
    states = model.encode(users, items)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    first = torch.arange(len(users), device=users.device)
    said = torch.full((len(users), 1), START, device=users.device)
    scores = torch.zeros(len(users), 1, device=users.device)
    for level, tokens in enumerate(vocabulary.tokens):
        decoded = model.t5.decoder(
            input_ids=said[:, -1:], encoder_hidden_states=states, past_key_values=cache, use_cache=True
        ).last_hidden_state[:, -1]
        steps = model.logits(decoded).float().log_softmax(dim=1)
        if trie is not None:
            allowed = trie.reachable(vocabulary.numbers(said[:, 1:]))
            steps = steps[:, tokens[: allowed.shape[1]]].masked_fill(~allowed, -torch.inf)
        kept = scores.shape[1]
        scores, chosen = _best((scores.flatten()[:, None] + steps).unflatten(0, (len(users), kept)).flatten(1), beams)
        number = chosen % steps.shape[1]
        beam = (first[:, None] * kept + chosen // steps.shape[1]).flatten()
        spoken = (number if trie is None else tokens[number]).flatten()
        said = torch.cat([said[beam], spoken[:, None]], dim=1)
        if level < len(vocabulary.tokens) - 1:
            # The cross-attention of a user's beams is the same, and need not move once there are all beams.
            moving = cache if scores.shape[1] != kept else cache.self_attention_cache
            moving.reorder_cache(cast("torch.LongTensor", beam))
    found = vocabulary.numbers(said[:, 1:]).unflatten(0, (len(users), -1))
    return Beams(found.where(scores.isfinite()[:, :, None], -1), scores)


def _best(scores: Tensor, beams: int) -> tuple[Tensor, Tensor]:
    best = scores.topk(min(beams, scores.shape[1]), dim=1)
    return best.values, best.indices


def _check_fit(model: Tiger, trie: Trie) -> None:
    if trie.codebook_sizes != tuple(model.config.codebook_sizes):
        msg = f"the generator has the codebook sizes {model.config.codebook_sizes}, the trie {trie.codebook_sizes}"
        raise ValueError(msg)
    if trie.suffixes > model.config.suffixes:
        msg = (
            f"the suffix {trie.suffixes - 1} is live and the generator ends with {model.config.suffixes - 1}: leave "
            "such IDs out with Trie.with_suffixes_below"
        )
        raise ValueError(msg)
    if not trie.suffixes:
        raise DeadPrefix("the trie is empty: no Semantic ID is live")

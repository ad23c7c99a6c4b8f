"""Constrains the `generate` of transformers to live Semantic IDs.

    tokens since the prompt --> numbers --> the trie's mask of what may follow --> the scores of just those tokens

Nothing here goes through the catalogue or the beams one by one: a step is a binary search a level for the whole batch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LogitsProcessor

from models.trie import DeadPrefix, Trie
from models.vocabulary import Vocabulary


class LiveSemanticIds(LogitsProcessor):
    """Lets a generator say live Semantic IDs, and the end after them, and nothing else.

    For greedy search, sampling, beam search and beam sampling, of encoder-decoders and of decoders after a prompt:

        LiveSemanticIds(trie, vocabulary, begins_at=1, num_beams=10)  # an encoder-decoder: after its start token
        LiveSemanticIds(trie, vocabulary, begins_at=input_ids.shape[1])  # a decoder alone: after the prompt

    One processor has one trie, so what one `generate` says is live at one revision. It costs nothing to make: make
    another for the next `generate`, from the trie of then. Where there are other processors, this one is the last.

    Rows after their end may only say the end again: `generate` overwrites it with padding, or drops the row.

    A row whose prefix leads to no live ID raises. Only in beam sampling are such rows of no account: `generate` draws
    `2 * num_beams` candidates, and where fewer have a probability it fills up with others, at a score of -inf. That sum
    stays -inf, below the -1e9 of the blanks among its results. So a group of `num_beams` rows raises only when none of
    it is live, and its dead rows never become a result. (A beam search without sampling carries no dead rows on: every
    live one has a continuation, and these are enough.) What `generate` returns is a live ID; or, where it found fewer
    than `num_return_sequences`, one of them again or a row without a whole ID, which `Vocabulary.read` tells.

    Args:
        trie: What is live; on the device of the scores, else it is copied there at the first step.
        vocabulary: Which tokens say it.
        begins_at: The column of `input_ids` in which the first ID begins.
        num_beams: As given to `generate`. A wrong number is not noticed where it divides the number of rows.
        ids: How many IDs in a row may be said, at most; after each but the last the generator may end or go on.

    Raises:
        ValueError: The trie does not fit the vocabulary: other codebook sizes, or a live suffix beyond its last.
    """

    def __init__(self, trie: Trie, vocabulary: Vocabulary, *, begins_at: int, num_beams: int = 1, ids: int = 1) -> None:
        _check_fit(trie, vocabulary)
        self._trie = trie
        self._vocabulary = vocabulary
        self._begins_at = begins_at
        self._num_beams = num_beams
        self._ids = ids

    @property
    def trie(self) -> Trie:
        """What is live, for this processor."""
        return self._trie

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores (B, V) with -inf for every token that leads to no live ID.

        Raises:
            DeadPrefix: A row, or all beams of one, cannot become a live ID.
            ValueError: The scores leave nothing to choose from, or there is something wrong with the arguments.
        """
        if input_ids.shape[1] < self._begins_at or len(input_ids) % self._num_beams:
            msg = f"input_ids are {tuple(input_ids.shape)}; IDs begin at {self._begins_at}, beams are {self._num_beams}"
            raise ValueError(msg)
        self._move(scores.device)
        said = input_ids[:, self._begins_at :]
        whole, depth = divmod(said.shape[1], len(self._vocabulary.tokens))
        ended, live = self._past(said, whole)
        if whole >= self._ids and self._vocabulary.end is None:
            msg = f"{whole} IDs are whole and the vocabulary has no end: generate so many tokens and no more"
            raise ValueError(msg)

        tokens, allowed = [], []
        if whole < self._ids:
            numbers = self._vocabulary.numbers(said[:, whole * len(self._vocabulary.tokens) :])
            allowed.append(self._trie.reachable(numbers) & (live & ~ended)[:, None])
            tokens.append(self._vocabulary.tokens[depth][: allowed[0].shape[1]])
        if self._vocabulary.end is not None:
            allowed.append((live & (ended | (depth == 0 and 0 < whole <= self._ids)))[:, None])
            tokens.append(said.new_tensor([self._vocabulary.end]))
        return self._masked(scores, torch.cat(tokens), torch.cat(allowed, dim=1), ended & live, input_ids)

    def _past(self, said: Tensor, whole: int) -> tuple[Tensor, Tensor]:
        """For each row, (B,) bool each: whether it has ended, and whether all its IDs up to there are live."""
        size = len(self._vocabulary.tokens)
        began = torch.zeros(len(said), 1, dtype=torch.bool, device=said.device)
        ends = said[:, size::size] == (-1 if self._vocabulary.end is None else self._vocabulary.end)
        ended = torch.cat([began, ends.cumsum(dim=1) > 0], dim=1)
        if not whole:
            return ended[:, -1], torch.ones_like(ended[:, -1])
        ids = self._vocabulary.numbers(said[:, : whole * size].reshape(-1, size))
        live = self._trie.holds(ids).reshape(-1, whole) | ended[:, :whole]
        return ended[:, -1], live.all(dim=1)

    def _masked(self, scores: Tensor, tokens: Tensor, allowed: Tensor, ended: Tensor, input_ids: Tensor) -> Tensor:
        """The scores of what is allowed; every row keeps a finite one, as -inf alone would be normalised to NaN.

        Args:
            scores: (B, V).
            tokens: (T,) int64, those that may be allowed.
            allowed: (B, T) bool.
            ended: (B,) bool.
            input_ids: For the message.
        """
        lowest = torch.finfo(scores.dtype).min
        chosen = scores.index_select(1, tokens).masked_fill(ended[:, None], 0.0).masked_fill(~allowed, -torch.inf)
        live = allowed.any(dim=1)
        best = chosen.amax(dim=1) if len(tokens) else scores.new_full((len(scores),), -torch.inf)
        self._check(live, best, input_ids)
        # A live row that another processor has left nothing keeps to live IDs, whatever comes of it.
        chosen = torch.where(allowed & best.isneginf()[:, None], lowest, chosen)
        # A dead one is of no account, see above: its sum is -inf whatever it says.
        chosen[:, 0] = torch.where(live, chosen[:, 0], lowest)
        return torch.full_like(scores, -torch.inf).index_copy_(1, tokens, chosen)

    def _check(self, live: Tensor, best: Tensor, input_ids: Tensor) -> None:
        """Raises where a group of beams would go on without the constraint."""
        sound = best.isfinite()
        lost = ~(live & sound).reshape(-1, self._num_beams).any(dim=1)
        wild = best.isnan() | best.isposinf()
        if not bool((lost.repeat_interleave(self._num_beams) | wild).any()):
            return
        if bool(wild.any()):
            row = int(wild.nonzero()[0])
            msg = f"row {row} of the batch: the scores of what may follow are not finite: {float(best[row])}"
            raise ValueError(msg)
        row = int(lost.nonzero()[0]) * self._num_beams
        group = slice(row, row + self._num_beams)
        if bool(live[group].any()):
            msg = f"row {row} of the batch: another processor forbids all that leads to a live Semantic ID"
            raise ValueError(msg)
        said = input_ids[row, self._begins_at :].tolist()
        beams = f" and the other {self._num_beams - 1} beams" if self._num_beams > 1 else ""
        msg = f"row {row} of the batch{beams}: the tokens {said} lead to no live Semantic ID"
        raise DeadPrefix(msg)

    def _move(self, device: torch.device) -> None:
        if self._vocabulary.tokens[0].device != device:
            self._vocabulary = self._vocabulary.to(device)
        if self._trie.numbers[0].device != device:
            self._trie = self._trie.to(device)


def _check_fit(trie: Trie, vocabulary: Vocabulary) -> None:
    sizes = tuple(len(tokens) for tokens in vocabulary.tokens[:-1])
    if sizes != trie.codebook_sizes:
        msg = f"the vocabulary has the codebook sizes {sizes}, the trie {trie.codebook_sizes}"
        raise ValueError(msg)
    if trie.suffixes > vocabulary.suffixes:
        msg = (
            f"the suffix {trie.suffixes - 1} is live and the vocabulary ends with {vocabulary.suffixes - 1}: add "
            "tokens, give the tokenizer a max_suffix, or leave such IDs out with Trie.with_suffixes_below"
        )
        raise ValueError(msg)

"""Which token of a generator's vocabulary says which number of a Semantic ID."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class Vocabulary:
    """The token of every number, a level at a time, and the token that ends an ID.

    Levels may share tokens: a token's place in the ID says which level it speaks of.

    Args:
        tokens: For each level 0 to L, (K_l,) int64: the token of each code, on the last level of each suffix.
        end: The token after the last number, as a rule the end of sequence; None: an ID ends by its length alone.
    """

    def __init__(self, tokens: Sequence[Tensor], end: int | None) -> None:
        """Builds the way back, from a token to its number.

        Raises:
            ValueError: Two numbers of a level have one token, a number has the end's, or a level has none.
        """
        self.tokens = tuple(tokens)
        self.end = end
        highest = max((int(level.max()) for level in self.tokens if len(level)), default=0)
        self._numbers = torch.full((len(self.tokens), highest + 1), -1, device=self.tokens[0].device)
        for level, ids in enumerate(self.tokens):
            if ids.ndim != 1 or not len(ids) or len(ids.unique()) != len(ids) or int(ids.min()) < 0:
                msg = f"level {level} needs a token for each number, all different"
                raise ValueError(msg)
            if end is not None and bool((ids == end).any()):
                msg = f"token {end} ends an ID and is a number of level {level}"
                raise ValueError(msg)
            self._numbers[level, ids] = torch.arange(len(ids), device=ids.device)

    @classmethod
    def contiguous(cls, codebook_sizes: Sequence[int], suffixes: int, *, first: int, end: int | None) -> Vocabulary:
        """Level after level from the token `first` on: K_0 codes, K_1 codes, ..., then the suffixes."""
        sizes = torch.tensor([*codebook_sizes, suffixes])
        starts = first + sizes.cumsum(dim=0) - sizes
        levels = [start + torch.arange(size) for start, size in zip(starts.tolist(), sizes.tolist(), strict=True)]
        return cls(levels, end)

    @classmethod
    def of_tokens(
        cls,
        ids: Mapping[str, int],
        codebook_sizes: Sequence[int],
        *,
        end: int | None,
        form: str = "<{letter}_{number}>",
    ) -> Vocabulary:
        """The tokens `<a_0>`, `<a_1>`, ..., `<b_0>`, ... of a Hugging Face tokenizer.

        Args:
            ids: What `tokenizer.get_vocab()` gives: token -> its id.
            codebook_sizes: K_l for each of the L levels; all their tokens must be there, and as many suffixes as there
                are from 0 on without a gap.
            end: As in the class; `tokenizer.eos_token_id` as a rule.
            form: How a token is written.

        Raises:
            ValueError: A token is missing.
        """
        levels: list[Tensor] = []
        for level, size in enumerate([*codebook_sizes, None]):
            letter = chr(ord("a") + level)
            found: list[int] = []
            while len(found) != size:
                token = ids.get(form.format(letter=letter, number=len(found)))
                if token is None:
                    break
                found.append(token)
            if len(found) < (1 if size is None else size):
                msg = f"the vocabulary has no token {form.format(letter=letter, number=len(found))}"
                raise ValueError(msg)
            levels.append(torch.tensor(found))
        return cls(levels, end)

    @property
    def suffixes(self) -> int:
        """How many suffixes can be said: 0 up to one less."""
        return len(self.tokens[-1])

    def numbers(self, tokens: Tensor) -> Tensor:
        """What the first tokens (B, t) int64 of IDs say, t up to L + 1: (B, t) int64, -1 for no number of its level."""
        known = (tokens >= 0) & (tokens < self._numbers.shape[1])
        levels = torch.arange(tokens.shape[1], device=tokens.device)
        return self._numbers[levels, tokens.where(known, 0)].where(known, -1)

    def write(self, semantic_ids: Tensor) -> Tensor:
        """The tokens (N, L + 1) int64 of IDs (N, L + 1) int64.

        Raises:
            IndexError: A number has no token.
        """
        return torch.stack([ids[column] for ids, column in zip(self.tokens, semantic_ids.T, strict=True)], dim=1)

    def read(self, sequences: Tensor) -> Tensor:
        """The IDs that a generator said, one after the other.

        Args:
            sequences: (B, t) int64 tokens, from where the first ID begins.

        Returns:
            (B, n, L + 1) int64, n the IDs that t tokens have room for; -1 throughout where there is no whole ID, as in
            what follows the end.
        """
        size = len(self.tokens)
        ids = self.numbers(sequences[:, : sequences.shape[1] // size * size].reshape(-1, size))
        whole = (ids >= 0).all(dim=1, keepdim=True)
        return ids.where(whole, -1).reshape(len(sequences), -1, size)

    def to(self, device: torch.device | str) -> Vocabulary:
        """The same vocabulary on a device."""
        return Vocabulary([level.to(device) for level in self.tokens], self.end)

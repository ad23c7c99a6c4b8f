"""TIGER: an encoder-decoder that writes the next item's Semantic ID, token by token (Rajput et al., NeurIPS 2023).

    user token, (L + 1) tokens an item --> T5 encoder --> states --> T5 decoder --> the next item's L + 1 tokens

A batch holds histories of one length, so nothing is ever padded. Level after level has its own tokens; token 0 starts
the decoder. An ID always has L + 1 tokens, so there is no token for its end.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from models.errors import CheckpointError
from models.vocabulary import Vocabulary
from models.whole_files import write_whole

FORMAT = 1
CONFIG = "generator.json"
WEIGHTS = "generator.safetensors"
START = 0


@dataclass(frozen=True)
class TigerConfig:
    """Hyper-parameters of a generator; the defaults are the paper's.

    Attributes:
        codebook_sizes: K_l for each of the L levels.
        suffixes: How many collision suffixes can be said.
        users: User tokens; users share them by hash.
        width: Of the states.
        encoder_layers: Transformer layers.
        decoder_layers: Transformer layers.
        heads: Of each attention.
        head_width: Of each head.
        hidden: Width between the two linear maps of each layer.
        dropout: Share of activations dropped in training.
        looks_ahead: Whether the encoder lets an item see those after it, as T5 does. If not, the states of an item are
            the same whatever follows, so one pass over a sequence serves as the history of each of its items:
            several times as many targets in the same time.
    """

    codebook_sizes: tuple[int, ...]
    suffixes: int
    users: int = 2000
    width: int = 128
    encoder_layers: int = 4
    decoder_layers: int = 4
    heads: int = 6
    head_width: int = 64
    hidden: int = 1024
    dropout: float = 0.1
    looks_ahead: bool = True


class Tiger(nn.Module):
    """The generator.

    Args:
        config: Its hyper-parameters.

    Attributes:
        vocabulary: Which token says which number.
        t5: The encoder-decoder of transformers; its `generate` takes `encoder_outputs` made of `encode`.
    """

    def __init__(self, config: TigerConfig) -> None:
        super().__init__()
        self.config = config
        self.vocabulary = Vocabulary.contiguous(config.codebook_sizes, config.suffixes, first=START + 1, end=None)
        self.t5 = T5ForConditionalGeneration(_t5_config(config))
        # A table of their own: user tokens are read and never said, so the decoder need not weigh them.
        self.users = nn.Embedding(config.users, config.width)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.users.weight.device

    def encode(self, users: Tensor, items: Tensor) -> Tensor:
        """What the encoder makes of histories.

        Args:
            users: (B,) int64, each user's token.
            items: (B, n, L + 1) int64, the tokens of the items, oldest first.

        Returns:
            (B, 1 + n (L + 1), width): of the user token, then of each token.
        """
        embedded = torch.cat([self.users(users)[:, None], self.t5.shared(items.flatten(1))], dim=1)
        mask = None
        if not self.config.looks_ahead:
            place = self._places(items.shape[1], items.device)
            mask = (place[None, :] <= place[:, None])[None, None]
        states: Tensor = self.t5.encoder(inputs_embeds=embedded, attention_mask=mask).last_hidden_state
        return states

    def forward(self, users: Tensor, items: Tensor, first: int | None = None) -> Tensor:
        """The scores of the items of sequences, each after the items before it.

        Args:
            users: (B,) int64.
            items: (B, n, L + 1) int64 tokens.
            first: The first item that is scored, at least 1; the last item alone where None.

        Returns:
            (B, n - first, L + 1, V) logits.

        Raises:
            ValueError: Several items are to be scored and the encoder looks ahead.
        """
        length = items.shape[1]
        first = length - 1 if first is None else first
        if not 1 <= first < length or (self.config.looks_ahead and first != length - 1):
            msg = f"items from {first} of {length} cannot be scored by this encoder in one pass"
            raise ValueError(msg)
        states = self.encode(users, items[:, :-1])
        said = items[:, first:]
        targets, size = said.shape[1:]
        asked = torch.cat([torch.full_like(said[:, :, :1], START), said[:, :, :-1]], dim=2).flatten(1)
        # The targets stand side by side: each sees its own tokens so far, and the items before it. Relative positions
        # are all that T5 knows, so each is decoded as if it were alone.
        target = torch.arange(targets * size, device=items.device) // size
        step = torch.arange(targets * size, device=items.device)
        own = (target[:, None] == target[None, :]) & (step[None, :] <= step[:, None])
        before = self._places(length - 1, items.device)[None, :] <= (target + first)[:, None]
        decoded = self.t5.decoder(
            input_ids=asked,
            attention_mask=own[None, None],
            encoder_hidden_states=states,
            encoder_attention_mask=before[None, None],
            use_cache=False,
        ).last_hidden_state
        scores: Tensor = self.logits(decoded).unflatten(1, (targets, size))
        return scores

    def logits(self, decoded: Tensor) -> Tensor:
        """The scores (..., V) of every token, of decoder states (..., width)."""
        scores: Tensor = self.t5.lm_head(decoded * self.config.width**-0.5)
        return scores

    def _places(self, items: int, device: torch.device) -> Tensor:
        """Of which item each encoder state is, from 1; 0 for the user token."""
        size = len(self.config.codebook_sizes) + 1
        return torch.cat(
            [torch.zeros(1, dtype=torch.int64, device=device), torch.arange(items * size, device=device) // size + 1]
        )

    def save(self, directory: Path, notes: dict[str, Any]) -> None:
        """Write the generator into a directory, beside what else is there.

        Args:
            directory: Made where it does not exist.
            notes: What it was trained on; kept beside the config.
        """
        # The tied weights of T5 are one tensor, and are written once.
        tied = set(self.t5.all_tied_weights_keys)
        state = {
            name: tensor.detach().cpu().contiguous()
            for name, tensor in self.state_dict().items()
            if name.removeprefix("t5.") not in tied
        }
        write_whole(directory / WEIGHTS, save(state))
        content = {"format": FORMAT, "config": asdict(self.config), "notes": notes}
        write_whole(directory / CONFIG, json.dumps(content, indent=2) + "\n")

    @classmethod
    def load(cls, directory: Path, device: torch.device | str = "cpu") -> Tiger:
        """What `save` wrote, ready to generate.

        Raises:
            CheckpointError: It is missing, malformed or of another format.
        """
        try:
            content = json.loads((directory / CONFIG).read_bytes())
            if content["format"] != FORMAT:
                msg = f"the generator at {directory} has format {content['format']!r}; this version reads {FORMAT}"
                raise CheckpointError(msg)
            sizes = tuple(content["config"].pop("codebook_sizes"))
            model = cls(TigerConfig(sizes, **content["config"]))
            found = model.load_state_dict(load_file(directory / WEIGHTS), strict=False)
            missing = {name.removeprefix("t5.") for name in found.missing_keys} - set(model.t5.all_tied_weights_keys)
            if missing or found.unexpected_keys:
                msg = f"the generator at {directory} lacks {sorted(missing)} and has {found.unexpected_keys} besides"
                raise CheckpointError(msg)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            msg = f"the generator at {directory} cannot be loaded: {error}"
            raise CheckpointError(msg) from error
        return model.to(device).eval()


def user_tokens(user_ids: Sequence[str], users: int) -> Tensor:
    """The user token (N,) int64 of each user: a hash of the user's id, the same in every run."""
    digests = [blake2b(user.encode(), digest_size=8).digest() for user in user_ids]
    return torch.tensor([int.from_bytes(digest) % users for digest in digests], dtype=torch.int64)


def _t5_config(config: TigerConfig) -> T5Config:
    made = T5Config(
        vocab_size=START + 1 + sum(config.codebook_sizes) + config.suffixes,
        d_model=config.width,
        d_kv=config.head_width,
        d_ff=config.hidden,
        num_layers=config.encoder_layers,
        num_decoder_layers=config.decoder_layers,
        num_heads=config.heads,
        dropout_rate=config.dropout,
        pad_token_id=START,
        eos_token_id=None,
    )
    made.decoder_start_token_id = START
    return made

"""How one content comes to its codes, as a client is told it, typed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from service.client.answers import Assignment, Entry, read


@dataclass(frozen=True, slots=True)
class ExplainedLevel:
    """What one level made of what it received.

    Attributes:
        level: From 1.
        code: The codeword chosen.
        prefix: The codes up to and with this one.
        margin: Latent distance from another codeword's being chosen; None where there is none.
        residual_norm: Of what is left for the levels after it.
        count: Live items under the prefix.
    """

    level: int
    code: int
    prefix: str
    margin: float | None
    residual_norm: float
    count: int


@dataclass(frozen=True, slots=True)
class TrainingPlace:
    """Where a quantization error lies among those of the training items.

    Attributes:
        quantization_error: Of the training items: `mean`, and quantiles `q01` to `q99`.
        share_below: The share of training items with a smaller one, from 0.01 to 0.99.
    """

    quantization_error: Mapping[str, float]
    share_below: float


@dataclass(frozen=True, slots=True)
class NearItem:
    """A live item that shares so many codes with the content, from the first on."""

    shared_levels: int
    assignment: Assignment


@dataclass(frozen=True, slots=True)
class Explanation:
    """A content's path down the levels, computed alone on the canonical path; nothing was written.

    Attributes:
        item_id: None where none was given.
        semantic_id: The one that the item holds, or that it would get now; None where its codes have no suffix left.
        held: Whether the item holds it already.
        retired: Whether that item was retired; it gets its ID back when it comes again.
        content_changed: Whether the item holds an ID of other codes.
        group_size: Suffixes issued to these codes so far.
        latent_norm: Of what the first level received.
        margin: The smallest of the levels'.
        quantization_error: Squared norm of what no level took.
        training: None where the tokenizer's manifest does not tell.
        nearest: Live items, those that share the most codes first.
    """

    tokenizer: str
    item_id: str | None
    semantic_id: str | None
    tokens: tuple[str, ...] | None
    held: bool
    retired: bool
    content_changed: bool
    group_size: int
    codes: tuple[int, ...]
    levels: tuple[ExplainedLevel, ...]
    latent_norm: float
    margin: float | None
    quantization_error: float
    training: TrainingPlace | None
    prefix_is_coarse_to_fine: bool
    nearest: tuple[NearItem, ...]


def explained(entry: Entry) -> Explanation:
    """The answer of `POST /explain`."""
    training = entry["training"]
    return read(
        Explanation,
        {
            **entry,
            "levels": tuple(read(ExplainedLevel, level) for level in entry["levels"]),
            "training": None if training is None else read(TrainingPlace, training),
            "nearest": tuple(NearItem(near["shared_levels"], read(Assignment, near)) for near in entry["nearest"]),
        },
    )

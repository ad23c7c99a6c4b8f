"""The documented shape of what is asked and answered of one content's path."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, Field, WithJsonSchema

from service.decoding.schemas import CoarseToFine
from service.schemas import ITEM_SCHEMA, SEMANTIC_ID_EXAMPLE, Envelope, FoundSemanticId, Namespace, TokenizerName

MAX_NEIGHBOURS = 100

_CONTENT = {
    "title": "Content",
    "description": "An item as of `POST /tokenize`; its item_id may be left out.",
    "anyOf": [
        {**one, "required": [name for name in one["required"] if name != "item_id"]}
        for one in ITEM_SCHEMA["anyOf"]
        if "required" in one
    ],
}


class ExplainRequest(Envelope):
    """A content to explain."""

    item: Annotated[dict[str, Any], WithJsonSchema(_CONTENT)] = Field(
        examples=[{"text": "Cordless electric kettle, stainless steel, 1.7 l"}]
    )
    tokenizer: TokenizerName = None
    namespace: Namespace = "default"
    neighbours: int = Field(default=10, ge=0, le=MAX_NEIGHBOURS, description="How many nearest items, at most.")


class ExplainedLevel(BaseModel):
    """What one level made of what it received."""

    level: int = Field(description="From 1.")
    code: int = Field(description="The codeword chosen.")
    prefix: str = Field(description="The codes up to and with this one.")
    margin: float | None = Field(
        description="How far, in units of the latent, from another codeword's being chosen; null where there is none."
    )
    residual_norm: float = Field(description="Norm of what is left for the levels after it.")
    count: int = Field(description="Live items under the prefix.")


class TrainingPlace(BaseModel):
    """Where a quantization error lies among those of the training items."""

    quantization_error: dict[str, float] = Field(description="Of the training items: mean, and quantiles q01 to q99.")
    share_below: float = Field(description="The share of training items with a smaller one, from 0.01 to 0.99.")


class NearItem(FoundSemanticId):
    """A live item that shares a prefix with the content."""

    shared_levels: int = Field(description="How many codes it shares.")


class ExplainResponse(BaseModel):
    """A content's path down the levels, computed on the canonical path; nothing was written."""

    tokenizer: str
    namespace: str
    item_id: str | None
    semantic_id: str | None = Field(
        description="The one that the item holds, or that it would get now; null where its codes have no suffix left.",
        examples=[SEMANTIC_ID_EXAMPLE],
    )
    tokens: list[str] | None
    held: bool = Field(description="Whether the item holds it already.")
    retired: bool = Field(description="Whether that item was retired; it gets its ID back when it comes again.")
    content_changed: bool = Field(description="Whether the item holds an ID that was given to content of other codes.")
    group_size: int = Field(description="Suffixes issued to these codes so far.")
    codes: list[int]
    levels: list[ExplainedLevel]
    latent_norm: float = Field(description="Norm of what the first level received.")
    margin: float | None = Field(description="The smallest of the levels'.")
    quantization_error: float = Field(description="Squared norm of what no level took.")
    training: TrainingPlace | None = Field(description="Null where the tokenizer's manifest does not tell.")
    prefix_is_coarse_to_fine: CoarseToFine
    nearest: list[NearItem] = Field(description="Live items, those that share the most codes first.")

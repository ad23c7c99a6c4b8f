"""The documented shape of what a decoder asks and is answered."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, WithJsonSchema

from service.schemas import (
    SEMANTIC_ID_EXAMPLE,
    Displayed,
    Envelope,
    ErrorBody,
    FoundSemanticId,
    Namespace,
    Problem,
    TokenizerName,
)

PREFIX_EXAMPLE = "12-200"

_PREFIX = {
    "title": "Prefix",
    "type": "string",
    "description": "The first codes of an ID, in either form; empty: the root.",
}
CoarseToFine = Annotated[
    bool,
    Field(
        description="Whether a prefix describes its items coarsely, as the tokenizer's manifest says. False (product "
        "quantization): items under it agree in some parts of their content and need not be alike in all."
    ),
]
_ANYTHING_ELSE = {"title": "Anything else", "description": "Answered in its place with an error of its own."}


class NextRequest(Envelope):
    """Prefixes to go on from."""

    prefixes: Annotated[
        list[Any], WithJsonSchema({"type": "array", "minItems": 1, "items": {"anyOf": [_PREFIX, _ANYTHING_ELSE]}})
    ] = Field(min_length=1, examples=[["", PREFIX_EXAMPLE]])
    tokenizer: TokenizerName = None
    namespace: Namespace = "default"


class NextEntry(BaseModel):
    """What leads from a prefix to a live item."""

    prefix: str = Field(description="As it was asked for.")
    allowed: list[int] = Field(description="In order: codes of the next level, or suffixes. Empty: a dead prefix.")
    mask: str = Field(
        description="Base64 of one bit a number, the lowest bit of the first byte for 0: as many as the next codebook "
        "has codewords, or up to the last live suffix; padded to whole bytes."
    )


class UnknownPrefix(BaseModel):
    """A prefix that cannot be answered."""

    prefix: str | None = Field(description="As it was asked for; null where that was no text.")
    error: ErrorBody


class NextResponse(BaseModel):
    """An entry per prefix, in order."""

    tokenizer: str
    namespace: str
    prefix_is_coarse_to_fine: CoarseToFine
    next: list[NextEntry | UnknownPrefix]


class Child(BaseModel):
    """A code that follows a prefix."""

    code: int
    prefix: str = Field(description="The prefix with this code.", examples=[PREFIX_EXAMPLE])
    count: int = Field(description="Live items under it.")


class PrefixListing(BaseModel):
    """What stands under a prefix."""

    tokenizer: str
    namespace: str
    prefix: str = Field(examples=[PREFIX_EXAMPLE])
    prefix_is_coarse_to_fine: CoarseToFine
    count: int = Field(description="Live items under it.")
    children: list[Child] = Field(description="In order; none under the codes of all levels, where only items follow.")
    items: list[FoundSemanticId] = Field(description="A page of live items, in the order of their Semantic IDs.")
    next_cursor: str | None = Field(description="Of the next page; null where this is the last.")


class ChangeEntry(Displayed):
    """One change of the record."""

    revision: int = Field(description="The number of this change; the next one has the next.")
    change: Literal["assigned", "returned", "retired", "replaced"]
    item_id: str
    semantic_id: str = Field(description="What came (assigned, returned) or went.", examples=[SEMANTIC_ID_EXAMPLE])
    replaced_by: str | None = Field(
        description="What came instead, where it was replaced; that one has its own change."
    )


class ChangesResponse(BaseModel):
    """Changes in order, without a hole."""

    tokenizer: str
    namespace: str
    epoch: str = Field(
        description="Which history of the record the revisions are of; another once an operator has accepted that the "
        "registry came back older. Empty where there is no record."
    )
    revision: int = Field(description="The record's own; there is more to read while it is beyond `next_after`.")
    next_after: int = Field(description="Where to go on reading.")
    changes: list[ChangeEntry]


class ChangesGoneProblem(Problem):
    """The changes are no longer kept: take a new trie (RFC 9457)."""

    revision: int = Field(description="The record's present revision.")

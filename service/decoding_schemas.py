"""The documented shape of what a decoder asks and is answered."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from service.schemas import SEMANTIC_ID_EXAMPLE, Problem


class ChangeEntry(BaseModel):
    """One change of the record."""

    revision: int = Field(description="The number of this change; the next one has the next.")
    change: Literal["assigned", "returned", "retired", "replaced"]
    item_id: str
    semantic_id: str = Field(description="What came (assigned, returned) or went.", examples=[SEMANTIC_ID_EXAMPLE])
    replaced_by: str | None = Field(description="What came instead, where it was replaced.")


class ChangesResponse(BaseModel):
    """Changes in order, without a hole."""

    tokenizer: str
    namespace: str
    revision: int = Field(description="The record's own; there is more to read while it is beyond `next_after`.")
    next_after: int = Field(description="Where to go on reading.")
    changes: list[ChangeEntry]


class ChangesGoneProblem(Problem):
    """The changes are no longer kept: take a new trie (RFC 9457)."""

    revision: int = Field(description="The record's present revision.")

"""What goes over the wire: the envelopes as pydantic models, and the documented shape of every answer."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from service.quoting import bare

NAMESPACE_PATTERN = r"^[A-Za-z0-9_.-]{1,64}$"
Namespace = Annotated[
    str,
    Field(
        pattern=NAMESPACE_PATTERN,
        description="An independent catalogue inside this deployment.",
        examples=["default"],
    ),
]
TokenizerName = Annotated[
    str | None, Field(description="`name` or `name@fingerprint`; the default one where absent.", examples=[None])
]
SEMANTIC_ID_EXAMPLE = "12-200-7-41-0"

_ANYTHING_ELSE = {"title": "Anything else", "description": "Answered in its place with an error of its own."}
_SEMANTIC_ID = {"title": "Semantic ID", "type": "string", "description": "In either form."}
_ITEM_ID = {"type": "string", "minLength": 1, "maxLength": 256, "description": "The catalogue's own key."}
_DISPLAY = {
    "type": ["string", "null"],
    "description": "A title to be shown beside the item id, kept where the service is set so (`SID_DISPLAY_BYTES`) and "
    "cut to its bytes. It takes the place of the one before; an empty one is none. No ID depends on it.",
}
_FIELD = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}, {"type": "null"}]}


def _item_schema(title: str, kind: str, content: dict[str, Any]) -> dict[str, Any]:
    return {
        "title": title,
        "type": "object",
        "properties": {"item_id": _ITEM_ID, kind: content, "display": _DISPLAY},
        "required": ["item_id", kind],
        "additionalProperties": False,
    }


ITEM_SCHEMA: dict[str, Any] = {
    "title": "Item",
    "anyOf": [
        _item_schema("Text", "text", {"type": "string", "minLength": 1}),
        _item_schema(
            "Fields",
            "fields",
            {
                "type": "object",
                "description": "Put together by the tokenizer's text template; other fields are ignored.",
                "properties": dict.fromkeys(("title", "brand", "categories", "description"), _FIELD),
            },
        ),
        _item_schema(
            "Embedding",
            "embedding",
            {
                "anyOf": [
                    {"type": "array", "items": {"type": "number"}},
                    {"type": "string", "contentEncoding": "base64", "description": "Little-endian float32."},
                ]
            },
        ),
        _ANYTHING_ELSE,
    ],
}


OnChange = Annotated[
    Literal["keep", "reassign"],
    Field(
        description="A known item with other codes keeps its Semantic ID; or is given another one, and the one it held "
        "stays reserved and says by which it was replaced.",
    ),
]


class Envelope(BaseModel):
    """A request's outer object: nothing unknown, no coercion."""

    model_config = ConfigDict(extra="forbid", strict=True)


class TokenizeOptions(Envelope):
    """What holds for all items of a request."""

    tokenizer: TokenizerName = None
    namespace: Namespace = "default"
    assign: bool = Field(
        default=True, description="False is the dry run: codes and what is known of them, nothing written."
    )
    on_change: OnChange = "keep"


class TokenizeRequest(TokenizeOptions):
    """Items to tokenize."""

    items: Annotated[list[Any], WithJsonSchema({"type": "array", "minItems": 1, "items": ITEM_SCHEMA})] = Field(
        min_length=1,
        examples=[[{"item_id": "kettle-1", "text": "Cordless electric kettle, stainless steel, 1.7 l"}]],
    )

    def beside(self, options: TokenizeOptions) -> Self:
        """This request; where it says nothing, what the query says."""
        unsaid = TokenizeOptions.model_fields.keys() - self.model_fields_set
        return self.model_copy(update={name: getattr(options, name) for name in unsaid})


class RecordOptions(Envelope):
    """Which record a look-up is about."""

    namespace: Namespace = "default"
    tokenizer: TokenizerName = None


class ItemOptions(RecordOptions):
    """Which item a call is about, where its path does not say."""

    item_id: str | None = None  # required; what is wrong with it is said as of any item id


class ManyOptions(RecordOptions):
    """Of a request that looks up many."""

    counterparts: bool = Field(
        default=True,
        description="Where several tokenizers are loaded: whether to say what each item holds under the other ones, "
        "which reads the record of each.",
    )


class LookupRequest(ManyOptions):
    """Semantic IDs to look up."""

    semantic_ids: Annotated[
        list[Any], WithJsonSchema({"type": "array", "minItems": 1, "items": {"anyOf": [_SEMANTIC_ID, _ANYTHING_ELSE]}})
    ] = Field(min_length=1, examples=[[SEMANTIC_ID_EXAMPLE]])


_ItemIds = Annotated[
    list[Any], WithJsonSchema({"type": "array", "minItems": 1, "items": {"anyOf": [_ITEM_ID, _ANYTHING_ELSE]}})
]


class AssignmentsRequest(ManyOptions):
    """Items to look up."""

    item_ids: _ItemIds = Field(min_length=1, examples=[["kettle-1"]])


class RetireRequest(RecordOptions):
    """Items to retire."""

    item_ids: _ItemIds = Field(min_length=1, examples=[["kettle-1"]])


class ErrorBody(BaseModel):
    """What is wrong with one item."""

    type: str = Field(examples=["urn:semid:problem:invalid_text"])
    title: str
    detail: str


class Problem(ErrorBody):
    """A fault of the whole request (RFC 9457)."""

    status: int
    request_id: str | None = Field(default=None, description="As the answer's `X-Request-ID`: the log has it too.")


class RetiredBody(ErrorBody):
    """What was retired, and when."""

    item_id: str
    semantic_id: str
    retired_at: datetime


class RetiredProblem(RetiredBody):
    """What was asked for was retired (RFC 9457)."""

    status: int
    request_id: str | None = None


class _Holder(BaseModel):
    item_id: str
    semantic_id: str = Field(examples=[SEMANTIC_ID_EXAMPLE])
    codes: list[int]
    suffix: int
    tokens: list[str] = Field(description="The generator's vocabulary.", examples=[["<a_12>", "<b_200>", "<c_0>"]])


class Displayed(BaseModel):
    """An item that may have a title."""

    display: str | None = Field(default=None, description="The item's title; there where one is kept.")


_REPLACED_BY = Field(description="The Semantic ID that the item holds instead; null where it holds this one.")
_CONTENT_CHANGED = Field(description="Whether the item's latest content has other codes than the ID it holds.")


class TokenizedItem(BaseModel):
    """An item and its Semantic ID."""

    item_id: str
    semantic_id: str | None = Field(description="Null in a dry run of an item without one.")
    codes: list[int]
    suffix: int | None
    tokens: list[str] | None
    created: bool = Field(description="Whether this request assigned it.")
    content_changed: bool = Field(description="Whether its latest content has other codes than its Semantic ID.")
    quantization_error: float | None = Field(description="Squared norm of the last residual; null if not computed.")
    margin: float | None = Field(description="Latent distance to the nearest other codes; null if not computed.")
    group_size: int | None = Field(default=None, description="Dry run only: suffixes issued to these codes so far.")
    overflow: bool = Field(
        default=False,
        description="There, and true, where this request assigned an ID of a next-nearest codeword, the nearest having "
        "no suffix left.",
    )


class FailedItem(BaseModel):
    """An item and its own error."""

    item_id: str | None
    error: ErrorBody


class TokenizeResponse(BaseModel):
    """An entry per item, in order."""

    tokenizer: str
    namespace: str
    items: list[TokenizedItem | FailedItem]


class HeldId(_Holder):
    """What an item holds."""

    tokenizer: str
    namespace: str
    assigned_at: datetime
    content_changed: bool = _CONTENT_CHANGED
    replaced_by: str | None = _REPLACED_BY


class WithCounterparts(BaseModel):
    """An item that may hold something under other tokenizers."""

    counterparts: dict[str, str | None] = Field(
        default={},
        description="Where several tokenizers are loaded, what the item holds under each other one, by its full name: "
        "null where nothing, or where it was retired there. One whose record cannot be read just now is left out.",
    )


class AssignmentAnswer(HeldId, Displayed, WithCounterparts):
    """An assignment."""


class RetiredAssignment(HeldId):
    """An assignment that has ended; its Semantic ID is never given to another item."""

    retired_at: datetime


class FoundSemanticId(_Holder, Displayed, WithCounterparts):
    """A Semantic ID and its item."""

    assigned_at: datetime
    content_changed: bool = _CONTENT_CHANGED
    replaced_by: str | None = _REPLACED_BY


class UnknownSemanticId(BaseModel):
    """A Semantic ID that cannot be answered."""

    semantic_id: str | None = Field(description="As it was asked for; null where that was no text.")
    error: ErrorBody | RetiredBody


class LookupResponse(BaseModel):
    """An entry per Semantic ID, in order."""

    tokenizer: str
    namespace: str
    items: list[FoundSemanticId | UnknownSemanticId]


class UnknownItem(BaseModel):
    """An item that cannot be answered."""

    item_id: str | None = Field(description="As it was given; null where that was no text.")
    error: ErrorBody | RetiredBody


class AssignmentsResponse(BaseModel):
    """An entry per item, in order."""

    tokenizer: str
    namespace: str
    items: list[FoundSemanticId | UnknownItem]


class RetiredSemanticId(_Holder):
    """What a retired item held; nobody else gets it."""

    assigned_at: datetime
    content_changed: bool = _CONTENT_CHANGED
    replaced_by: str | None = _REPLACED_BY
    retired_at: datetime


class RetireResponse(BaseModel):
    """An entry per item, in order."""

    tokenizer: str
    namespace: str
    items: list[RetiredSemanticId | UnknownItem]


class TokenizersResponse(BaseModel):
    """What is loaded: manifests with their measures."""

    default: str = Field(description="The tokenizer that answers where none is named.")
    default_since: datetime | None = Field(description="When a call made it that; null where it is by the settings.")
    tokenizers: list[dict[str, Any]] = Field(description="The default first.")


class Health(BaseModel):
    """Liveness: whether the models' threads run."""

    alive: bool


class Readiness(BaseModel):
    """Readiness: models warm and registry reachable."""

    ready: bool


def describe(errors: Sequence[Any]) -> str:
    """Validation errors in one line: where, and what is wrong; printable and short, whatever the caller wrote."""
    return "; ".join(f"{bare('.'.join(map(str, error['loc'])) or 'body')}: {error['msg']}" for error in errors[:5])

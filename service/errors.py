"""Every way a request can fail, with its HTTP status and its words.

    bytes --MalformedRequest--> request --ItemError--> items --Overloaded--> batcher
          --EncoderStopped--> codes --RegistryUnavailable--> assignments --> answer

A `ServiceError` fails the whole request and becomes one problem document (RFC 9457). An `ItemError` fails one item,
in its place in the answer, and leaves its neighbours alone. Each class carries its status, its stable `type` and its
title; what is particular to one occurrence is the `detail`. Nothing outside this module knows an HTTP status.
"""

from __future__ import annotations

import math
from datetime import datetime
from typing import Any, ClassVar

PROBLEM_JSON = "application/problem+json"
PROBLEM_TYPE_PREFIX = "urn:semid:problem:"


class SemidError(Exception):
    """The root of all errors with words meant for the caller.

    Attributes:
        status: The HTTP status of a request that fails with it.
        slug: The stable end of the problem's `type`.
        title: One line, the same for every occurrence.
        detail: What is particular to this occurrence.
    """

    status: ClassVar[int] = 500
    slug: ClassVar[str] = "internal_error"
    title: ClassVar[str] = "The service failed"

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail

    def as_error(self) -> dict[str, Any]:
        """`{type, title, detail}`: an item's own error."""
        return {"type": PROBLEM_TYPE_PREFIX + self.slug, "title": self.title, "detail": self.detail}

    def as_problem(self) -> dict[str, Any]:
        """The problem document of a whole request (RFC 9457)."""
        return {**self.as_error(), "status": self.status}


class WorkerFailed(SemidError):
    """A worker of a backfill could not go on; blocks that are done stay so."""

    slug, title = "worker_failed", "A worker failed"


class ServiceError(SemidError):
    """A fault of the whole request."""

    retry_after_s: float | None = None

    def headers(self) -> dict[str, str]:
        """`Retry-After` in whole seconds, where waiting helps."""
        if self.retry_after_s is None:
            return {}
        return {"Retry-After": str(max(1, math.ceil(self.retry_after_s)))}


class MalformedRequest(ServiceError):
    """The body is not what the route's schema says."""

    status, slug, title = 422, "malformed_request", "The request does not fit its schema"


class NotJson(ServiceError):
    """The body cannot be parsed."""

    status, slug, title = 400, "not_json", "The body is not JSON"


class BrokenStream(ServiceError):
    """The body cannot be read as an Arrow stream, from its beginning or any further."""

    status, slug, title = 400, "broken_stream", "The Arrow stream is broken"


class BodyTimeout(ServiceError):
    """The body did not arrive within `SID_BODY_TIMEOUT_S`, or a stream's next items within `SID_STREAM_TIMEOUT_S`."""

    status, slug, title = 408, "body_timeout", "The body did not arrive in time"


class NotHttp(ServiceError):
    """What came over a connection is no request."""

    status, slug, title = 400, "not_http", "That is no HTTP request"


class HeadTooLarge(ServiceError):
    """A request's target and headers have more bytes than `SID_MAX_HEAD_BYTES`."""

    status, slug, title = 431, "head_too_large", "The head of the request is too large"


class HeadTimeout(ServiceError):
    """A request's head did not arrive within `SID_HEAD_TIMEOUT_S`."""

    status, slug, title = 408, "head_timeout", "The head of the request did not arrive in time"


class Unauthorized(ServiceError):
    """The request brings no key, or none that is known."""

    status, slug, title = 401, "unauthorized", "A key is needed"

    def headers(self) -> dict[str, str]:
        """How to bring one."""
        return {"WWW-Authenticate": 'Bearer realm="semid"'}


class Forbidden(ServiceError):
    """The request's key is for less than this."""

    status, slug, title = 403, "forbidden", "The key is not for this"


class KeysUnreadable(ServiceError):
    """The file of keys is not there or is broken; at start-up this ends the service."""

    status, slug, title = 503, "keys_unreadable", "The keys cannot be read"
    retry_after_s = 30.0


class UnsupportedMediaType(ServiceError):
    """The body's content type is not one the route reads."""

    status, slug, title = 415, "unsupported_media_type", "The content type is not supported"


class BodyTooLarge(ServiceError):
    """The body has more bytes than `SID_MAX_BODY_BYTES`."""

    status, slug, title = 413, "body_too_large", "The body is too large"


class TooManyItems(ServiceError):
    """The request has more items than its limit."""

    status, slug, title = 413, "too_many_items", "The request has too many items"


class UnknownTokenizer(ServiceError):
    """The request names a tokenizer that is not loaded."""

    status, slug, title = 422, "unknown_tokenizer", "That tokenizer is not loaded"


class AmbiguousTokenizer(ServiceError):
    """The request names a tokenizer by a name that several loaded ones have."""

    status, slug, title = 422, "ambiguous_tokenizer", "Several loaded tokenizers have that name"


class TokenizerLoadedTwice(ServiceError):
    """The same tokenizer would be loaded beside itself; at start-up this ends the service."""

    status, slug, title = 409, "tokenizer_loaded_twice", "That tokenizer is loaded already"


class TokenizerNameTaken(ServiceError):
    """Another tokenizer of that name is loaded: callers who give the name alone would be refused from then on."""

    status, slug, title = 409, "tokenizer_name_taken", "Another loaded tokenizer has that name"


class TakesOtherContent(ServiceError):
    """The tokenizer cannot take what callers send to the default one, so that they would be refused from then on."""

    status, slug, title = 409, "takes_other_content", "That tokenizer takes other content than the default one"


class TokenizerIsDefault(ServiceError):
    """The default tokenizer cannot be unloaded."""

    status, slug, title = 409, "tokenizer_is_default", "That tokenizer is the default one"


class TooManyTokenizers(ServiceError):
    """As many tokenizers are loaded as `SID_MAX_TOKENIZERS` allows."""

    status, slug, title = 409, "too_many_tokenizers", "No more tokenizers may be loaded"


class LoadingUnderWay(ServiceError):
    """One checkpoint is loaded at a time."""

    status, slug, title = 409, "loading_under_way", "Another checkpoint is being loaded"


class CheckpointRefused(ServiceError):
    """The checkpoint is not what was frozen, or lies where none may be loaded from."""

    status, slug, title = 422, "checkpoint_refused", "That checkpoint cannot be loaded"


class NotLoadedEverywhere(ServiceError):
    """A worker could not load what another could; nothing was changed."""

    status, slug, title = 503, "not_loaded_everywhere", "A worker cannot load that tokenizer"
    retry_after_s = 30.0


class AdminClosed(ServiceError):
    """Nobody is known to be the operator."""

    status, slug, title = 403, "admin_closed", "The service takes no such call from there"


class PlanUnreadable(ServiceError):
    """The file of the loaded tokenizers is broken; at start-up this ends the service."""

    status, slug, title = 503, "plan_unreadable", "Which tokenizers to load cannot be read"
    retry_after_s = 30.0


class MalformedSemanticId(ServiceError):
    """A Semantic ID has the wrong form, number of parts, or a code out of range."""

    status, slug, title = 422, "malformed_semantic_id", "That is not a Semantic ID of this tokenizer"


class MalformedCursor(ServiceError):
    """A cursor was not answered for that listing."""

    status, slug, title = 422, "malformed_cursor", "That is not a cursor of this listing"


class MalformedItemId(ServiceError):
    """An item id in a path is empty, too long or not text."""

    status, slug, title = 422, "malformed_item_id", "That is not an item id"


class NotAssigned(ServiceError):
    """No item holds that Semantic ID, or the item has none."""

    status, slug, title = 404, "not_assigned", "Nothing is assigned there"


class Retired(ServiceError):
    """The item was retired: its Semantic ID names it for ever, but is in no listing."""

    status, slug, title = 410, "retired", "The item was retired"

    def __init__(self, detail: str, *, item_id: str, semantic_id: str, retired_at: datetime) -> None:
        super().__init__(detail)
        self._members = {"item_id": item_id, "semantic_id": semantic_id, "retired_at": retired_at}

    def as_error(self) -> dict[str, Any]:
        """With what was retired, and when."""
        return {**super().as_error(), **self._members}


class ChangesGone(ServiceError):
    """The changes since that revision are no longer kept, or not of this record."""

    status, slug, title = 410, "changes_gone", "Those changes are gone: take a new trie"

    def __init__(self, detail: str, revision: int) -> None:
        super().__init__(detail)
        self._revision = revision

    def as_error(self) -> dict[str, Any]:
        """With the record's present revision."""
        return {**super().as_error(), "revision": self._revision}


class Overloaded(ServiceError):
    """Admission is closed: the queue is at its bound."""

    status, slug, title = 429, "overloaded", "The service is at its limit"

    def __init__(self, detail: str, retry_after_s: float = 1.0) -> None:
        super().__init__(detail)
        self.retry_after_s = retry_after_s


class EncoderStopped(ServiceError):
    """The model's thread has died or is shutting down."""

    status, slug, title = 503, "encoder_stopped", "The model is not running"
    retry_after_s = 5.0


class ShuttingDown(ServiceError):
    """The service ends before the body of a stream does."""

    status, slug, title = 503, "shutting_down", "The service is shutting down"
    retry_after_s = 1.0

    def __init__(self, detail: str = "what was answered stands; send the rest again, once the service is back") -> None:
        super().__init__(detail)


class RegistryUnavailable(ServiceError):
    """The registry cannot be reached, is loading, or did not confirm the durability asked for."""

    status, slug, title = 503, "registry_unavailable", "The registry cannot be reached"
    retry_after_s = 1.0


class RegistryOlder(ServiceError):
    """The registry lost what was acknowledged: restored from a backup, failed over to a late replica, emptied."""

    status, slug, title = 503, "registry_older", "The registry is older than what was acknowledged"
    retry_after_s = 30.0


class RegistryRefused(ServiceError):
    """The registry cannot keep the promises asked for; at start-up this ends the service, and says why."""

    status, slug, title = 503, "registry_refused", "The registry cannot keep what is promised"
    retry_after_s = 30.0


class ItemError(SemidError):
    """A fault of one item; its neighbours succeed (P7)."""

    status = 422


class InvalidItem(ItemError):
    """The item is not an object, or has an unknown or mistyped member."""

    slug, title = "invalid_item", "The item does not fit its schema"


class InvalidLine(ItemError):
    """The line of a stream is not JSON, or longer than a line may be."""

    slug, title = "invalid_line", "The line cannot be read"


class InvalidItemId(ItemError):
    """The item id is missing, empty, too long, not a string, or not valid text."""

    slug, title = "invalid_item_id", "The item id is not valid"


class InvalidContent(ItemError):
    """The item has no content, or more than one kind of it."""

    slug, title = "invalid_content", "The item needs exactly one of text, fields and embedding"


class InvalidText(ItemError):
    """The text is empty, too long, or has characters that no text has."""

    slug, title = "invalid_text", "The text cannot be tokenized"


class InvalidEmbedding(ItemError):
    """The embedding has the wrong dimension, is not finite, is zero, or is not base64 of float32."""

    slug, title = "invalid_embedding", "The embedding cannot be tokenized"


class EncodingFailed(ItemError):
    """The model failed on this item alone."""

    slug, title = "encoding_failed", "The model failed on this item"


class ConflictingDuplicate(ItemError):
    """The same item id stands in one request with different contents."""

    slug, title = "conflicting_duplicate", "The item id stands in this request with different contents"


class SuffixExhausted(ItemError):
    """The codes have as many items as the tokenizer's suffix vocabulary has suffixes."""

    status, slug, title = 409, "suffix_exhausted", "These codes have no collision suffix left"

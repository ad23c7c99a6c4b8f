"""Every way a call can fail for the caller of a client.

    TokenizerError
      Unavailable         no answer for as long as the client had patience
      UnusableAnswer      what answered is not this service
      Refused             a problem document (RFC 9457), with its status, type, title and detail
        NotAssigned, Retired, ChangesGone, UnknownTokenizer, AccessDenied, ...

A fault of one item, Semantic ID or prefix is no exception: it stands in its place in the answer (`answers.Fault`).
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, ClassVar

from service.client.answers import Fault

PASSING_STATUSES = frozenset({408, 429, 502, 503, 504})


class TokenizerError(Exception):
    """The root of all errors of the clients."""


class Unavailable(TokenizerError):
    """The service could not be reached, or had no answer, for as long as the client had patience.

    Attributes:
        retry_after_s: When it asked to be tried again; 0 where it did not.
    """

    def __init__(self, words: str, retry_after_s: float = 0.0) -> None:
        super().__init__(words)
        self.retry_after_s = retry_after_s


class UnusableAnswer(TokenizerError):
    """The answer is not what this service answers: the address is of something else, or of another version."""


class ClientClosed(TokenizerError):
    """The client was closed while it was at work, or before."""


class Refused(TokenizerError):
    """The service refused a request.

    Attributes:
        status: The HTTP status.
        fault: The problem's `type`, `title`, `detail` and further members.
        retry_after_s: When to try again; 0 where nothing is said.
    """

    slugs: ClassVar[tuple[str, ...]] = ()
    statuses: ClassVar[tuple[int, ...]] = ()

    def __init__(self, status: int, fault: Fault, retry_after_s: float = 0.0) -> None:
        super().__init__(f"{status} {fault.title}: {fault.detail}" if fault.detail else f"{status} {fault.title}")
        self.status = status
        self.fault = fault
        self.retry_after_s = retry_after_s

    @property
    def passing(self) -> bool:
        """Whether it may be answered later."""
        return self.status in PASSING_STATUSES

    @property
    def members(self) -> Mapping[str, Any]:
        """Of the problem, beside those of every problem."""
        return self.fault.members


class NotAssigned(Refused):
    """No item holds that Semantic ID, or the item has none."""

    slugs = ("not_assigned",)


class Retired(Refused):
    """The item was retired."""

    slugs = ("retired",)

    @property
    def item_id(self) -> str:
        """Whose Semantic ID it was, and stays."""
        return str(self.members["item_id"])

    @property
    def semantic_id(self) -> str:
        """The Semantic ID."""
        return str(self.members["semantic_id"])

    @property
    def retired_at(self) -> datetime:
        """Since when."""
        return datetime.fromisoformat(self.members["retired_at"])


class ChangesGone(Refused):
    """The changes since that revision are no longer kept, or the revision is of another epoch: take a new trie."""

    slugs = ("changes_gone",)

    @property
    def revision(self) -> int:
        """The record's present one."""
        return int(self.members["revision"])


class UnknownTokenizer(Refused):
    """The tokenizer that was named is not loaded, or several have the name."""

    slugs = ("unknown_tokenizer", "ambiguous_tokenizer")


class MalformedSemanticId(Refused):
    """What was asked for is no Semantic ID, or no prefix, of this tokenizer."""

    slugs = ("malformed_semantic_id",)


class AccessDenied(Refused):
    """The service wants another API key, or one with other rights."""

    statuses = (401, 403)


def refusal(status: int, fault: Fault, retry_after_s: float = 0.0) -> Refused:
    """A problem as an exception of its own class."""
    for kind in Refused.__subclasses__():
        if fault.slug in kind.slugs or status in kind.statuses:
            return kind(status, fault, retry_after_s)
    return Refused(status, fault, retry_after_s)

"""One request and its answer, as bytes: the line between what is asked and how it is sent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import httpx
import orjson

from service.client.answers import Fault
from service.client.errors import Refused, UnusableAnswer, refusal
from service.client.patience import retry_after_s

T_co = TypeVar("T_co", covariant=True)
T = TypeVar("T")

JSON = "application/json"


@dataclass(frozen=True)
class Request:
    """What is sent.

    Attributes:
        longer_s: How much longer than usual the answer may take.
    """

    method: str
    path: str
    params: Mapping[str, str | int | float] = field(default_factory=dict)
    content: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    longer_s: float = 0.0


@dataclass(frozen=True)
class Reply:
    """What came back.

    Attributes:
        cut: What broke it off in the middle of its body.
    """

    status: int
    headers: Mapping[str, str]
    content: bytes
    cut: httpx.TransportError | None = None

    def require_success(self) -> None:
        """Raise the refusal where it is one."""
        if not 200 <= self.status < 300:
            raise self.refusal()

    def refusal(self) -> Refused:
        """As an exception."""
        try:
            fault = Fault.of(orjson.loads(self.content))
        except (ValueError, KeyError, TypeError, AttributeError):  # of a proxy in between, as a rule
            fault = Fault("about:blank", httpx.codes.get_reason_phrase(self.status) or "No success", "")
        return refusal(self.status, fault, retry_after_s(self.headers.get("retry-after")))

    def require_whole(self) -> None:
        """Raise what broke it off."""
        if self.cut is not None:
            raise self.cut

    def json(self) -> Any:
        """The whole body.

        Raises:
            Refused: It is no success.
            httpx.TransportError: It is not whole.
            UnusableAnswer: It is no JSON.
        """
        self.require_whole()
        self.require_success()
        try:
            return orjson.loads(self.content)
        except orjson.JSONDecodeError as error:
            raise UnusableAnswer(f"the answer is not JSON: {self.content[:60]!r}") from error


class Exchange(Protocol[T_co]):
    """A request that is sent, and sent again, until it is answered.

    Attributes:
        progress: Grows whenever a reply brought something.
    """

    progress: int

    def request(self) -> Request:
        """What is to be sent now."""

    def take(self, reply: Reply) -> bool:
        """Read a reply; whether that was all.

        Raises:
            Refused: The request was; what came with the reply is kept.
            httpx.TransportError: The reply was cut off; what came of it is kept.
            UnusableAnswer: It is not this service's.
        """

    def result(self) -> T_co:
        """What was answered."""


class Call(Generic[T]):
    """An exchange with one answer, read at once."""

    progress = 0

    def __init__(self, request: Request, read: Callable[[Reply], T]) -> None:
        self._request = request
        self._read = read
        self._found: list[T] = []

    def request(self) -> Request:
        """The same each time."""
        return self._request

    def take(self, reply: Reply) -> bool:
        """Read it."""
        try:
            self._found = [self._read(reply)]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UnusableAnswer(f"{self._request.path} answered what cannot be read: {error!r}") from error
        return True

    def result(self) -> T:
        """What was read."""
        return self._found[0]

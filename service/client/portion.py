r"""A part of many items, sent as one request; where the answer is cut off, what came of it stands and the rest is sent.

rows --request--> 200, answers, cut --> the rest of the rows --request--> 200, answers
              \-> 413 ------------> half as many at once
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import httpx

from service.client.errors import Refused, UnusableAnswer
from service.client.exchange import Reply, Request

R_contra = TypeVar("R_contra", contravariant=True)
R = TypeVar("R")
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True)
class Received(Generic[T]):
    """What a reply brought.

    Attributes:
        answers: In order.
        rows: How many rows they answer.
        trouble: Why there are no more; None where the reply is whole.
    """

    answers: list[T]
    rows: int
    trouble: httpx.TransportError | Refused | None = None


class Format(Protocol[R_contra, T]):
    """What rows and their answers are written in."""

    def request(self, rows: Sequence[R_contra]) -> Request:
        """The request of these rows."""

    def read(self, reply: Reply, rows: Sequence[R_contra]) -> Received[T]:
        """The answers, as many as came.

        Raises:
            UnusableAnswer: They are not answers to these rows.
        """


@dataclass
class Portion(Generic[R, T]):
    """Rows on their way to their answers."""

    format: Format[R, T]
    rows: Sequence[R]
    progress: int = 0
    answers: list[T] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Send all at once, at first."""
        self._at_once = len(self.rows)

    def request(self) -> Request:
        """Of the rows that have no answer yet."""
        return self.format.request(self._sent())

    def take(self, reply: Reply) -> bool:
        """Keep the answers."""
        sent = self._sent()
        if reply.status == httpx.codes.REQUEST_ENTITY_TOO_LARGE and len(sent) > 1:
            self._at_once = len(sent) // 2
            return False
        if reply.status != httpx.codes.OK:
            raise reply.refusal()
        received = self.format.read(reply, sent)
        self.answers += received.answers
        self.progress += received.rows
        if received.trouble is not None:
            raise received.trouble
        if received.rows < len(sent):
            raise UnusableAnswer(f"{len(sent)} rows were sent, {received.rows} are answered")
        return self.progress == len(self.rows)

    def result(self) -> list[T]:
        """The answers, in order."""
        return self.answers

    def _sent(self) -> Sequence[R]:
        return self.rows[self.progress : self.progress + self._at_once]

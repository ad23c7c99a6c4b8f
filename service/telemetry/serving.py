"""The request that is served just now: its id, and where its time goes.

It lies in a context variable, so that tasks and threads started for a request find it without its being passed along.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from enum import StrEnum
from typing import Final, Protocol

NO_ROUTE: Final = "none"  # what stands for the route where there is no such route
KEY_NAME: Final = "semid.key"  # in a scope: the name of the key that a request was let in by


class Part(StrEnum):
    """What a request waits for inside the service."""

    QUEUE = "queue"
    MODEL = "model"
    REGISTRY = "registry"


class Spans(Protocol):
    """Where a trace of the request is kept."""

    def add(self, name: str, started: float, ended: float) -> None:
        """Tell of something that took from one time to another, both by `time.perf_counter`."""


class Serving:
    """One request while it is served.

    Attributes:
        request_id: The caller's, or one made for it.
        seconds: What was waited for so far, in the order of coming; parts that ran side by side count each.
        spans: None where no trace of it is kept.
    """

    __slots__ = ("request_id", "seconds", "spans")

    def __init__(self, request_id: str, spans: Spans | None = None) -> None:
        self.request_id = request_id
        self.seconds: dict[Part, float] = {}
        self.spans = spans

    def waited(self, part: Part, seconds: float) -> None:
        """Tell that it waited for a part."""
        self.seconds[part] = self.seconds.get(part, 0.0) + seconds

    def server_timing(self) -> str:
        """The value of a `Server-Timing` header: milliseconds of each part; empty where it waited for none."""
        return ", ".join([f"{part};dur={1000 * seconds:.2f}" for part, seconds in self.seconds.items()])


class ServingTogether(Serving):
    """Requests that go one way together: what is waited for on it, each of them waits for. Its id has all of theirs.

    Args:
        requests: Those.
    """

    __slots__ = ("_requests",)

    def __init__(self, requests: Sequence[Serving]) -> None:
        self._requests = requests
        spans = [request.spans for request in requests if request.spans is not None]
        super().__init__(" ".join([request.request_id for request in requests]), _SpansOfAll(spans) if spans else None)

    def waited(self, part: Part, seconds: float) -> None:
        """Tell all that they waited for a part."""
        super().waited(part, seconds)
        for request in self._requests:
            request.waited(part, seconds)


class _SpansOfAll:
    def __init__(self, each: Sequence[Spans]) -> None:
        self._each = each

    def add(self, name: str, started: float, ended: float) -> None:
        for spans in self._each:
            spans.add(name, started, ended)


SERVING: ContextVar[Serving | None] = ContextVar("serving", default=None)


def request_id() -> str | None:
    """Of the request that is served just now; None outside of all requests."""
    serving = SERVING.get()
    return None if serving is None else serving.request_id

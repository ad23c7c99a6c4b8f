"""On what terms a stream goes on: how long its caller is waited for, and that the service is not about to end."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from service.errors import Overloaded

SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 1.0  # before items are tried again, which may look them up again each time
READING_SHARE = 0.5  # of the time in which the service has to end: bodies that end meanwhile are answered as ever
ANSWERING_SHARE = 0.9  # the rest is for the last entry to reach the caller


class Drain:
    """The end of the service, as its streams see it; to be made where the event loop runs.

    Attributes:
        reading_ends: Done when no more is read; what was read is answered.
        answering_ends: Done when no answer is waited for any longer.
    """

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.reading_ends: asyncio.Future[None] = loop.create_future()
        self.answering_ends: asyncio.Future[None] = loop.create_future()
        self._begun = False

    def begin(self, allowed_s: float) -> None:
        """The service ends within this time; a second call changes nothing."""
        if not self._begun:
            self._begun = True
            loop = asyncio.get_running_loop()
            loop.call_later(READING_SHARE * allowed_s, self.reading_ends.set_result, None)
            loop.call_later(ANSWERING_SHARE * allowed_s, self.answering_ends.set_result, None)


@dataclass(frozen=True)
class StreamTerms:
    """What holds for every stream.

    Attributes:
        patience_s: In which a caller has to send the next whole line or record batch, or a good part of it, and to take
            an answer. Only what is spent waiting for the caller counts.
        drain: When streams have to end.
    """

    patience_s: float
    drain: Drain = field(default_factory=Drain)


async def pause(error: Overloaded) -> None:
    """Returns when there may be room again."""
    await asyncio.sleep(min(max(error.retry_after_s or 0, SHORTEST_PAUSE_S), LONGEST_PAUSE_S))

"""What is tried again, when, and for how long.

Every call of the service may be sent twice: tokenizing and retiring are idempotent by item id, the rest only reads; but
for what loads and unloads tokenizers, which is sent once. So what decides is whether it may help: a connection that
fails, an answer that is cut off, 408, 429, 502, 503 and 504 may pass; any other refusal stands.
"""

from __future__ import annotations

import logging
import random
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

import httpx

from service.client.errors import Refused, Unavailable

log = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 30.0
LOGGED_AT_ATTEMPT = 4  # after about half a second
LASTING_SIGNS = ("CERTIFICATE", "UNKNOWN_CA", "WRONG_VERSION", "PROTOCOL_VERSION", "HANDSHAKE_FAILURE")  # of OpenSSL


@dataclass(frozen=True)
class Waiting:
    """A request is about to be tried again.

    Attributes:
        trouble: Why, in words.
        pause_s: When.
        attempts: How many have failed one after another.
        reached: Whether the service answered at all.
    """

    trouble: str
    pause_s: float
    attempts: int
    reached: bool


class Patience:
    """That of one call: it ends `patience_s` after the last progress.

    Args:
        url: The service, for words.
        patience_s: For how long a call that gets nowhere is tried again; 0: it is tried once.
        heard: Called before each pause; without it the log has a line once it takes longer.
    """

    def __init__(self, url: str, patience_s: float, heard: Callable[[Waiting], None] | None = None) -> None:
        self._url = url
        self._patience_s = patience_s
        self._heard = heard
        self.begin_anew()

    def begin_anew(self) -> None:
        """There was progress."""
        self._give_up = time.monotonic() + self._patience_s
        self._attempts = 0

    def pause_s(self, trouble: httpx.TransportError | Refused) -> float:
        """How long to wait before the next attempt: longer and longer, by chance, and no less than was asked for.

        Raises:
            Refused: Trying again does not help.
            Unavailable: It was tried for long enough.
        """
        refused = isinstance(trouble, Refused)
        if isinstance(trouble, Refused) and not trouble.passing:
            raise trouble
        words = str(trouble) if refused else f"{type(trouble).__name__}: {_said(trouble)}".removesuffix(": ")
        if isinstance(trouble, httpx.LocalProtocolError) or _is_of_tls(trouble):
            raise Unavailable(f"{self._url}: {words}") from trouble
        asked_s = trouble.retry_after_s if isinstance(trouble, Refused) else 0.0
        longest_s = min(FIRST_PAUSE_S * 2.0 ** min(self._attempts, 20), LONGEST_PAUSE_S)
        # By chance, so that callers that were cut off together do not come back together.
        pause_s = max(asked_s * random.uniform(1, 1.1), longest_s * random.uniform(0.5, 1))  # noqa: S311
        self._attempts += 1
        if time.monotonic() + pause_s > self._give_up:
            tried = "" if self._attempts == 1 else f" after {self._attempts} attempts"
            raise Unavailable(f"gave up on {self._url}{tried}: {words}", asked_s) from trouble
        if self._heard is not None:
            self._heard(Waiting(words, pause_s, self._attempts, reached=refused))
        elif self._attempts == LOGGED_AT_ATTEMPT:  # else a service that is not there looks like one that is slow
            log.warning("%s: %s; trying again for up to %g s", self._url, words, self._patience_s)
        return pause_s


def retry_after_s(value: str | None) -> float:
    """A `Retry-After` header: seconds, or a date (RFC 9110); 0 where it is neither."""
    if not value:
        return 0.0
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, float(parsedate_to_datetime(value).timestamp()) - time.time())
    except ValueError:
        return 0.0


def _is_of_tls(trouble: BaseException) -> bool:
    """Whether the two sides do not trust or understand each other, which time does not mend."""
    return any(
        isinstance(cause, ssl.SSLError) and any(sign in str(cause.reason) for sign in LASTING_SIGNS)
        for cause in _causes(trouble)
    )


def _said(trouble: BaseException) -> str:
    """In words: those of what is below where it has none itself."""
    return next((str(cause) for cause in _causes(trouble) if str(cause)), "")


def _causes(trouble: BaseException | None) -> Iterator[BaseException]:
    while trouble is not None:
        yield trouble
        trouble = trouble.__cause__ or trouble.__context__

"""The trie of a decoder, kept as fresh as the record: taken once, then led on by the changes.

    GET /trie --> trie --> GET /changes, waiting --> trie of the last change --> ...
      ^------------------- 410 changes_gone -----------'

Every trie it hands out is whole: that of one revision, never altered afterwards.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

import torch

from models import Trie
from service.client import (
    Change,
    ChangesGone,
    ChangesPage,
    ClientClosed,
    Refused,
    TokenizerClient,
    TokenizerError,
    Unavailable,
)
from service.decoding.change_tensors import as_tensors
from service.semantic_id import SemanticId

CHANGES_PER_READ = 10_000
CHANGES_PER_TRIE = 100_000
FIRST_SERVER_ERROR = 500
FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 30.0


class FollowerError(Exception):
    """The service refuses this follower, or answers what it cannot use: it will not get better by waiting."""


class ServiceAway(FollowerError):
    """The service cannot be reached, or has no answer at present."""

    def __init__(self, detail: str, retry_after_s: float = 0.0) -> None:
        super().__init__(detail)
        self.retry_after_s = retry_after_s


class Follower:
    """Holds the live trie of one namespace and tokenizer of a service.

    In the background, as a context manager or by `start` and `stop`:

        with Follower("http://127.0.0.1:8000", device="cuda") as follower:
            follower.trie  # of this moment; take it once for each `generate`

    or without a thread, by `advance`.

    A service that is away is waited for, with longer and longer pauses, and the trie stays what it was: `silent_s` says
    for how long. A tokenizer that is no longer loaded there is an error, never a change of tokenizer.

    Args:
        url: The service's base.
        namespace: The catalogue's namespace.
        tokenizer: Its name, best with its fingerprint; None: the one that is loaded when the follower starts.
        device: Where the tries are to be.
        wait_s: How long one request waits for changes.
        interval_s: The least time from one trie to the next: what changes in between is applied together.
        timeout_s: Of one request, beside `wait_s`.
    """

    def __init__(
        self,
        url: str,
        *,
        namespace: str = "default",
        tokenizer: str | None = None,
        device: torch.device | str = "cpu",
        wait_s: float = 2.0,
        interval_s: float = 0.1,
        timeout_s: float = 60.0,
    ) -> None:
        self._url = url
        self._namespace = namespace
        self._tokenizer = tokenizer
        self._timeout_s = timeout_s
        self._client = self._client_of(tokenizer)
        self._device = device
        self._wait_s = wait_s
        self._interval_s = interval_s
        self._advancing = threading.Lock()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._epoch = ""  # in which history of the record its revision stands
        self._trie: Trie | None = None
        self._failure: FollowerError | None = None
        self._heard_at = time.monotonic()

    @property
    def trie(self) -> Trie:
        """The live trie as of the latest changes that were heard of.

        Raises:
            FollowerError: There is none yet, or the follower has ended with an error.
        """
        if self._failure is not None:
            raise self._failure
        if self._trie is None:
            raise FollowerError("there is no trie yet: start the follower, or advance it")
        return self._trie

    @property
    def revision(self) -> int:
        """Of the trie.

        Raises:
            FollowerError: As in `trie`.
        """
        return self.trie.revision

    @property
    def silent_s(self) -> float:
        """For how many seconds the service has not answered; beyond `wait_s` and a little, the trie may be old."""
        return time.monotonic() - self._heard_at

    def start(self, patience_s: float = 120.0) -> Self:
        """Take the first trie, and follow from there in the background.

        Args:
            patience_s: How long to wait for a service that is away.

        Raises:
            FollowerError: The service refused, or stayed away.
        """
        give_up = time.monotonic() + patience_s
        pause_s = 0.0
        while self._trie is None:
            try:
                self.advance()
            except ServiceAway as away:
                pause_s = _longer(pause_s, away)
                if time.monotonic() + pause_s > give_up:
                    raise
                time.sleep(pause_s)
        self._thread = threading.Thread(target=self._follow, name="semid-follower", daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        """End the thread, and close the connections; the trie stays."""
        self._stopping.set()
        self._client.close()
        if self._thread is not None:
            self._thread.join()

    def advance(self, wait_s: float = 0.0) -> Trie:
        """Apply all changes up to now, and return the trie.

        Args:
            wait_s: Where there are none, how long to wait for some.

        Raises:
            ServiceAway: Try again later; nothing is lost.
            FollowerError: The service refused.
        """
        with self._advancing:
            trie = self._trie
            if trie is None:
                self._name_in_full()
            self._trie = trie = self._taken() if trie is None else self._led_on(trie, wait_s)
            return trie

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.stop()
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def _follow(self) -> None:
        pause_s = 0.0
        while not self._stopping.wait(pause_s or self._interval_s):
            try:
                self.advance(self._wait_s)
            except ServiceAway as away:
                pause_s = _longer(pause_s, away)
            except ClientClosed:
                return
            except FollowerError as error:
                self._failure = error
                return
            except Exception as error:  # noqa: BLE001  an old trie must not be handed out as if it were followed
                self._failure = FollowerError(f"{type(error).__name__}: {error}")
                return
            else:
                pause_s = 0.0

    def _led_on(self, trie: Trie, wait_s: float) -> Trie:
        """The trie after the changes since its revision; a new one where they are gone."""
        changes: list[Change] = []
        after, newest = trie.revision, trie.revision + 1
        while after < newest and len(changes) < CHANGES_PER_TRIE:
            page = self._page(after, 0.0 if changes else wait_s)
            if page is None:
                return self._taken()
            if not page.changes:
                break
            self._epoch = page.epoch
            changes += page.changes
            after, newest = page.next_after, page.revision
        if not changes:
            return trie
        if [change.revision for change in changes] != list(range(trie.revision + 1, after + 1)):
            raise FollowerError(f"the changes after revision {trie.revision} have a hole")
        sizes = trie.codebook_sizes
        parsed = [(change.change, SemanticId.parse(change.semantic_id, sizes)) for change in changes]
        return trie.updated(*as_tensors(parsed, len(sizes)), after)

    def _taken(self) -> Trie:
        with self._hearing():
            snapshot = self._client.trie()
        self._epoch = snapshot.epoch
        return snapshot.read().to(self._device)

    def _page(self, after: int, wait_s: float) -> ChangesPage | None:
        """Changes; None where they are gone."""
        with self._hearing():
            try:
                return self._client.changes_page(after, epoch=self._epoch, limit=CHANGES_PER_READ, wait_s=wait_s)
            except ChangesGone:
                return None

    def _name_in_full(self) -> None:
        """Name the tokenizer with its fingerprint, so that no other of its name can take its place."""
        with self._hearing():
            name = self._client.tokenizers().named(self._tokenizer)
        if name != self._tokenizer:
            self._client.close()
            self._tokenizer, self._client = name, self._client_of(name)

    def _client_of(self, tokenizer: str | None) -> TokenizerClient:
        # Its pauses are the follower's own, which ends while it waits.
        return TokenizerClient(
            self._url, namespace=self._namespace, tokenizer=tokenizer, patience_s=0, timeout_s=self._timeout_s
        )

    @contextmanager
    def _hearing(self) -> Iterator[None]:
        """Around a call.

        Raises:
            ServiceAway: There is no answer for now.
            FollowerError: It is a refusal, or cannot be used.
        """
        try:
            yield
        except ClientClosed:
            raise
        except Unavailable as error:
            raise ServiceAway(str(error), error.retry_after_s) from error
        except Refused as error:
            if error.status >= FIRST_SERVER_ERROR:
                raise ServiceAway(str(error), error.retry_after_s) from error
            raise FollowerError(str(error)) from error
        except TokenizerError as error:
            raise FollowerError(str(error)) from error
        self._heard_at = time.monotonic()


def _longer(pause_s: float, away: ServiceAway) -> float:
    return min(max(2 * pause_s, FIRST_PAUSE_S, away.retry_after_s), LONGEST_PAUSE_S)

"""Calls to servers: bounded in time, tried again where that may help, kept from their callers' cancellation."""

from __future__ import annotations

import asyncio
import logging
import math
from typing import TYPE_CHECKING, Any, TypeVar

from redis import exceptions as redis_errors
from redis.asyncio.sentinel import MasterNotFoundError

from service.errors import RegistryUnavailable
from service.registry.connections import NotPrimary

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

logger = logging.getLogger(__name__)
T = TypeVar("T")

FIRST_RETRY_DELAY_S = 0.02
WARNING_INTERVAL_S = 30.0
QUIET_S = 5.0
LONGEST_RETRY_DELAY_S = 0.5
_MOVING = (
    redis_errors.MovedError,
    redis_errors.AskError,
    redis_errors.TryAgainError,
    redis_errors.ClusterDownError,
)


class Calls:
    """What every client of the registry shares.

    Attributes:
        address: Where the registry is, for messages: nothing secret.
    """

    address: str

    def __init__(self, timeout_ms: int, retry_ms: int) -> None:
        """Bounds calls.

        Args:
            timeout_ms: How long one round trip may take, for the message.
            retry_ms: How long what may pass is tried again.
        """
        self._timeout_ms = timeout_ms
        self._retry_s = retry_ms / 1000
        self._tasks: set[asyncio.Task[Any]] = set()
        self._warned_at = self._failed_at = -math.inf
        self._away = False  # as the log says

    async def call(self, operation: Callable[[], Awaitable[T]], *, retried: bool = True) -> T:
        """Runs an idempotent operation; its caller's cancellation does not reach it.

        A command cancelled between its sending and its reply costs its connection, and nobody knows its outcome.

        Raises:
            RegistryUnavailable: It failed.
        """
        task = asyncio.ensure_future(self._retried(operation, self._retry_s if retried else 0.0))
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return await asyncio.shield(task)

    async def call_unshielded(self, operation: Callable[[], Awaitable[T]]) -> T:
        """The same from a task that no caller cancels, as a queue's: one more would take longer.

        Raises:
            RegistryUnavailable: It failed.
        """
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            return await self._retried(operation, self._retry_s)
        finally:
            self._tasks.discard(task)

    async def finish_calls(self) -> None:
        """Returns when no call is under way; each is bounded in time."""
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # its caller may have left: then nobody else looks

    async def _retried(self, operation: Callable[[], Awaitable[T]], retry_s: float) -> T:
        loop = asyncio.get_running_loop()
        deadline, delay_s = loop.time() + retry_s, FIRST_RETRY_DELAY_S
        while True:
            try:
                answer = await connected(operation)
            except (redis_errors.RedisError, OSError) as error:
                if not _may_pass(error) or loop.time() + delay_s > deadline:
                    self._fell_out(self.plainly(error))
                    raise RegistryUnavailable(self.plainly(error)) from error
                await self.recover(error)
            except RegistryUnavailable as error:
                self._fell_out(error.detail)
                raise
            else:
                if self._away and loop.time() - self._failed_at > QUIET_S:  # reads may succeed while writes fail
                    self._away = False
                    logger.info("The registry at %s serves again", self.address)
                return answer
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, LONGEST_RETRY_DELAY_S)

    def _fell_out(self, why: str) -> None:
        self._failed_at = asyncio.get_running_loop().time()
        if self._failed_at - self._warned_at > WARNING_INTERVAL_S:
            self._warned_at = self._failed_at
            logger.warning("%s", why)
        self._away = True

    async def recover(self, _error: Exception) -> None:
        """Does what helps before the operation is tried again."""

    def plainly(self, error: Exception) -> str:
        """The error in words for the caller."""
        error = cause(error)
        words = {
            redis_errors.BusyLoadingError: "is loading its data",
            redis_errors.AuthenticationError: f"does not accept the credentials ({error})",
            redis_errors.TimeoutError: f"did not answer within {self._timeout_ms} ms",
            NotPrimary: "is a read-only replica",
            MasterNotFoundError: "has no primary that its sentinels agree on",
            redis_errors.ClusterDownError: "has slots that no server serves",
            redis_errors.ConnectionError: f"cannot be reached ({error})",
            redis_errors.OutOfMemoryError: "has no memory left (maxmemory)",
            redis_errors.ReadOnlyError: "is a read-only replica",
        }
        for kind, what in words.items():
            if isinstance(error, kind):
                return f"The registry at {self.address} {what}."
        return f"The registry at {self.address} failed: {error}"


async def connected(operation: Callable[[], Awaitable[T]]) -> T:
    """Its answer; uvloop has no error of its own for a write to a connection that was just closed."""
    try:
        return await operation()
    except RuntimeError as error:
        if "closed" in str(error):
            raise redis_errors.ConnectionError("the connection was closed") from error
        raise


def cause(error: Exception) -> Exception:
    """What redis-py wrapped into a ConnectionError, where it is the server's own word, as on credentials."""
    return error.__cause__ if isinstance(error.__cause__, redis_errors.RedisError) else error


def demoted(error: Exception) -> bool:
    """Whether another server is the primary now: the next connection may find it."""
    if isinstance(error, redis_errors.ReadOnlyError | redis_errors.MasterDownError):
        return True
    return isinstance(error, redis_errors.ResponseError) and str(error).startswith("UNBLOCKED")  # while it waited


def moving(error: Exception) -> bool:
    """Whether slots of a cluster are on their way from one server to another."""
    return isinstance(error, _MOVING)


def _may_pass(error: Exception) -> bool:
    """Whether a short wait may help: the connection was dropped or refused, the server loads, or another serves now."""
    error = cause(error)
    if isinstance(error, redis_errors.AuthenticationError | TimeoutError):
        return False
    return isinstance(error, redis_errors.ConnectionError | OSError) or demoted(error) or moving(error)

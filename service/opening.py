"""Settings -> the registry that they name, waited for while it does not serve yet."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial
from typing import TypeVar

from service.errors import RegistryUnavailable
from service.registry import Registry
from service.registry.embedded import EmbeddedValkey
from service.registry.marks import Marks
from service.settings import Settings

log = logging.getLogger(__name__)
T = TypeVar("T")

PAUSE_S = 0.5


class Patience:
    """How long start-up waits for the registry, all that it asks of it taken together."""

    def __init__(self, wait_s: float) -> None:
        """Nothing is waited for yet.

        Args:
            wait_s: Counted from the first question.
        """
        self._wait_s = wait_s
        self._deadline: float | None = None

    async def answer(self, ask: Callable[[], Awaitable[T]]) -> T:
        """What the registry answers, asked again while it is away.

        Raises:
            RegistryUnavailable: It still is when the time is over.
        """
        if self._deadline is None:
            self._deadline = time.monotonic() + self._wait_s
        while True:
            try:
                return await ask()
            except RegistryUnavailable as error:
                if time.monotonic() >= self._deadline:
                    raise
                log.warning("waiting for the registry: %s", error.detail)
                await asyncio.sleep(PAUSE_S)


async def open_registry(
    settings: Settings, stack: AsyncExitStack, marks: Marks | None = None, patience: Patience | None = None
) -> Registry:
    """Connects to the registry that the settings name, the embedded one started or shared; the stack closes it.

    Args:
        settings: Which registry, and what it has to promise.
        stack: Closes what is opened here.
        marks: How far each record was; without them the registry is taken as it is.
        patience: What the caller waits for besides; `registry_wait_s` for the connection alone where None.

    Raises:
        RegistryRefused: It cannot keep what is promised.
        RegistryUnavailable: It cannot be reached in time.
    """
    url = settings.redis_url
    if url is None:
        embedded = EmbeddedValkey(settings.data_dir)
        await embedded.start()
        stack.push_async_callback(embedded.stop)
        url = embedded.url
    connect = partial(
        Registry.connect,
        url,
        durability=settings.durability,
        timeout_ms=settings.registry_timeout_ms,
        buckets=settings.buckets,
        changes_kept=settings.changes_kept,
        replicas=settings.replicas,
        marks=marks,
        display_bytes=settings.display_bytes,
    )
    registry = await (patience or Patience(settings.registry_wait_s)).answer(connect)
    stack.push_async_callback(registry.close)
    return registry

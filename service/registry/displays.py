"""Titles of items, shown to people beside item ids: kept where the service is told to, of no meaning to any ID.

title, in the slot of the item's bucket --> claim --> title again, where the item is live --> answered

The first step lets whoever follows the changes find the title beside the ID, the second one settles what crossed the
claim. Both are the same on a single primary and on a cluster; whoever was not answered sends the item again, and the
title with it.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from service.registry.cluster import Cluster
from service.registry.primary import Script, ScriptCall
from service.registry.request_queue import Request, RequestQueue

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from service.registry.cluster import Server
    from service.registry.history import History
    from service.registry.keys import RecordKeys

_DISPLAY = Script(Path(__file__).with_name("display.lua").read_bytes())
_RETIRED = b"-"
_ELLIPSIS = "\N{HORIZONTAL ELLIPSIS}".encode()


class Displays:
    """The titles of one record's items.

    Args:
        server: Where the record lies.
        history: What it has to go on from.
        keys: Its keys.
        max_bytes: UTF-8 bytes of a title; 0: none are kept, nothing is written and nothing is asked for.

    Attributes:
        kept: Whether there are any.
    """

    def __init__(self, server: Server, history: History, keys: RecordKeys, *, max_bytes: int) -> None:
        self.kept = max_bytes > 0
        self._max_bytes = max_bytes
        self._server = server
        self._history = history
        self._keys = keys
        self._queue: RequestQueue[Request, None] = RequestQueue(self._send)

    async def announce(self, displays: Mapping[bytes, str]) -> None:
        """Give these titles to items that are about to be claimed; `put` or `retire` has to follow.

        Raises:
            RegistryUnavailable: Some may be given: give them again.
        """
        await self._give(b"+", displays)

    async def put(self, displays: Mapping[bytes, str]) -> None:
        """Give these live items these titles in the place of those that they have; an empty one is none.

        A longer one is cut. Durable like a claim.

        Raises:
            RegistryUnavailable: Some may be given: give them again.
        """
        await self._give(b"=", displays)

    async def retire(self, item_ids: Sequence[bytes]) -> None:
        """Take their titles from those of these items that are not live.

        Raises:
            RegistryUnavailable: Some may be taken: take them again.
        """
        await self._submit(Request(item_id, _RETIRED) for item_id in item_ids)

    async def of(self, item_ids: Sequence[bytes]) -> list[str | None]:
        """The titles of these items, in order; None where there is none.

        Raises:
            RegistryUnavailable: The registry cannot be reached.
        """
        if not self.kept or not item_ids:
            return [None] * len(item_ids)
        found = await self._history.read([("HGET", self._keys.display(item_id), item_id) for item_id in item_ids])
        return [None if display is None else display.decode() for display in found]

    @property
    def idle(self) -> bool:
        """Whether nothing waits or is on its way."""
        return self._queue.idle

    async def drain(self) -> None:
        """Returns when nothing waits or is on its way."""
        await self._queue.drain()

    async def _give(self, how: bytes, displays: Mapping[bytes, str]) -> None:
        cut = partial(_cut, max_bytes=self._max_bytes)
        await self._submit(Request(item_id, how + cut(display)) for item_id, display in displays.items())

    async def _submit(self, requests: Iterable[Request]) -> None:
        if self.kept and (asked := list(requests)):
            await self._queue.submit(asked)

    async def _send(self, requests: Sequence[Request]) -> list[None]:
        await self._history.begin()
        # On a cluster no call reaches two slots.
        together = [[request] for request in requests] if isinstance(self._server, Cluster) else [requests]
        await self._server.call(partial(self._server.written, [self._call(part) for part in together]))
        return [None] * len(requests)

    def _call(self, requests: Sequence[Request]) -> ScriptCall:
        buckets = [(self._keys.forward(item_id), self._keys.display(item_id)) for item_id, _ in requests]
        return ScriptCall(
            _DISPLAY, [key for pair in buckets for key in pair], [part for each in requests for part in each]
        )


def _cut(display: str, max_bytes: int) -> bytes:
    """A title without white space around it, or its beginning and an ellipsis; what is no UTF-8 is left out."""
    raw = display.strip().encode(errors="ignore")
    if len(raw) <= max_bytes:
        return raw
    return raw[: max_bytes - len(_ELLIPSIS)].decode(errors="ignore").rstrip().encode() + _ELLIPSIS

"""Titles of items beside their ids, where they are kept, in the answers that people look at."""

from __future__ import annotations

from collections.abc import Sequence

from service.answers import Answer
from service.registry.record import Record


async def show(record: Record, answers: Sequence[Answer]) -> None:
    """Add to these answers the title of the item of each, where there is one, as `display`.

    Raises:
        RegistryUnavailable: The registry cannot be reached.
    """
    if not record.displays.kept:
        return
    of_items = [answer for answer in answers if "item_id" in answer]
    displays = await record.displays.of([answer["item_id"].encode() for answer in of_items])
    for answer, display in zip(of_items, displays, strict=True):
        if display is not None:
            answer["display"] = display

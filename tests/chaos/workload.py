"""What a client will ask, drawn from the seed alone: the same seed gives the same requests, whatever is answered.

All clients work on the same items. Each brings new ones, a frontier that moves on, and comes back to those of
everybody, often before they exist. An item has three contents at most, so it can change, come back and collide.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

CONTENTS = 24
CONTENTS_OF_AN_ITEM = 3
HOT_ITEMS = 12
ITEMS_OF_A_REQUEST = 6
CALLS = {"new": 28, "known": 22, "reassign": 10, "retire": 10, "forward": 8, "reverse": 6, "lookup": 16}
LEAVING = 0.03
"""How often a client disconnects in the middle of its own request."""


@dataclass(frozen=True)
class Plan:
    """One request to come.

    Attributes:
        call: As in `history.Operation`.
        arguments: What to ask; for `reverse` and `lookup`, `picks`: where in 0 to 1 among the IDs that the client has
            been told to choose.
        service: Where in 0 to 1 among the services.
        leave: `sending` or `waiting`, where the client disconnects then; else None.
    """

    call: str
    arguments: dict[str, Any] = field(default_factory=dict)
    service: float = 0.0
    leave: str | None = None


def contents_of(item: str) -> list[int]:
    """The contents that an item may have; the first most often."""
    home = crc32(item.encode())
    return [(home + 7 * i) % CONTENTS for i in range(CONTENTS_OF_AN_ITEM)]


def workload(seed: int, client: int, clients: int) -> Iterator[Plan]:
    """One client's requests, without end."""
    chance = random.Random(f"{seed}-client-{client}")
    frontier = 0
    while True:
        kind = chance.choices([*CALLS], [*CALLS.values()])[0]
        service = chance.random()
        leave = chance.choice(["sending", "waiting"]) if chance.random() < LEAVING else None
        if kind in {"reverse", "lookup"}:
            count = 1 if kind == "reverse" else chance.randint(1, 12)
            yield Plan(kind, {"picks": [chance.random() for _ in range(count)]}, service, leave)
        elif kind in {"retire", "forward"}:
            yield Plan(kind, {"item": _known(chance, frontier, clients)}, service, leave)
        else:
            items = [_known(chance, frontier, clients) for _ in range(chance.randint(1, ITEMS_OF_A_REQUEST))]
            if kind == "new":
                fresh = chance.randint(1, ITEMS_OF_A_REQUEST)
                items[:fresh] = [f"{frontier + i}-{client}" for i in range(fresh)]
                frontier += fresh
            # Once each: an item with two contents in one request is refused.
            asked = [[item, _content(chance, item, kind)] for item in dict.fromkeys(items)]
            arguments = {"items": asked, "on_change": "reassign" if kind == "reassign" else "keep"}
            yield Plan("tokenize", arguments, service, leave)


def _known(chance: random.Random, frontier: int, clients: int) -> str:
    """An item that somebody may have brought: a hot one, a recent one, or any."""
    where = chance.random()
    if where < 0.2:
        return f"hot-{chance.randrange(HOT_ITEMS)}"
    newest = max(frontier, 1)
    oldest = max(newest - 40, 0) if where < 0.7 else 0
    return f"{chance.randrange(oldest, newest)}-{chance.randrange(clients)}"


def _content(chance: random.Random, item: str, kind: str) -> int:
    changed = chance.random() < (0.7 if kind == "reassign" else 0.15)
    contents = contents_of(item)
    return chance.choice(contents[1:]) if changed else contents[0]

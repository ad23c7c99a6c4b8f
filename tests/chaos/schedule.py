"""Which faults come when: drawn from the seed alone."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

KILL_SERVICE = "kill -9 of a service"
STOP_SERVICE = "SIGTERM of a service"
KILL_PRIMARY = "kill -9 of the primary"
KILL_REPLICA = "kill -9 of the replica"
FLUSH_SCRIPTS = "SCRIPT FLUSH"
CUT, HALF_CLOSE, STALL, DELAY = "cut", "half-close", "stall", "delay"

DOWN_S = {KILL_SERVICE: (0.2, 1.5), STOP_SERVICE: (1.0, 3.0), KILL_PRIMARY: (0.1, 1.5), KILL_REPLICA: (0.5, 4.0)}
"""How long what is killed stays down."""
HELD_S = {STALL: (0.2, 2.5), DELAY: (0.5, 3.0)}
PROCESS_FAULTS = (KILL_PRIMARY, KILL_SERVICE, KILL_REPLICA, KILL_PRIMARY, FLUSH_SCRIPTS, STOP_SERVICE)
NETWORK_FAULTS = (CUT, HALF_CLOSE, STALL, DELAY)
KINDS = (*dict.fromkeys(PROCESS_FAULTS), *NETWORK_FAULTS)
FIRST_S, QUIET_S = 2.0, 2.0
PROCESS_GAP_S, NETWORK_GAP_S = (2.5, 5.0), (0.5, 1.5)


class Fault(NamedTuple):
    """One fault.

    Attributes:
        at_s: When it begins, after the start.
        kind: What.
        pick: Where in 0 to 1 among those that it can befall.
        duration_s: When it is over; 0 where it takes no time.
    """

    at_s: float
    kind: str
    pick: float
    duration_s: float


def schedule(seed: int, seconds: float, kinds: Collection[str] = KINDS) -> list[Fault]:
    """All faults of a run, in order; a longer run of the same seed begins with those of a shorter one."""
    found: list[Fault] = []
    for name, dealt, gap_s in (("process", PROCESS_FAULTS, PROCESS_GAP_S), ("network", NETWORK_FAULTS, NETWORK_GAP_S)):
        wanted = [kind for kind in dealt if kind in kinds]
        found += _track(random.Random(f"{seed}-{name}"), seconds, wanted, gap_s) if wanted else ()
    return sorted(found)


def _track(chance: random.Random, seconds: float, kinds: Sequence[str], gap_s: tuple[float, float]) -> Iterator[Fault]:
    """One fault after the other; all kinds have come before one comes again."""
    at_s = FIRST_S
    while True:
        for kind in chance.sample(kinds, len(kinds)):
            pick, duration_s = chance.random(), chance.uniform(*(DOWN_S | HELD_S).get(kind, (0.0, 0.0)))
            if at_s > seconds - QUIET_S:
                return
            yield Fault(round(at_s, 3), kind, pick, round(duration_s, 3))
            at_s += chance.uniform(*gap_s)

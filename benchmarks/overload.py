"""Memory of the service under more listings than it can do, over what it was a minute after they began.

    python -P benchmarks/overload.py [--rounds 1] [--seconds 3600]

In each round: as many listings as the service can do, one caller's next once its last is answered; then listings at
random times (Poisson) at 120% of that. The queue is small, so that the overload fills it; every refusal is counted, and
has to say when to come again.
"""

from __future__ import annotations

import asyncio
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
from benchmarks.bodies import TextBodies
from benchmarks.harness import Check, Comparison, Result, keep, limit_threads, parser_of
from benchmarks.open_loop import Connections, Outcomes, closed, poisson, until
from benchmarks.serving import resident_mib, service

EARLY, LATE = "a minute after it began", "at the end"
EARLY_AFTER_S = 60.0
LOAD = 1.2
AT_A_TIME = 64


class Rounds:
    """What is measured, a figure a round for each path."""

    def __init__(self, arguments: Namespace, url: str) -> None:
        self._arguments = arguments
        self._url = url
        self._bodies = TextBodies(arguments.catalogue)
        self.memory: dict[str, list[float]] = {EARLY: [], LATE: []}
        self.outcomes: list[Outcomes] = []

    async def run(self) -> None:
        """Measure all rounds."""
        connections = Connections(self._url)
        for number in range(self._arguments.rounds):
            began = time.perf_counter()
            most = await closed(connections, self._bodies.listing, AT_A_TIME, until(self._arguments.warm))
            rate = LOAD * most.statuses[200] / (time.perf_counter() - began)
            memory = asyncio.create_task(self._memory())
            outcomes = await poisson(connections, self._bodies.listing, rate, self._arguments.seconds)
            early, late = await memory
            self.memory[EARLY].append(early)
            self.memory[LATE].append(late)
            self.outcomes.append(outcomes)
            told = f"{rate:,.0f} listings a second: {dict(outcomes.statuses)}"
            print(f"round {number + 1}: {told}; {early:,.0f} MiB, then {late:,.0f}", flush=True)
        await connections.close()

    async def _memory(self) -> tuple[float, float]:
        """MiB of the service a minute, or a tenth of the time, from now, and at the end of the time."""
        seconds = self._arguments.seconds
        first = min(EARLY_AFTER_S, seconds / 10)
        await asyncio.sleep(first)
        early = await asyncio.to_thread(resident_mib, self._url)
        await asyncio.sleep(seconds - first)
        return early, await asyncio.to_thread(resident_mib, self._url)


def run(arguments: Namespace) -> Result:
    """Measure."""
    result = Result("overload")
    with service(arguments.url, queue_tokens=arguments.queue_tokens) as url:
        rounds = Rounds(arguments, url)
        asyncio.run(rounds.run())
    result.comparisons = [Comparison("Memory of the service at 120%", "MiB", [LATE], EARLY, rounds.memory)]
    statuses = [outcomes.statuses for outcomes in rounds.outcomes]
    refused = sum(each[429] for each in statuses)
    title = f"Requests, {refused:,} of them refused: neither 200 nor 429 with Retry-After"
    unbounded = sum(outcomes.unbounded for outcomes in rounds.outcomes)
    result.checks.append(Check(title, sum(map(sum, (each.values() for each in statuses))), unbounded))
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = parser_of(__doc__, rounds=1, serves=True)
    parser.add_argument("--catalogue", type=Path, help="texts of this catalogue, made-up ones where absent")
    parser.add_argument("--seconds", type=float, default=120.0, help="of the overload (default %(default)s)")
    parser.add_argument("--warm", type=float, default=10.0, help="seconds at capacity (default %(default)s)")
    parser.add_argument(
        "--queue-tokens", type=int, default=20_000, help="SID_QUEUE_TOKENS of the service (default %(default)s)"
    )
    arguments = parser.parse_args(argv)
    limit_threads(arguments.threads)
    keep(run(arguments), arguments)


if __name__ == "__main__":
    main()

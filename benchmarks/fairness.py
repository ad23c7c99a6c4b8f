"""A single new listing beside bulk that saturates the service, and listings at 50, 80 and 120% of its capacity.

    python -P benchmarks/fairness.py [--rounds 3] [--seconds 10]

In each round: listings one at a time (idle), bulk alone, listings beside bulk, as many listings as the service can do,
then listings at random times (Poisson) at shares of that. Latencies count from the time at which a request was due. The
queue is small, so that the overload fills it; every refusal is counted, and has to say when to come again.
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
from benchmarks.serving import service

IDLE, BESIDE_P50, BESIDE_P99 = "idle, one at a time: p50", "beside bulk: p50", "beside bulk: p99"
ALONE, BESIDE, LISTINGS = "bulk alone", "bulk beside listings", "listings, 64 at a time"
LOADS = (0.5, 0.8, 1.2)
BULK_CALLERS = 2
MOST_TEXTS_PER_S = 1000  # of which bodies are made beforehand
LISTINGS_AT_A_TIME = 64


class Rounds:
    """What is measured, a figure a round for each path."""

    def __init__(self, arguments: Namespace, url: str) -> None:
        self._arguments = arguments
        self._url = url
        self._bodies = TextBodies(arguments.catalogue)
        self._made: list[bytes] = []
        self.figures: dict[str, list[float]] = {}
        self.outcomes: list[Outcomes] = []

    async def run(self) -> None:
        """Measure all rounds."""
        connections = Connections(self._url)
        await closed(connections, self._bodies.listing, 2, until(1.0))  # warm
        for number in range(self._arguments.rounds):
            await self._listings_beside_bulk(connections)
            await self._listings_at_random(connections)
            found = ", ".join(f"{path} {figures[-1]:,.0f}" for path, figures in self.figures.items())
            print(f"round {number + 1}: {found}", flush=True)
        await connections.close()

    def of(self, *paths: str) -> dict[str, list[float]]:
        """The figures of some paths."""
        return {path: self.figures[path] for path in paths}

    async def _listings_beside_bulk(self, connections: Connections) -> None:
        seconds, size = self._arguments.seconds, self._arguments.bulk
        self._made = [self._bodies.bulk(size) for _ in range(int(3 * seconds * MOST_TEXTS_PER_S / size) + 1)]
        idle = await closed(connections, self._bodies.listing, 1, until(seconds / 2))
        self._note(IDLE, idle.quantile_ms(0.5))
        began = time.perf_counter()
        alone = await closed(connections, self._bulk, BULK_CALLERS, until(seconds))
        self._note(ALONE, size * alone.statuses[200] / (time.perf_counter() - began))
        over = asyncio.Event()
        began = time.perf_counter()
        feed = asyncio.create_task(closed(connections, self._bulk, BULK_CALLERS, lambda: not over.is_set()))
        await asyncio.sleep(seconds / 10)
        beside = await poisson(connections, self._bodies.listing, self._arguments.rate, 2 * seconds)
        over.set()
        fed = await feed
        self._note(BESIDE, size * fed.statuses[200] / (time.perf_counter() - began))
        self._note(BESIDE_P50, beside.quantile_ms(0.5))
        self._note(BESIDE_P99, beside.quantile_ms(0.99))
        self.outcomes += [idle, alone, fed, beside]

    def _bulk(self) -> bytes:
        """Made beforehand, as long as there are any: to make one would keep the listings of this process waiting."""
        return self._made.pop() if self._made else self._bodies.bulk(self._arguments.bulk)

    async def _listings_at_random(self, connections: Connections) -> None:
        seconds = self._arguments.seconds
        began = time.perf_counter()
        most = await closed(connections, self._bodies.listing, LISTINGS_AT_A_TIME, until(seconds))
        capacity = most.statuses[200] / (time.perf_counter() - began)
        self._note(LISTINGS, capacity)
        self.outcomes.append(most)
        for load in LOADS:
            outcomes = await poisson(connections, self._bodies.listing, load * capacity, seconds)
            self._note(_loaded(load), outcomes.quantile_ms(0.99))
            self.outcomes.append(outcomes)
        print(f"at 120%: {dict(outcomes.statuses)}")

    def _note(self, path: str, figure: float) -> None:
        self.figures.setdefault(path, []).append(figure)


def _loaded(load: float) -> str:
    return f"at {load:.0%} of capacity: p99"


def run(arguments: Namespace) -> Result:
    """Measure."""
    result = Result("fairness")
    settings = {"queue_tokens": arguments.queue_tokens} | dict(pair.split("=") for pair in arguments.set)
    with service(arguments.url, **settings) as url:
        rounds = Rounds(arguments, url)
        asyncio.run(rounds.run())
    loads = list(map(_loaded, LOADS))
    result.comparisons = [
        Comparison(
            "A listing beside bulk", "ms", [BESIDE_P50, BESIDE_P99], IDLE, rounds.of(IDLE, BESIDE_P50, BESIDE_P99)
        ),
        Comparison("Listings at random times", "ms", loads, IDLE, rounds.of(IDLE, *loads)),
        Comparison("New texts", "items/s", [BESIDE, LISTINGS], ALONE, rounds.of(ALONE, BESIDE, LISTINGS)),
    ]
    answers = sum(sum(outcomes.statuses.values()) for outcomes in rounds.outcomes)
    refused = sum(outcomes.statuses[429] for outcomes in rounds.outcomes)
    unbounded = sum(outcomes.unbounded for outcomes in rounds.outcomes)
    title = f"Requests, {refused:,} of them refused: neither 200 nor 429 with Retry-After"
    result.checks.append(Check(title, answers, unbounded))
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = parser_of(__doc__, rounds=3, serves=True)
    parser.add_argument("--catalogue", type=Path, help="texts of this catalogue, made-up ones where absent")
    parser.add_argument("--seconds", type=float, default=10.0, help="of one load (default %(default)s)")
    parser.add_argument("--rate", type=float, default=5.0, help="listings a second beside bulk (default %(default)s)")
    parser.add_argument("--bulk", type=int, default=256, help="texts of one request of bulk (default %(default)s)")
    parser.add_argument(
        "--queue-tokens", type=int, default=20_000, help="SID_QUEUE_TOKENS of the service (default %(default)s)"
    )
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="NAME=VALUE", help="further settings of it, such as batch_ms=1000"
    )
    arguments = parser.parse_args(argv)
    limit_threads(arguments.threads)
    keep(run(arguments), arguments)


if __name__ == "__main__":
    main()

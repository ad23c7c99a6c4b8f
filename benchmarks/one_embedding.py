"""Requests of one embedding each, 32 at a time, beside a trivial FastAPI route that is sent the same bodies.

    python -P benchmarks/one_embedding.py [--requests 4000]

The service acknowledges each after it is on disk (fsync); the trivial route does nothing and answers a constant.
"""

from __future__ import annotations

import asyncio
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

sys.path.append(str(Path(__file__).parents[1]))
from benchmarks.bodies import as_base64, json_bodies, new_prefix
from benchmarks.contents import Embeddings
from benchmarks.harness import Comparison, Result, keep, limit_threads, parser_of, rate, rounds_of
from benchmarks.light import END_OF_HEAD, Head, request_of
from benchmarks.serving import fastapi_routes, service

QUANTILES = {"0.5": "the median", "0.99": "the 99th hundredth's"}
OURS, TRIVIAL = "semid, acknowledged after fsync", "trivial FastAPI route"


class Connection(asyncio.Protocol):
    """Sends requests one after the other, the next once the last is answered."""

    def __init__(self, requests: Iterator[bytes], finished: asyncio.Future[None], waits_s: list[float]) -> None:
        self._requests = requests
        self._finished = finished
        self._waits_s = waits_s
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the first."""
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]
        self._send()

    def data_received(self, data: bytes) -> None:
        """Once an answer is whole send the next; one that is no success fails the run."""
        self._received += data
        written, there, body = self._received.partition(END_OF_HEAD)
        if not there or len(body) < (head := Head.of(written)).length:
            return
        if head.status != 200 or b'"error"' in body:
            self.connection_lost(RuntimeError(f"a request failed: {head!r} {body!r}"))
            return
        self._received = b""
        self._waits_s.append(time.perf_counter() - self._sent_at)
        self._send()

    def connection_lost(self, exc: Exception | None) -> None:
        """The run fails, unless it was over."""
        if not self._finished.done():
            self._finished.set_exception(exc or RuntimeError("the server closed a connection"))

    def _send(self) -> None:
        request = next(self._requests, None)
        if request is not None:
            self._sent_at = time.perf_counter()
            self._transport.write(request)
        elif not self._finished.done():
            self._finished.set_result(None)
            self._transport.close()


async def send_all(url: str, bodies: Sequence[bytes], connections: int) -> list[float]:
    """POST every body over so many connections, one at a time on each; how long each was waited for, in seconds."""
    address, loop = urlsplit(url), asyncio.get_running_loop()
    requests = iter([request_of(url, body) for body in bodies])
    finished = [loop.create_future() for _ in range(connections)]
    waits_s: list[float] = []
    for one in finished:
        await loop.create_connection(lambda one=one: Connection(requests, one, waits_s), address.hostname, address.port)  # type: ignore[misc]
    await asyncio.gather(*finished)
    return waits_s


def run(arguments: Namespace) -> Result:
    """Measure."""
    embeddings = Embeddings()

    waits: dict[str, list[dict[str, float]]] = {OURS: [], TRIVIAL: []}

    def requests_a_second(path: str, url: str) -> float:
        bodies = json_bodies(as_base64(new_prefix(), embeddings.take(arguments.requests)), 1)
        waits_s: list[float] = []
        found = rate(len(bodies), lambda: waits_s.extend(asyncio.run(send_all(url, bodies, arguments.concurrency))))
        waits[path].append({share: 1000 * float(np.quantile(waits_s, float(share))) for share in QUANTILES})
        return found

    with service(arguments.url) as url, fastapi_routes() as plain:
        paths: dict[str, Callable[[int], float]] = {
            OURS: lambda _: requests_a_second(OURS, url),
            TRIVIAL: lambda _: requests_a_second(TRIVIAL, f"{plain}/trivial"),
        }
        for path in paths.values():
            path(-1)
        for of_path in waits.values():
            of_path.clear()
        figures = rounds_of(paths, arguments.rounds, "requests/s")
    title = f"One embedding a request, {arguments.concurrency} at a time"
    comparisons = [Comparison(title, "requests/s", [OURS], TRIVIAL, figures)]
    for share, name in QUANTILES.items():
        found = {path: [one[share] for one in rounds] for path, rounds in waits.items()}
        comparisons.append(Comparison(f"{title}: {name} wait for an answer", "ms", [OURS], TRIVIAL, found))
    return Result("one_embedding", comparisons)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = parser_of(__doc__, serves=True)
    parser.add_argument("--requests", type=int, default=4000, help="requests a round (default %(default)s)")
    parser.add_argument("--concurrency", type=int, default=32, help="requests in flight (default %(default)s)")
    arguments = parser.parse_args(argv)
    limit_threads(arguments.threads)
    keep(run(arguments), arguments)


if __name__ == "__main__":
    main()

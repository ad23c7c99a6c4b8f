"""Requests of one embedding each, 32 at a time, beside a trivial FastAPI route that is sent the same bodies.

    python -P benchmarks/one_embedding.py [--requests 4000]

The service acknowledges each after it is on disk (fsync); the trivial route does nothing and answers a constant.
"""

from __future__ import annotations

import asyncio
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

sys.path.append(str(Path(__file__).parents[1]))
from benchmarks.bodies import JSON, as_base64, json_bodies, new_prefix
from benchmarks.contents import Embeddings
from benchmarks.harness import Comparison, Result, keep, limit_threads, parser_of, rate, rounds_of
from benchmarks.serving import fastapi_routes, service

OURS, TRIVIAL = "semid, acknowledged after fsync", "trivial FastAPI route"


class Connection(asyncio.Protocol):
    """Sends requests one after the other, the next once the last is answered.

    Far lighter than an HTTP client: on few cores the client must not be what is measured.
    """

    def __init__(self, requests: Iterator[bytes], finished: asyncio.Future[None]) -> None:
        self._requests = requests
        self._finished = finished
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the first."""
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]
        self._send()

    def data_received(self, data: bytes) -> None:
        """Once an answer is whole send the next; one that is no success fails the run."""
        self._received += data
        head, there, body = self._received.partition(b"\r\n\r\n")
        if not there:
            return
        length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        if len(body) < int(length.split(b":")[1]):
            return
        if b" 200 " not in head[:16] or b'"error"' in body:
            self.connection_lost(RuntimeError(f"a request failed: {head!r} {body!r}"))
            return
        self._received = b""
        self._send()

    def connection_lost(self, exc: Exception | None) -> None:
        """The run fails, unless it was over."""
        if not self._finished.done():
            self._finished.set_exception(exc or RuntimeError("the server closed a connection"))

    def _send(self) -> None:
        request = next(self._requests, None)
        if request is not None:
            self._transport.write(request)
        elif not self._finished.done():
            self._finished.set_result(None)
            self._transport.close()


async def send_all(url: str, bodies: Sequence[bytes], connections: int) -> None:
    """POST every body over so many connections, one at a time on each."""
    address, loop = urlsplit(url), asyncio.get_running_loop()
    head = f"POST {address.path} HTTP/1.1\r\nhost: {address.netloc}\r\ncontent-type: {JSON}\r\ncontent-length: "
    requests = iter([f"{head}{len(body)}\r\n\r\n".encode() + body for body in bodies])
    finished = [loop.create_future() for _ in range(connections)]
    for one in finished:
        await loop.create_connection(lambda one=one: Connection(requests, one), address.hostname, address.port)  # type: ignore[misc]
    await asyncio.gather(*finished)


def run(arguments: Namespace) -> Result:
    """Measure."""
    embeddings = Embeddings()

    def requests_a_second(url: str) -> float:
        bodies = json_bodies(as_base64(new_prefix(), embeddings.take(arguments.requests)), 1)
        return rate(len(bodies), lambda: asyncio.run(send_all(url, bodies, arguments.concurrency)))

    with service(arguments.url) as url, fastapi_routes() as plain:
        paths: dict[str, Callable[[int], float]] = {
            OURS: lambda _: requests_a_second(url),
            TRIVIAL: lambda _: requests_a_second(f"{plain}/trivial"),
        }
        for path in paths.values():
            path(-1)
        figures = rounds_of(paths, arguments.rounds, "requests/s")
    title = f"One embedding a request, {arguments.concurrency} at a time"
    return Result("one_embedding", [Comparison(title, "requests/s", [OURS], TRIVIAL, figures)])


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

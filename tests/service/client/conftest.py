"""Both clients behind one face, and a service whose answers are scripted byte by byte."""

from __future__ import annotations

import asyncio
import socketserver
import threading
from collections.abc import AsyncIterable, Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

import pytest

from service.client import AsyncTokenizerClient, TokenizerClient


class OfAsync:
    """The asynchronous client, driven from a test without an event loop; what it yields comes as a list."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._loop = asyncio.Runner()
        self._client = AsyncTokenizerClient(*arguments, **options)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            async def run() -> Any:
                found = getattr(self._client, name)(*arguments, **options)
                return [each async for each in found] if isinstance(found, AsyncIterable) else await found

            return self._loop.run(run())

        return call

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.aclose()
        self._loop.close()


@pytest.fixture(params=[TokenizerClient, OfAsync], ids=["sync", "async"])
def connect(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """Makes clients of one face, which are closed with the test."""
    made: list[Any] = []

    def make(*arguments: Any, **options: Any) -> Any:
        made.append(request.param(*arguments, **options))
        return made[-1]

    yield make
    for client in made:
        client.__exit__(None, None, None)


class Script(ThreadingHTTPServer):
    """A server that answers each request with the next of its answers; the last one goes on for ever.

    An answer is a function of the handler, which writes it. Attributes: `seen`: (path, headers, body) of each request.
    """

    daemon_threads = True

    def __init__(self, *answers: Callable[[Any], None]) -> None:
        self.answers = list(answers)
        self.seen: list[tuple[str, Any, bytes]] = []
        self._turn = threading.Lock()
        super().__init__(("127.0.0.1", 0), _Handler)
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def next_answer(self, handler: Any, body: bytes) -> Callable[[Any], None]:
        with self._turn:
            self.seen.append((handler.path, handler.headers, body))
            return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]

    def handle_error(self, *_: object) -> None:
        """A caller may leave."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Script

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        self.body = body
        self.server.next_answer(self, body)(self)

    do_GET = do_DELETE = do_POST  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def says(status: int, content: bytes = b"", **headers: str) -> Callable[[Any], None]:
    """An answer, whole."""

    def answer(handler: socketserver.StreamRequestHandler | Any) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("content-length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    return answer


def breaks_off(content: bytes) -> Callable[[Any], None]:
    """An answer of 200 that promises more than this."""

    def answer(handler: Any) -> None:
        handler.send_response(200)
        handler.send_header("content-length", str(len(content) + 1000))
        handler.end_headers()
        handler.wfile.write(content)
        handler.close_connection = True

    return answer


@pytest.fixture
def script() -> Iterator[Callable[..., Script]]:
    """Starts servers with answers."""
    started: list[Script] = []

    def start(*answers: Callable[[Any], None]) -> Script:
        started.append(Script(*answers))
        return started[-1]

    yield start
    for server in started:
        server.shutdown()
        server.server_close()

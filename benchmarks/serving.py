"""Servers in processes of their own, and what is sent to them."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPResponse
from typing import Self
from urllib.parse import urlsplit

import httpx

from benchmarks.bodies import JSON, check
from benchmarks.harness import ROOT, rate
from benchmarks.light import LightConnection

LARGE_BYTES = 2**20  # of a body


@contextmanager
def running(
    command: Sequence[str], ready: str, port: int, environment: Mapping[str, str] | None = None
) -> Iterator[str]:
    """A server that listens on a port of loopback; yields its address once it answers on the path `ready`."""
    server = subprocess.Popen(
        command, env={**os.environ, **(environment or {})}, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    base = f"http://127.0.0.1:{port}"
    try:
        wait_until_ready(f"{base}{ready}", server)
        yield base
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            server.kill()
            server.communicate()


@contextmanager
def service(url: str | None = None, **settings: object) -> Iterator[str]:
    """The service, one with a registry of its own where no address is given; yields where it tokenizes.

    Args:
        url: Of a service that runs.
        settings: Of the one that is started, by their names without the prefix.
    """
    if url:
        yield f"{url}/tokenize"
        return
    port = free_port()
    command = [sys.executable, "-c", "from service.cli import app; app()", "serve"]
    with tempfile.TemporaryDirectory(prefix="semid-") as data_dir:
        chosen = {"port": port, "data_dir": data_dir, "log_level": "error", **settings}
        environment = {f"SID_{name.upper()}": str(value) for name, value in chosen.items()}
        with running(command, "/readyz", port, environment) as base:
            yield f"{base}/tokenize"


@contextmanager
def fastapi_routes() -> Iterator[str]:
    """The plain routes of `benchmarks.fastapi_routes`, served as the service is."""
    port = free_port()
    options = ["--port", str(port), "--log-level", "error", "--no-access-log"]
    with running([sys.executable, "-m", "uvicorn", "benchmarks.fastapi_routes:app", *options], "/", port) as base:
        yield base


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def wait_until_ready(url: str, server: subprocess.Popen[bytes], limit_s: float = 600) -> None:
    """Returns when the address answers; raises RuntimeError when its server ended or took too long."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline and server.poll() is None:
        try:
            if httpx.get(url).is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    said = server.communicate()[1].decode(errors="replace")[-2000:] if server.poll() is not None else "no answer"
    raise RuntimeError(f"{server.args!r} did not become ready: {said}")


def resident_mib(url: str) -> float:
    """Memory of the service's process, of a service that tokenizes at this address."""
    text = httpx.get(url.removesuffix("/tokenize") + "/metrics").text
    found = re.search(r"^process_resident_memory_bytes (\S+)$", text, re.MULTILINE)
    if found is None:
        raise RuntimeError("the service does not tell its memory")
    return float(found.group(1)) / 2**20


class Sender:
    """Sends bodies to one address from some threads at once.

    Args:
        url: Where they go.
        clients: Requests in flight.
        media_type: Of the bodies.
    """

    def __init__(self, url: str, *, clients: int = 2, media_type: str = JSON) -> None:
        self._url = url
        self._media_type = media_type
        self._headers = {"content-type": media_type, "accept": media_type}
        self._http = httpx.Client(timeout=300, headers=self._headers)
        parts = urlsplit(url)
        self._target = parts.path + ("?" + parts.query if parts.query else "")
        self._connection = HTTPConnection(parts.netloc, timeout=300)
        self._light = LightConnection(url)
        self._pool = ThreadPoolExecutor(clients)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()
        self._connection.close()
        self._light.close()
        self._pool.shutdown()

    def send(self, bodies: Sequence[bytes]) -> list[bytes]:
        """The answers, in order; raises httpx.HTTPStatusError or RuntimeError where one is no success."""
        if len(bodies) == 1:
            return [self._alone(bodies[0])]
        answers = list(self._pool.map(lambda body: self._http.post(self._url, content=body), bodies))
        return [answer.raise_for_status().content for answer in answers]

    def _alone(self, body: bytes) -> bytes:
        """One answer, by the lightest client that can take it: a client is a good part of what one request takes."""
        if self._media_type == JSON and len(body) < LARGE_BYTES:
            head, found = self._light.post(body)
            status = head.status
        else:
            try:
                answer = self._exchange(body)
            except ConnectionError:  # it was idle for long, and the server closed it
                self._connection.close()
                answer = self._exchange(body)
            status, found = answer.status, answer.read()
        if status != 200:
            raise RuntimeError(f"{status}: {found[:200]!r}")
        return found

    def _exchange(self, body: bytes) -> HTTPResponse:
        """The beginning of an answer; that to a large body is taken while the body is sent.

        A service that answers a stream as it comes waits for answers to be taken, before it takes more.
        """
        if len(body) < LARGE_BYTES:
            self._connection.request("POST", self._target, body, self._headers)
            return self._connection.getresponse()
        self._connection.close()  # one that the server closed meanwhile could not be told from one that takes no more
        self._connection.putrequest("POST", self._target)
        for name, value in {**self._headers, "content-length": str(len(body))}.items():
            self._connection.putheader(name, value)
        self._connection.endheaders()
        self._pool.submit(self._connection.sock.sendall, body)
        return self._connection.getresponse()

    def rate(self, count: int, bodies: Sequence[bytes]) -> float:
        """Items a second, of bodies that hold `count` items together."""
        return rate(count, lambda: self.send(bodies))

    def checked_rate(self, count: int, body: bytes | Sequence[bytes]) -> float:
        """The same of the service, whose answers are checked once the time is taken.

        Every item has to have a Semantic ID; in a dry run codes.
        """
        bodies = [body] if isinstance(body, bytes) else body
        answers: list[bytes] = []
        found = rate(count, lambda: answers.extend(self.send(bodies)))
        check(answers, self._media_type, count, "codes" if "assign=false" in self._url else "semantic_id")
        return found

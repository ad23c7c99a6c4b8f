"""HTTP with as little as it takes: on few cores a client must not be what is measured."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import urlsplit

from benchmarks.bodies import JSON

END_OF_HEAD = b"\r\n\r\n"


def request_of(url: str, body: bytes) -> bytes:
    """A request with a JSON body, as it is sent."""
    address = urlsplit(url)
    target = f"{address.path}?{address.query}" if address.query else address.path
    head = f"POST {target} HTTP/1.1\r\nhost: {address.netloc}\r\ncontent-type: {JSON}\r\ncontent-length: {len(body)}"
    return head.encode() + END_OF_HEAD + body


class Head(NamedTuple):
    """What an answer begins with; the names of its headers are lower-case."""

    status: int
    headers: Mapping[str, str]

    @classmethod
    def of(cls, head: bytes) -> Head:
        """The head up to its end, with that or without."""
        answered, *lines = head.removesuffix(END_OF_HEAD).decode("latin-1").split("\r\n")
        named = (line.split(": ", 1) for line in lines)
        return cls(int(answered.split()[1]), {name.lower(): value for name, value in named})

    @property
    def length(self) -> int:
        """Bytes of the body behind it."""
        return int(self.headers["content-length"])


class LightConnection:
    """One small request after the other over a connection, which is opened when it is needed."""

    def __init__(self, url: str) -> None:
        """Requests go to this address."""
        self._url = url
        self._socket: socket.socket | None = None

    def post(self, body: bytes) -> tuple[Head, bytes]:
        """The answer to a JSON body."""
        request = request_of(self._url, body)
        try:
            return self._answer(request)
        except ConnectionError:  # it was idle for long, and the server closed it
            self.close()
            return self._answer(request)

    def close(self) -> None:
        """Close the connection."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _answer(self, request: bytes) -> tuple[Head, bytes]:
        if self._socket is None:
            address = urlsplit(self._url)
            self._socket = socket.create_connection((address.hostname, address.port), timeout=300)
        self._socket.sendall(request)
        received = b""
        while END_OF_HEAD not in received:
            received += _received(self._socket)
        head, _, body = received.partition(END_OF_HEAD)
        answered = Head.of(head)
        while len(body) < answered.length:
            body += _received(self._socket)
        return answered, body


def _received(connection: socket.socket) -> bytes:
    data = connection.recv(2**18)
    if not data:
        raise ConnectionResetError("the server closed the connection")
    return data

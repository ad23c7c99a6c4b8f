"""HTTP with as little as it takes: on few cores a client must not be what is measured."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import urlsplit

JSON = "application/json"
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
        named = (line.partition(":") for line in lines)
        return cls(int(answered.split()[1]), {name.lower(): value.strip() for name, _, value in named})

    @property
    def length(self) -> int:
        """Bytes of the body behind it; raises ValueError where it does not tell."""
        if "content-length" not in self.headers:
            raise ValueError("an answer without its length")
        return int(self.headers["content-length"])


class LightConnection:
    """One small request after the other over a connection, which is opened when it is needed."""

    def __init__(self, url: str) -> None:
        """Requests go to this address."""
        self._url = url
        self._socket: socket.socket | None = None

    def post(self, body: bytes) -> tuple[Head, bytes]:
        """The answer to a JSON body.

        Raises:
            ConnectionError: The server closed the connection; not where it was idle, and nothing was heard of it.
            ValueError: The answer does not tell its length.
        """
        request, was_idle = request_of(self._url, body), self._socket is not None
        try:
            first = self._first(request)
        except ConnectionError:
            self.close()
            if not was_idle:
                raise
            first = self._first(request)
        try:
            return self._rest(first)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the connection."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _first(self, request: bytes) -> bytes:
        """What an answer begins with."""
        if self._socket is None:
            address = urlsplit(self._url)
            self._socket = socket.create_connection((address.hostname, address.port), timeout=300)
        self._socket.sendall(request)
        return self._received()

    def _rest(self, received: bytes) -> tuple[Head, bytes]:
        while END_OF_HEAD not in received:
            received += self._received()
        written, _, body = received.partition(END_OF_HEAD)
        head = Head.of(written)
        while len(body) < head.length:
            body += self._received()
        return head, body

    def _received(self) -> bytes:
        assert self._socket is not None
        data = self._socket.recv(2**18)
        if not data:
            raise ConnectionResetError("the server closed the connection")
        return data

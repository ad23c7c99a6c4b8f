"""A caller who sends a body piece by piece and reads the answer meanwhile."""

from __future__ import annotations

import http.client
import socket
from typing import Any, Self
from urllib.parse import urlencode


class StreamingCaller:
    """`POST /tokenize` of a body that is not known beforehand; used as a context."""

    def __init__(self, service: Any, media_type: str, **query: Any) -> None:
        host, port = service.address
        self._connection = http.client.HTTPConnection(host, port, timeout=30)
        self._connection.putrequest("POST", f"/tokenize?{urlencode(query)}")
        self._connection.putheader("content-type", media_type)
        self._connection.putheader("transfer-encoding", "chunked")
        self._connection.endheaders()
        self._answer: http.client.HTTPResponse | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    @property
    def socket(self) -> socket.socket:
        assert self._connection.sock is not None
        return self._connection.sock

    def send(self, piece: bytes) -> None:
        """One chunk of the body."""
        self.socket.sendall(b"%x\r\n%b\r\n" % (len(piece), piece))

    def end(self) -> None:
        """The end of the body."""
        self.socket.sendall(b"0\r\n\r\n")

    @property
    def answer(self) -> http.client.HTTPResponse:
        """The answer, once it has begun."""
        if self._answer is None:
            self._answer = self._connection.getresponse()
        return self._answer

"""The client of the benchmarks: what goes wrong is not measured as if it had gone well."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from benchmarks.light import LightConnection

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nx-empty:\r\n\r\n{}"


@contextmanager
def serving(*connections: bytes) -> Iterator[str]:
    """A server that answers each connection's first request with these bytes, and closes it; yields its address."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        for answer in connections:
            connection, _ = server.accept()
            with connection:
                connection.recv(2**16)
                connection.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.getsockname()[1]}/tokenize"
    finally:
        thread.join()
        server.close()


def test_a_connection_that_was_closed_while_it_was_idle_is_opened_again() -> None:
    with serving(ANSWER, ANSWER) as url:
        client = LightConnection(url)
        answers = [client.post(b"{}") for _ in range(2)]
        client.close()

    assert [(head.status, body) for head, body in answers] == [(200, b"{}")] * 2


@pytest.mark.parametrize("answer", [b"", ANSWER[:20], ANSWER[:-1]])
def test_an_answer_that_breaks_off_is_not_asked_for_again(answer: bytes) -> None:
    with serving(answer) as url, pytest.raises(ConnectionError):
        LightConnection(url).post(b"{}")


def test_an_answer_without_its_length_is_said_and_its_connection_closed() -> None:
    with serving(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", ANSWER) as url:
        client = LightConnection(url)
        with pytest.raises(ValueError, match="without its length"):
            client.post(b"{}")
        head, body = client.post(b"{}")
        client.close()

    assert (head.status, body) == (200, b"{}")

"""The proxy passes on what it should, and breaks what it is told to."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.chaos.proxy import Network, Proxy
from tests.ports import free_port


class Echo:
    """A server that sends back what it receives."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._echo, args=(connection,), daemon=True).start()

    def _echo(self, connection: socket.socket) -> None:
        with connection:
            try:
                while chunk := connection.recv(65536):
                    connection.sendall(chunk)
            except OSError:
                pass

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def network() -> Iterator[Network]:
    running = Network()
    yield running
    running.close()


@pytest.fixture
def echo() -> Iterator[Echo]:
    server = Echo()
    yield server
    server.close()


@pytest.fixture
def proxy(network: Network, echo: Echo, monkeypatch: pytest.MonkeyPatch) -> Proxy:
    """A proxy whose faults take every connection."""
    monkeypatch.setattr("tests.chaos.proxy.SHARE", 1.0)
    return Proxy(network, echo.port, "seed")


@pytest.fixture
def connection(proxy: Proxy) -> Iterator[socket.socket]:
    """A connection through it that has been of use."""
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=10) as opened:
        assert echoed(opened, b"first") == b"first"
        yield opened


def echoed(connection: socket.socket, data: bytes) -> bytes:
    """What comes back of it before the connection ends."""
    answer = b""
    try:
        connection.sendall(data)
        while len(answer) < len(data) and (part := connection.recv(65536)):
            answer += part
    except (ConnectionResetError, BrokenPipeError):
        pass
    return answer


def test_all_bytes_pass(connection: socket.socket) -> None:
    data = bytes(range(256)) * 64

    assert echoed(connection, data) == data


def test_a_cut_ends_a_connection_before_all_has_passed(proxy: Proxy, connection: socket.socket) -> None:
    data = b"x" * 10_000

    proxy.cut()
    time.sleep(0.05)

    assert len(echoed(connection, data)) < len(data)


def test_a_half_close_ends_one_direction(proxy: Proxy, connection: socket.socket) -> None:
    connection.settimeout(0.5)

    proxy.half_close()
    time.sleep(0.05)

    with contextlib.suppress(TimeoutError):  # towards the server: the client is still connected, and waits
        assert echoed(connection, b"lost") == b""


def test_a_stall_holds_everything_back_for_a_while(proxy: Proxy, connection: socket.socket) -> None:
    started = time.monotonic()

    proxy.stall(0.3)
    time.sleep(0.05)

    assert echoed(connection, b"late") == b"late"
    assert time.monotonic() - started > 0.25


def test_a_delay_holds_each_chunk_back(proxy: Proxy, connection: socket.socket) -> None:
    proxy.delay(0.2)
    started = time.monotonic()

    assert [echoed(connection, b"late") for _ in range(4)] == [b"late"] * 4
    slow_s = time.monotonic() - started
    proxy.delay(0.0)
    started = time.monotonic()
    assert [echoed(connection, b"soon") for _ in range(4)] == [b"soon"] * 4

    assert slow_s > 0.2
    assert time.monotonic() - started < slow_s


def test_where_nobody_listens_the_connection_is_ended(network: Network) -> None:
    proxy = Proxy(network, free_port(), "seed")

    try:
        with socket.create_connection(("127.0.0.1", proxy.port), timeout=10) as connection:
            assert echoed(connection, b"anyone") == b""
    except ConnectionResetError:
        pass  # sooner still

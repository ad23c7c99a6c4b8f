"""An address is one service's alone from its start on."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Iterator
from contextlib import closing

import pytest

from service.listening import CannotListen, bind, listen
from service.serve import serve
from service.settings import Settings


def port_of(listener: socket.socket) -> int:
    port: int = listener.getsockname()[1]
    return port


@pytest.fixture
def bound() -> Iterator[socket.socket]:
    """Bound by a service that does not answer yet."""
    (listener,) = bind("127.0.0.1", 0)
    yield listener
    listener.close()


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0"])
def test_an_address_that_is_bound_is_refused_though_nobody_listens_yet(bound: socket.socket, address: str) -> None:
    with pytest.raises(CannotListen, match=f"{address}:{port_of(bound)} cannot be listened on: Address already in use"):
        bind(address, port_of(bound))


def test_nobody_is_let_in_before_the_service_listens(bound: socket.socket) -> None:
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(bound.getsockname(), timeout=10)
    listen([bound])
    socket.create_connection(bound.getsockname(), timeout=10).close()


def test_connections_that_have_not_timed_out_do_not_hinder_a_restart(bound: socket.socket) -> None:
    address = bound.getsockname()
    listen([bound])
    with socket.create_connection(address, timeout=10) as caller:
        taken, _ = bound.accept()
        taken.close()  # first, so that the service is left with what has to time out
        assert caller.recv(1) == b""
    bound.close()

    (again,) = bind(*address)
    with closing(again):
        listen([again])
        with pytest.raises(CannotListen):
            bind(*address)


def test_one_who_bound_the_address_in_the_same_way_and_listens_first_is_told(bound: socket.socket) -> None:
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    with socket.socket() as stranger:
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        stranger.bind(bound.getsockname())
        stranger.listen()
        with pytest.raises(CannotListen, match=str(port_of(bound))):
            listen([bound])


def test_a_free_port_is_the_same_on_every_address_of_the_host() -> None:
    if not socket.has_ipv6:
        pytest.skip("this machine has one family of addresses")
    for _ in range(10):
        listeners = bind("", 0)
        ports = {port_of(listener) for listener in listeners}
        for listener in listeners:
            listener.close()
        assert len(listeners) == 2
        assert len(ports) == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_a_service_whose_address_is_taken_says_so_before_it_loads_anything(
    bound: socket.socket, data_dir: object, workers: int
) -> None:
    hang_up = signal.getsignal(signal.SIGHUP)
    try:
        refusal = serve(Settings(port=port_of(bound), workers=workers, data_dir=data_dir))
    finally:
        signal.signal(signal.SIGHUP, hang_up)

    assert refusal == f"127.0.0.1:{port_of(bound)} cannot be listened on: Address already in use"


async def test_answers_do_not_wait_for_acknowledgements(bound: socket.socket) -> None:
    # given
    delays: asyncio.Queue[bool] = asyncio.Queue()

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = writer.get_extra_info("socket")
        await delays.put(not connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    # when
    async with await asyncio.start_server(answer, sock=bound):
        _, writer = await asyncio.open_connection(*bound.getsockname())
        # then
        assert not await delays.get()
        writer.close()

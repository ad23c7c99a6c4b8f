"""Connections are spread over workers, here over two in one process, with a socket that both listen on."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from service.workers.acceptor import LOOKS_OF_PATIENCE, Acceptor, Counts
from tests.topologies import until


class Worker:
    """Takes connections, and keeps them."""

    def __init__(self, listener: socket.socket, counts: Counts, place: int) -> None:
        self.connections: set[asyncio.BaseTransport] = set()
        taken = self.connections

        class Keep(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                taken.add(transport)

        self.listener = listener.dup()  # as a process has its own descriptor of it
        self.acceptor = Acceptor([self.listener], Keep, counts, place, connections=lambda: len(taken))
        self.acceptor.start()


@pytest.fixture
def counts(tmp_path: Path) -> Counts:
    return Counts(tmp_path / "connections", places=4)


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound


@pytest.fixture
async def begin(listener: socket.socket, counts: Counts) -> AsyncIterator[Callable[[int], Worker]]:
    workers: list[Worker] = []

    def begin_at(place: int) -> Worker:
        workers.append(Worker(listener, counts, place))
        return workers[-1]

    yield begin_at
    for worker in workers:
        worker.acceptor.stop()
        worker.listener.close()
        for transport in worker.connections:
            transport.close()


@pytest.fixture
def call(listener: socket.socket) -> Iterator[Callable[[int], None]]:
    """Opens connections, all at once."""
    callers: list[socket.socket] = []

    def open_all(number: int) -> None:
        callers.extend(socket.create_connection(listener.getsockname()) for _ in range(number))

    yield open_all
    for caller in callers:
        caller.close()


async def test_connections_opened_at_once_are_spread_evenly(
    begin: Callable[[int], Worker], call: Callable[[int], None]
) -> None:
    one, other = begin(0), begin(1)

    call(16)
    await until(lambda: len(one.connections) + len(other.connections) == 16, "they are not taken")

    assert abs(len(one.connections) - len(other.connections)) <= 2


async def test_a_worker_that_comes_later_is_given_the_next_connections(
    begin: Callable[[int], Worker], call: Callable[[int], None]
) -> None:
    one = begin(0)
    call(6)
    await until(lambda: len(one.connections) == 6, "they are not taken")

    other = begin(1)
    call(6)
    await until(lambda: len(one.connections) + len(other.connections) == 12, "they are not taken")

    assert len(other.connections) >= 4


async def test_what_nobody_with_fewer_takes_is_taken_all_the_same(
    begin: Callable[[int], Worker], call: Callable[[int], None], counts: Counts
) -> None:
    one = begin(0)
    counts.put(3, 0)  # a worker that is there, and busy

    call(8)

    await until(lambda: len(one.connections) == 8, "they are not taken")


async def test_far_more_than_its_share_for_a_while_lets_callers_go(
    begin: Callable[[int], Worker], call: Callable[[int], None], counts: Counts
) -> None:
    one = begin(0)
    call(8)
    await until(lambda: len(one.connections) == 8, "they are not taken")

    assert not any(one.acceptor.lets_callers_go() for _ in range(2 * LOOKS_OF_PATIENCE))  # all there is, is its share
    counts.put(3, 0)
    assert [one.acceptor.lets_callers_go() for _ in range(LOOKS_OF_PATIENCE)] == [False] * (LOOKS_OF_PATIENCE - 1) + [
        True
    ]
    counts.remove(3)
    assert not one.acceptor.lets_callers_go()


async def test_a_worker_that_stopped_takes_none_and_counts_for_nothing(
    begin: Callable[[int], Worker], call: Callable[[int], None], counts: Counts
) -> None:
    one, other = begin(0), begin(1)
    one.acceptor.stop()

    call(4)
    await until(lambda: len(other.connections) == 4, "they are not taken")

    assert not one.connections
    assert counts.present() == [4]

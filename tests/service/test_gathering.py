"""What the server sends, and when."""

from __future__ import annotations

import asyncio

import pytest

from service.http.protocol import Gathering


async def received(*writes: bytes, pause_after: int | None = None) -> list[bytes]:
    """What a caller reads, piece by piece, of a server that writes these and closes."""

    class Writer(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.task = asyncio.ensure_future(self._write(Gathering(transport)))  # type: ignore[arg-type]

        async def _write(self, transport: Gathering) -> None:
            for number, data in enumerate(writes):
                transport.write(data)
                if number == pause_after:
                    await asyncio.sleep(0.05)
            transport.close()

    server = await asyncio.get_running_loop().create_server(Writer, "127.0.0.1", 0)
    async with server:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        pieces = [piece async for piece in _pieces(reader)]
        writer.close()
    return pieces


async def _pieces(reader: asyncio.StreamReader):  # type: ignore[no-untyped-def]
    while piece := await reader.read(2**20):
        yield piece


async def test_a_head_and_its_body_are_sent_together() -> None:
    assert await received(b"head", b"body") == [b"headbody"]


async def test_what_is_written_later_is_not_waited_for() -> None:
    assert await received(b"head", b"first", b"last", pause_after=1) == [b"headfirst", b"last"]


@pytest.mark.parametrize("size", [Gathering.MAX_BYTES - 1, 4 * Gathering.MAX_BYTES])
async def test_nothing_is_lost_or_turned_around(size: int) -> None:
    writes = [bytes([number]) * size for number in range(5)]

    assert b"".join(await received(*writes)) == b"".join(writes)

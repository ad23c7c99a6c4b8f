"""Bytes of a stream of Arrow IPC -> its messages, each whole and within a limit -> schema and record batches."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator

import pyarrow as pa

from service.bodies import Allowance
from service.errors import BodyTooLarge, BrokenStream
from service.quoting import bare

MAX_METADATA_BYTES = 2**20

_SCHEMA, _RECORD_BATCH = 1, 3  # MessageHeader of Message.fbs
_COMPRESSED_OF_OLD = b"ARROW:experimental_compression"  # by Arrow 0.17, in the message's own metadata, and still read


async def messages(chunks: AsyncIterator[bytes], allowance: Allowance, max_bytes: int) -> AsyncIterator[bytearray]:
    """The encapsulated messages of a stream, each held as a whole once there is room for it.

    Raises:
        BodyTooLarge: One is beyond the limit.
        BrokenStream: This is no stream, or only the beginning of one.
    """
    body, prefix = _Body(chunks), bytearray(8)
    while await body.fill(prefix, may_end=True):
        marker, metadata_bytes = struct.unpack("<Ii", prefix)
        if marker != 0xFFFFFFFF or not 0 <= metadata_bytes <= MAX_METADATA_BYTES:
            raise BrokenStream("it is not in the streaming format of Arrow IPC")
        if metadata_bytes == 0:
            return
        await allowance.take(len(prefix) + metadata_bytes)
        await body.fill(metadata := bytearray(metadata_bytes))
        body_bytes = _body_bytes(metadata)
        if body_bytes > max_bytes:
            msg = f"a record batch of {body_bytes} bytes, at most {max_bytes} are taken: write smaller ones"
            raise BodyTooLarge(msg)
        await allowance.take(body_bytes)
        head = prefix + metadata
        message = bytearray(len(head) + body_bytes)
        message[: len(head)] = head
        await body.fill(message, len(head))
        yield message
        del message


class _Body:
    """Bytes by their number."""

    def __init__(self, chunks: AsyncIterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = memoryview(b"")

    async def fill(self, found: bytearray, start: int = 0, *, may_end: bool = False) -> bool:
        """Puts the next bytes from `start` on; whether there were any, where the body may end before them.

        Raises:
            BrokenStream: There are not so many.
        """
        room = memoryview(found)[start:]  # into which a part goes without another copy
        while room:
            if not self._rest:
                self._rest = memoryview(await anext(self._chunks, b""))
                if not self._rest:
                    if may_end and len(room) == len(found):
                        return False
                    raise BrokenStream("it ends in the middle")
            size = min(len(room), len(self._rest))
            room[:size] = self._rest[:size]
            room, self._rest = room[size:], self._rest[size:]
        return True


def _body_bytes(metadata: bytearray) -> int:
    """The length of the body behind a message's metadata, which is a flatbuffer (Message.fbs, Schema.fbs of Arrow).

    Raises:
        BrokenStream: It is none; or the body is compressed, when what it would become is not bounded by its length; or
            it is a schema of big-endian numbers, which nobody would turn round.
    """
    try:
        (message,) = struct.unpack_from("<I", metadata)
        length_at, kind_at, header_at = (_field(metadata, message, index) for index in (3, 1, 2))
        (length,) = struct.unpack_from("<q", metadata, length_at) if length_at else (0,)
        kind = metadata[kind_at] if kind_at else 0
        header = header_at + struct.unpack_from("<I", metadata, header_at)[0] if header_at else 0
        if kind == _SCHEMA and (order_at := _field(metadata, header, 0)) and metadata[order_at]:
            raise BrokenStream("its numbers are big-endian; write them little-endian")
        if kind == _RECORD_BATCH and (_field(metadata, header, 3) or _COMPRESSED_OF_OLD in metadata):
            raise BrokenStream("it is compressed; write it without")
    except (struct.error, IndexError) as error:
        raise BrokenStream("a message's metadata cannot be read") from error
    if length < 0:
        raise BrokenStream("a message's metadata cannot be read")
    return int(length)


def _field(metadata: bytearray, table: int, index: int) -> int:
    """Where a field of a flatbuffer's table stands; 0 where it is left out."""
    vtable = table - struct.unpack_from("<i", metadata, table)[0]
    if vtable < 0:
        raise IndexError(vtable)
    (size,) = struct.unpack_from("<H", metadata, vtable)
    entry = 4 + 2 * index
    (offset,) = struct.unpack_from("<H", metadata, vtable + entry) if entry < size else (0,)
    return table + offset if offset else 0


def read_schema(message: bytearray) -> pa.Schema:
    """The schema of a message.

    Raises:
        BrokenStream: It is none.
    """
    try:
        schema = pa.ipc.read_schema(pa.ipc.read_message(pa.py_buffer(message)))
        _ = schema.names  # which may be no UTF-8
    except (pa.ArrowException, ValueError, OSError) as error:
        raise BrokenStream(f"it has no schema: {_first_line(error)}") from error
    return schema


def read_batch(message: bytearray, schema: pa.Schema) -> pa.RecordBatch:
    """The record batch of a message, checked to its last offset: what a caller wrote is not to be trusted.

    Raises:
        BrokenStream: It is none.
    """
    try:
        batch = pa.ipc.read_record_batch(pa.ipc.read_message(pa.py_buffer(message)), schema)
        batch.validate(full=True)
    except (pa.ArrowException, ValueError, OSError) as error:
        raise BrokenStream(f"a record batch cannot be read: {_first_line(error)}") from error
    return batch


def _first_line(error: Exception) -> str:
    return bare(str(error).partition("\n")[0])

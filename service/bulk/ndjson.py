"""`application/x-ndjson`: an item a line, and an entry a line in answer.

    {"item_id": "kettle-1", "text": "Cordless kettle"}     {"item_id":"kettle-1","semantic_id":"81-37-183-181-0",...}
    {"item_id": "kettle-2", "text"                     ->  {"item_id":null,"error":{...},"line":2}

A line that is not JSON, or too long to be held, fails alone. What ends a stream before its time is its last line, the
only one with the member `problem`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import NamedTuple

import orjson

from service.answers import Entry
from service.bodies import BYTES_ON_THE_LOOP, Allowance, bytes_of_values, parse_json
from service.bulk.row_thread import RowThread
from service.errors import InvalidLine, NotJson, SemidError

MEDIA_TYPE = "application/x-ndjson"
MAX_LINE_BYTES = 2**20
LINES_PER_GROUP = 256
AHEAD_BYTES = 2**20

UseCase = Callable[[Sequence[object]], Awaitable[Sequence[Entry]]]


class Line(NamedTuple):
    """One line of a body, counted from 1: its bytes, or why there are none."""

    number: int
    content: bytes | InvalidLine

    @property
    def entry(self) -> object:
        """Its JSON value; an error where it is none, in the place of the item."""
        if isinstance(self.content, InvalidLine):
            return self.content
        try:
            return parse_json(self.content)
        except NotJson as error:
            return InvalidLine(f"it is not JSON: {error.detail}")


class Ndjson:
    """Lines in, lines out.

    Args:
        use_case: Answers the entries of a group, in order.
        thread: Reads the lines of a large group.
        max_line_bytes: Of one line; beyond it the line is not held and fails.
    """

    media_type = MEDIA_TYPE
    ahead_bytes = AHEAD_BYTES

    def __init__(self, use_case: UseCase, thread: RowThread, *, max_line_bytes: int = MAX_LINE_BYTES) -> None:
        self._use_case = use_case
        self._thread = thread
        self._max_line_bytes = max_line_bytes

    def begin(self) -> bytes:
        """Nothing."""
        return b""

    async def groups(self, chunks: AsyncIterator[bytes], allowance: Allowance) -> AsyncIterator[tuple[list[Line], int]]:
        """The lines that have arrived, blank ones left out, a few hundred together at most."""
        splitter = LineSplitter(self._max_line_bytes)
        held = 0
        async for chunk in chunks:
            size = _size(chunk)
            await allowance.take(size)
            held += size
            for group in _grouped(splitter.split(chunk)):
                size = _size_of(group)
                held -= size
                yield group, size
            begun = splitter.held
            allowance.give(held - begun)  # of what is not looked at: blank lines, too long ones
            held = begun
        if group := list(splitter.finish()):
            yield group, held

    def together(self, arrived: deque[tuple[list[Line], int]]) -> tuple[list[Line], int]:
        """The lines of as many chunks as make a group: one alone has thirty embeddings, of which each costs more."""
        lines, size = arrived.popleft()
        while arrived and len(lines) + len(arrived[0][0]) <= LINES_PER_GROUP:
            more, more_size = arrived.popleft()
            lines, size = lines + more, size + more_size
        return lines, size

    async def answer(self, group: Sequence[Line]) -> bytes:
        """The answer to each line of a group; one that fails says which it is."""
        on_the_loop = sum(len(line.content) for line in group if isinstance(line.content, bytes)) <= BYTES_ON_THE_LOOP
        entries = _entries(group) if on_the_loop else await self._thread.run(_entries, group)
        answers = await self._use_case(entries)
        for line, answer in zip(group, answers, strict=True):
            if isinstance(answer, dict) and "error" in answer:
                answer["line"] = line.number
        return b"".join(map(_written, answers))

    def end(self, problem: SemidError | None) -> bytes:
        """Nothing, or the problem."""
        return b"" if problem is None else _written({"problem": problem.as_problem()})


class LineSplitter:
    """Chunks -> lines, of which none is held beyond a limit."""

    def __init__(self, max_line_bytes: int) -> None:
        self._max_line_bytes = max_line_bytes
        self._begun = b""  # of the line that is not complete yet
        self._too_long = False
        self._number = 0

    @property
    def held(self) -> int:
        """The size of the line that is not complete yet."""
        return _size(self._begun)

    def split(self, chunk: bytes) -> Iterator[Line]:
        """The lines that this chunk completes."""
        *complete, rest = (self._begun + chunk).split(b"\n")
        self._begun = rest
        for content in complete:
            yield from self._line(content)
        if len(rest) > self._max_line_bytes:
            self._begun, self._too_long = b"", True

    def finish(self) -> Iterator[Line]:
        """The last line, where no line end stands behind it."""
        yield from self._line(self._begun)

    def _line(self, content: bytes) -> Iterator[Line]:
        self._number += 1
        if self._too_long or len(content) > self._max_line_bytes:
            self._too_long = False
            yield Line(self._number, InvalidLine(f"it has more than {self._max_line_bytes} bytes"))
        elif content.strip():
            yield Line(self._number, content)


def _size(part: bytes) -> int:
    """Bytes of a part of a body, and of what parsing makes of them."""
    return len(part) + bytes_of_values(part)


def _size_of(lines: Sequence[Line]) -> int:
    """The same of lines and their ends, where they are held; together, as values of much are counted faster."""
    held = [line.content for line in lines if isinstance(line.content, bytes)]
    return _size(b"".join(held)) + len(held)


def _grouped(lines: Iterator[Line]) -> Iterator[list[Line]]:
    complete = list(lines)
    for start in range(0, len(complete), LINES_PER_GROUP):
        yield complete[start : start + LINES_PER_GROUP]


def _entries(lines: Sequence[Line]) -> list[object]:
    return [line.entry for line in lines]


def _written(entry: Entry) -> bytes:
    return orjson.dumps(entry, option=orjson.OPT_UTC_Z | orjson.OPT_APPEND_NEWLINE)

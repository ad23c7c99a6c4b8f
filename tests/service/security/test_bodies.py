"""Bodies that are too large or too slow end, and hold nothing."""

from __future__ import annotations

import json
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ServiceThread

JSON = {"content-type": "application/json"}
ITEM = {"item_id": "never", "text": "kettle"}
TIMEOUT_S = 0.5


@pytest.fixture(scope="module")
def impatient(start_service: Callable[..., ServiceThread], make_checkpoint: Callable[..., Path]) -> Iterator[Any]:
    """A service that waits for nobody."""
    directory = Path(tempfile.mkdtemp(prefix="semid-"))
    running = start_service(
        checkpoint=make_checkpoint("impatient", 8, 8, takes_text=False),
        data_dir=directory,
        body_timeout_s=TIMEOUT_S,
        stream_timeout_s=TIMEOUT_S,
        head_timeout_s=TIMEOUT_S,
        registry_timeout_ms=20_000,
    )
    yield running
    running.stop()
    shutil.rmtree(directory, ignore_errors=True)


def trickled(service: Any, head: bytes, part: bytes) -> bytes:
    """What is answered to a body that comes in small parts, until the connection is closed."""
    answer = b""
    with socket.create_connection(service.address, timeout=20) as connection:
        connection.sendall(head)
        connection.setblocking(False)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                connection.send(part)
                if not (received := connection.recv(65536)):
                    return answer
                answer += received
            except BlockingIOError:
                pass
            except ConnectionError:
                return answer
            time.sleep(0.02)
    pytest.fail(f"the connection is not closed; answered: {answer!r}")


@pytest.mark.parametrize("route", ["/tokenize", "/lookup"])
def test_a_body_beyond_the_limit_is_refused_by_its_length(service: Any, route: str) -> None:
    answer = service.raw(
        f"POST {route} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        f"content-length: {512 * 1024 + 1}\r\nconnection: close\r\n\r\n".encode()
    )

    assert answer.startswith(b"HTTP/1.1 413"), answer[:200]
    assert b"body_too_large" in answer


@pytest.mark.parametrize("route", ["/tokenize", "/lookup"])
def test_a_body_of_chunks_beyond_the_limit_is_refused(service: Any, route: str) -> None:
    head = f"POST {route} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"

    answer = service.raw(head.encode(), *[chunk] * 9, timeout_s=2)

    assert answer.startswith(b"HTTP/1.1 413"), answer[:200]
    assert b"body_too_large" in answer


def test_a_body_at_the_limit_is_taken(service: Any, namespace: str) -> None:
    body = json.dumps({"items": [ITEM], "namespace": namespace}).ljust(512 * 1024)

    assert service.http.post("/tokenize", content=body, headers=JSON).status_code == 200


@pytest.mark.parametrize("announced", [b"content-length: 100000", b"transfer-encoding: chunked"])
def test_a_body_that_trickles_is_refused_in_time_and_its_connection_closed(impatient: Any, announced: bytes) -> None:
    head = b"POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n" + announced + b"\r\n\r\n"

    answer = trickled(impatient, head, b"1\r\n \r\n" if b"chunked" in announced else b" ")

    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"urn:semid:problem:body_timeout" in answer
    assert answer.count(b"HTTP/1.1") == 1
    impatient.until(lambda: impatient.state.gate._held_bytes == 0, "its bytes are still counted as held")


def test_a_stream_whose_line_trickles_ends_with_a_problem(impatient: Any) -> None:
    head = b"POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-type: application/x-ndjson\r\n"
    line = b'{"item_id": "slow", "text": "'

    answer = trickled(
        impatient, head + b"transfer-encoding: chunked\r\n\r\n%x\r\n%s\r\n" % (len(line), line), b"1\r\nx\r\n"
    )

    assert b"urn:semid:problem:body_timeout" in answer
    impatient.until(lambda: impatient.state.gate._held_bytes == 0, "its bytes are still counted as held")


def test_a_body_that_is_announced_and_never_sent_is_not_waited_for(impatient: Any) -> None:
    head = b"POST /lookup HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 7\r\n"

    assert impatient.raw(head + b"connection: close\r\n\r\n", timeout_s=20).startswith(b"HTTP/1.1 408 ")


def test_a_caller_who_asks_first_whether_a_large_body_is_wanted_is_told_no(service: Any) -> None:
    head = b"POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nexpect: 100-continue\r\n"

    answer = service.raw(head + b"content-length: 600000\r\nconnection: close\r\n\r\n", timeout_s=20)

    assert answer.startswith(b"HTTP/1.1 413 ")

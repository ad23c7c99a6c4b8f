"""Several workers are one service: the same promises, whichever answers, whichever dies, and while they are renewed."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file, save_file

from tests.topologies import wait_until

OneOfEach = Callable[[Any], list[Any]]
WORKERS = 2
WAIT_S = 60.0


@pytest.fixture(scope="module")
def embeddings_only(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("workers", 8, 8, takes_text=False)


@pytest.fixture(scope="module")
def another(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("another", 4, 4, 4, seed=7, takes_text=False)


@pytest.fixture(scope="module")
def service(service_process: Callable[..., Any], embeddings_only: Path, another: Path) -> Iterator[Any]:
    """Two workers on an embedded registry."""
    directory = Path(tempfile.mkdtemp(prefix="semid-"))
    settings = {"checkpoint": embeddings_only, "checkpoint_dirs": another.parent}
    running = service_process(directory, workers=WORKERS, drain_s=10, **settings)
    yield running.wait_until_ready()
    running.stop()
    shutil.rmtree(directory, ignore_errors=True)


def workers(service: Any) -> list[psutil.Process]:
    """The processes that serve, and those that are about to."""
    found = psutil.Process(service.pid).children(recursive=True)
    return [process for process in found if process.ppid() != service.pid and "valkey" not in process.name()]


def fork_server(service: Any) -> psutil.Process:
    (server,) = {process.parent() for process in workers(service)}
    return server


def registry_server(service: Any) -> psutil.Process:
    (server,) = (child for child in psutil.Process(service.pid).children() if "valkey" in child.name())
    return server


class Connection:
    """A connection that is kept alive, and the worker at its other end."""

    def __init__(self, service: Any) -> None:
        self.http = HTTPConnection("127.0.0.1", service.http.base_url.port, timeout=WAIT_S)
        assert self.ask("GET", "/healthz")[0] == 200
        port = self.http.sock.getsockname()[1]
        (self.worker,) = (
            process.pid
            for process in workers(service)
            if any(of.raddr and of.raddr.port == port for of in process.net_connections("tcp"))
        )

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        self.begin(method, path, body)
        return self.answer()

    def begin(self, method: str, path: str, body: Any = None) -> None:
        content = None if body is None else json.dumps(body).encode()
        self.http.request(method, path, content, {} if body is None else {"content-type": "application/json"})

    def answer(self) -> tuple[int, Any]:
        response = self.http.getresponse()
        content = response.read()
        return response.status, json.loads(content) if content.startswith(b"{") else content.decode()

    def begin_half(self, body: Any) -> bytes:
        """Send a request to tokenize but for the end of its body, which is returned."""
        content = json.dumps(body).encode()
        self.http.putrequest("POST", "/tokenize")
        self.http.putheader("content-type", "application/json")
        self.http.putheader("content-length", str(len(content)))
        self.http.endheaders(content[:20])
        return content[20:]


@pytest.fixture
def one_of_each() -> Iterator[Callable[[Any], list[Connection]]]:
    """Makes a connection to each worker; they are closed with the test."""
    opened: list[Connection] = []

    def connect(service: Any) -> list[Connection]:
        found: dict[int, Connection] = {}
        deadline = time.monotonic() + WAIT_S
        while len(found) < WORKERS:
            assert time.monotonic() < deadline, "a worker takes no connections"
            opened.append(Connection(service))
            found.setdefault(opened[-1].worker, opened[-1])
        return list(found.values())

    yield connect
    for connection in opened:
        connection.http.close()


def item(item_id: str, seed: int = 0) -> dict[str, str]:
    embedding = np.random.default_rng(seed).standard_normal(384).astype("<f4")
    return {"item_id": item_id, "embedding": base64.b64encode(embedding.tobytes()).decode()}


def test_the_connections_of_one_client_are_spread_over_all_workers(service: Any) -> None:
    connections = [HTTPConnection("127.0.0.1", service.http.base_url.port, timeout=WAIT_S) for _ in range(16)]
    for connection in connections:
        connection.connect()
    ports = {connection.sock.getsockname()[1] for connection in connections}

    def held() -> list[int]:
        return [
            sum(of.raddr != () and of.raddr.port in ports for of in worker.net_connections("tcp"))
            for worker in workers(service)
        ]

    wait_until(lambda: sum(held()) == len(connections), "the connections are not taken")

    assert min(held()) >= 4
    for connection in connections:
        connection.close()


def test_what_forks_the_workers_has_one_thread(service: Any) -> None:
    assert fork_server(service).num_threads() == 1


def test_an_item_posted_to_both_workers_at_once_gets_one_id(service: Any, one_of_each: OneOfEach) -> None:
    connections = one_of_each(service)
    answers = []
    for number in range(50):
        for connection in connections:
            connection.begin("POST", "/tokenize", {"items": [item(f"twice {number}", number % 5)]})
        answers.append([connection.answer() for connection in connections])

    assert {status for pair in answers for status, _ in pair} == {200}
    entries = [[answer["items"][0] for _, answer in pair] for pair in answers]
    assert all(one["semantic_id"] == other["semantic_id"] for one, other in entries)
    assert [one["created"] + other["created"] for one, other in entries] == [1] * len(entries)
    assert len({one["semantic_id"] for one, _ in entries}) == len(entries)


def test_a_change_made_by_one_worker_reaches_who_waits_at_the_other(service: Any, one_of_each: OneOfEach) -> None:
    follower, writer = one_of_each(service)
    revision = follower.ask("GET", "/changes?after=0")[1]["revision"]
    follower.begin("GET", f"/changes?after={revision}&wait_s=30")

    began = time.monotonic()
    assert writer.ask("POST", "/tokenize", {"items": [item("followed")]})[0] == 200
    _, answer = follower.answer()

    assert [change["item_id"] for change in answer["changes"]] == ["followed"]
    assert time.monotonic() - began < 10


def test_the_metrics_are_of_all_workers_whichever_is_asked(service: Any, one_of_each: OneOfEach) -> None:
    one, other = one_of_each(service)

    def created(connection: Connection) -> float:
        found = re.findall(
            r"^semid_items_total\{.*\"created\".*\} (\S+)$", connection.ask("GET", "/metrics")[1], re.MULTILINE
        )
        return sum(map(float, found))

    before = created(one)
    one.ask("POST", "/tokenize", {"items": [item("counted 1"), item("counted 2")]})
    other.ask("POST", "/tokenize", {"items": [item("counted 3")]})

    assert created(one) == created(other) == before + 3
    encoded = [connection.ask("GET", "/stats")[1]["drift"]["rows"] for connection in (one, other)]
    assert encoded[0] == encoded[1] >= 3
    told = one.ask("GET", "/metrics")[1]
    assert f"\nsemid_workers {WORKERS}.0\n" in told
    assert "pid=" not in told
    resident = [worker.memory_info().rss for worker in workers(service)]
    assert max(resident) < service.metric("process_resident_memory_bytes") < 1.5 * sum(resident)


def test_each_worker_marks_how_far_it_saw_the_record_come(service: Any, one_of_each: OneOfEach) -> None:
    for number, connection in enumerate(one_of_each(service)):
        connection.ask("POST", "/tokenize", {"items": [item(f"marked {number}")]})

    files = list((service.data_dir / "data" / "history").iterdir())

    assert len(files) >= WORKERS
    assert all(b"default:" in file.read_bytes() for file in files)


class Callers:
    """Threads that post new items without a pause, each over one connection that it keeps alive."""

    def __init__(self, service: Any) -> None:
        self.acknowledged: dict[str, str] = {}
        self.faults: list[str] = []
        self._enough = threading.Event()
        self._url = str(service.http.base_url)
        self._threads = [threading.Thread(target=self._post, args=(caller,)) for caller in range(4)]
        for thread in self._threads:
            thread.start()

    def _post(self, caller: int) -> None:
        with httpx.Client(base_url=self._url, timeout=WAIT_S) as http:
            for number in range(100_000):
                if self._enough.is_set():
                    return
                try:
                    response = http.post(
                        "/tokenize", json={"items": [item(f"{id(self)} {caller} {number}", number % 3)]}
                    )
                except httpx.TransportError as error:
                    self.faults.append(repr(error))
                    continue
                if response.status_code != 200:
                    self.faults.append(response.text)
                    continue
                (entry,) = response.json()["items"]
                self.acknowledged[entry["item_id"]] = entry["semantic_id"]

    def stop(self) -> None:
        self._enough.set()
        for thread in self._threads:
            thread.join()


def test_renewing_the_workers_loses_no_request(service: Any, one_of_each: OneOfEach) -> None:
    before = {worker.pid for worker in workers(service)}
    under_way = one_of_each(service)
    rests = [connection.begin_half({"items": [item(f"under way {connection.worker}")]}) for connection in under_way]
    callers = Callers(service)
    counted = service.metric("semid_items_total")
    os.kill(service.pid, signal.SIGHUP)
    wait_until(lambda: len({worker.pid for worker in workers(service)} - before) > 0, "no worker is renewed")

    for connection, rest in zip(under_way, rests, strict=True):
        connection.http.send(rest)
    answers = [connection.answer() for connection in under_way]
    wait_until(
        lambda: before.isdisjoint(now := {worker.pid for worker in workers(service)}) and len(now) == WORKERS,
        "the workers are not renewed",
    )
    callers.stop()

    assert [status for status, _ in answers] == [200] * WORKERS
    assert callers.faults == []
    assert len(callers.acknowledged) > 10
    assert len(set(callers.acknowledged.values())) == len(callers.acknowledged)
    assert service.metric("semid_items_total") >= counted + len(callers.acknowledged)
    assert service.metric("semid_workers") == WORKERS
    one_of_each(service)


def test_a_worker_that_is_killed_is_replaced_and_nothing_is_lost(service: Any, one_of_each: OneOfEach) -> None:
    registry = registry_server(service).pid
    callers = Callers(service)
    wait_until(lambda: len(callers.acknowledged) > 20, "nothing is answered")
    killed = workers(service)[0]

    killed.kill()
    wait_until(lambda: f"Worker {killed.pid}: ended with SIGKILL" in service.log, "its death is not in the log")
    wait_until(
        lambda: service.metric("semid_workers") == WORKERS and len(workers(service)) == WORKERS, "no other comes"
    )
    callers.stop()

    assert len(callers.faults) <= 4  # at most what each caller had under way there
    assert registry_server(service).pid == registry
    ids = list(callers.acknowledged.values())
    assert len(set(ids)) == len(ids)
    holders = []
    for start in range(0, len(ids), 1000):
        found = service.http.post("/lookup", json={"semantic_ids": ids[start : start + 1000]}).json()["items"]
        holders += [entry["item_id"] for entry in found]
    assert holders == list(callers.acknowledged)
    one_of_each(service)


def test_a_worker_is_replaced_once_the_system_lets_another_be_begun(service: Any, one_of_each: OneOfEach) -> None:
    supervisor = psutil.Process(service.pid)
    allowed = supervisor.rlimit(psutil.RLIMIT_NOFILE)
    supervisor.rlimit(psutil.RLIMIT_NOFILE, (3, allowed[1]))
    try:
        workers(service)[0].kill()
        wait_until(lambda: "No worker can be begun" in service.log, "the log says nothing")
    finally:
        supervisor.rlimit(psutil.RLIMIT_NOFILE, allowed)

    wait_until(
        lambda: service.metric("semid_workers") == WORKERS and len(workers(service)) == WORKERS, "no other comes"
    )
    one_of_each(service)


def test_every_worker_swaps_its_tokenizers_and_so_does_the_successor_of_one_that_dies(
    service: Any, another: Path
) -> None:
    def defaults() -> list[str]:
        """Of each worker."""
        found: dict[int, str] = {}
        wait_until(lambda: found.update([default()]) or len(found) == WORKERS, "a worker takes no connections")
        return list(found.values())

    def default() -> tuple[int, str]:
        """Of one worker."""
        connection = Connection(service)
        _, answer = connection.ask("GET", "/tokenizers")
        connection.http.close()
        return connection.worker, answer["default"].partition("@")[0]

    callers = Callers(service)
    done = service.http.post("/admin/tokenizers", json={"checkpoint": str(another), "default": True})
    swapped = defaults()
    killed = workers(service)[0]
    killed.kill()
    wait_until(lambda: f"Worker {killed.pid}: ended with SIGKILL" in service.log, "its death is not in the log")
    wait_until(
        lambda: service.metric("semid_workers") == WORKERS and len(workers(service)) == WORKERS, "no other comes"
    )
    after_a_death = defaults()
    back = service.http.post("/admin/tokenizers/workers/default")
    gone = service.http.delete("/admin/tokenizers/another")
    callers.stop()

    answer = done.json()
    assert (done.status_code, answer["workers"], answer["pending"], answer["note"]) == (200, WORKERS, 0, None)
    assert swapped == after_a_death == ["another"] * WORKERS
    assert [back.status_code, gone.status_code] == [200, 200]
    assert defaults() == ["workers"] * WORKERS
    assert len(gone.json()["loaded"]) == 1
    assert len(callers.faults) <= 4  # at most what each caller had under way at the worker that was killed
    assert all("RemoteProtocolError" in fault or "ReadError" in fault for fault in callers.faults)


class Stream:
    """A body of lines that does not end, and its answer."""

    def __init__(self, service: Any) -> None:
        self._socket = socket.create_connection(("127.0.0.1", service.http.base_url.port), timeout=WAIT_S)
        head = "POST /tokenize HTTP/1.1\r\nhost: semid\r\ncontent-type: application/x-ndjson\r\n"
        self._socket.sendall(f"{head}transfer-encoding: chunked\r\n\r\n".encode())
        self._answer = self._socket.makefile("rb")

    def send(self, line: dict[str, str]) -> None:
        data = json.dumps(line).encode() + b"\n"
        self._socket.sendall(b"%x\r\n%b\r\n" % (len(data), data))

    def line(self) -> dict[str, Any]:
        """The next of the answer."""
        while not (line := self._answer.readline()).startswith(b"{"):
            assert line, "the answer has ended"
        return json.loads(line)  # type: ignore[no-any-return]

    def rest(self) -> bytes:
        """Of the answer."""
        return self._answer.read()

    def close(self) -> None:
        self._answer.close()
        self._socket.close()


@pytest.fixture
def stream(service: Any) -> Iterator[Stream]:
    with closing(Stream(service)) as opened:
        yield opened


def test_sigterm_lets_every_worker_finish_tells_streams_and_ends_with_0(
    service: Any, one_of_each: OneOfEach, stream: Stream
) -> None:
    registry, processes = registry_server(service), workers(service)
    under_way = one_of_each(service)
    rests = [connection.begin_half({"items": [item(f"last {connection.worker}")]}) for connection in under_way]
    stream.send(item("streamed"))
    assert stream.line()["item_id"] == "streamed"
    before = len(service.log)

    service.terminate()
    wait_until(lambda: service.log[before:].count("Shutting down") >= WORKERS, "the workers do not drain")
    for connection, rest in zip(under_way, rests, strict=True):
        connection.http.send(rest)
    answers = [connection.answer() for connection in under_way]

    stream.send(item("streamed later"))
    assert stream.line()["item_id"] == "streamed later"
    problem = stream.line()["problem"]

    assert [status for status, _ in answers] == [200] * WORKERS
    assert (problem["type"], problem["title"]) == ("urn:semid:problem:shutting_down", "The service is shutting down")
    assert stream.rest().strip() == b"0"
    assert service.wait(30) == 0, service.log
    psutil.wait_procs([registry, *processes], timeout=10)
    assert not any(process.is_running() for process in (registry, *processes))
    assert "Traceback" not in service.log[before:]


def test_what_every_worker_would_refuse_is_said_once(
    service_process: Callable[..., Any], data_dir: Path, embeddings_only: Path
) -> None:
    broken = shutil.copytree(embeddings_only, data_dir / "broken")
    weights = load_file(broken / "model.safetensors")
    name = "quantizer.codebooks.0"
    save_file({**weights, name: weights[name] + 1}, broken / "model.safetensors")

    service = service_process(data_dir, checkpoint=broken, workers=WORKERS)

    assert service.wait(120) == 1
    assert service.log.count("cannot start") == 1
    assert service.log.count(str(broken)) == 1
    assert "Traceback" not in service.log
    service.stop()

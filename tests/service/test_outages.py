"""When the registry or the model is away, callers are told so, and nothing that was acknowledged is lost."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from service.errors import RegistryUnavailable
from service.registry.calls import Calls

MakeEmbedding = Callable[[int], list[float]]
UNAVAILABLE = "urn:semid:problem:registry_unavailable"


@pytest.fixture
def external(start_service: Callable[..., Any], valkey_process: Any, data_dir: Path) -> Iterator[Any]:
    """A service on a Valkey of its owner's."""
    running = start_service(redis_url=valkey_process.url, data_dir=data_dir, registry_timeout_ms=500)
    yield running
    running.stop()


@pytest.fixture
def embedded(start_service: Callable[..., Any], data_dir: Path) -> Iterator[Any]:
    """A service with its own Valkey."""
    running = start_service(data_dir=data_dir)
    yield running
    running.stop()


def ready(service: Any) -> bool:
    return service.http.get("/readyz").status_code == 200


def assert_unavailable(response: httpx.Response) -> None:
    assert response.status_code == 503, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["type"] == UNAVAILABLE
    assert int(response.headers["retry-after"]) >= 1


def assert_waits_for_the_registry(service: Any, new: dict[str, Any], semantic_id: str) -> None:
    assert_unavailable(service.post(new))
    assert_unavailable(service.post(new, assign=False))
    assert_unavailable(service.http.get(f"/item/{semantic_id}"))
    assert_unavailable(service.http.get("/assignment/known"))
    assert_unavailable(service.http.post("/lookup", json={"semantic_ids": [semantic_id]}))
    assert_unavailable(service.http.get("/readyz"))
    assert service.http.get("/healthz").status_code == 200
    assert service.http.get("/metrics").status_code == 200
    assert service.http.get("/tokenizers").status_code == 200


def test_a_registry_that_died_is_waited_for_and_found_again(
    external: Any, valkey_process: Any, make_embedding: MakeEmbedding
) -> None:
    known, new = ({"item_id": name, "embedding": make_embedding(1)} for name in ("known", "new"))
    (first,) = external.tokenize(known)

    valkey_process.kill()
    assert_waits_for_the_registry(external, new, first["semantic_id"])
    valkey_process.restart()
    external.until(lambda: ready(external), "the service does not find its registry again")

    again, created = external.tokenize(known, new)
    assert (again["semantic_id"], again["created"]) == (first["semantic_id"], False)
    assert (created["suffix"], created["created"]) == (1, True)


async def test_a_write_to_a_connection_that_was_just_closed_is_an_outage() -> None:
    calls = Calls(timeout_ms=100, retry_ms=50)
    calls.address = "there"

    async def write() -> None:
        raise RuntimeError("unable to perform operation on <TCPTransport closed=True>; the handler is closed")

    with pytest.raises(RegistryUnavailable, match="there cannot be reached"):
        await calls.call(write)


def test_a_registry_that_takes_no_writes_is_not_ready(
    external: Any, valkey_process: Any, make_embedding: MakeEmbedding, caplog: pytest.LogCaptureFixture
) -> None:
    item = {"item_id": "new", "embedding": make_embedding(1)}
    client = valkey_process.client()
    client.config_set("maxmemory", "1")

    for _ in range(2):
        assert_unavailable(external.http.get("/readyz"))
        assert_unavailable(external.post(item))
    client.config_set("maxmemory", "0")

    assert ready(external)
    external.tokenize(item)
    said = [record.message for record in caplog.records if "no memory left" in record.message]
    assert len(said) == 1


def test_a_registry_that_hangs_is_not_waited_for_without_end(
    external: Any, valkey_process: Any, make_embedding: MakeEmbedding
) -> None:
    known, new = ({"item_id": name, "embedding": make_embedding(1)} for name in ("known", "new"))
    (first,) = external.tokenize(known)

    os.kill(valkey_process.process.pid, signal.SIGSTOP)
    try:
        assert_waits_for_the_registry(external, new, first["semantic_id"])
    finally:
        os.kill(valkey_process.process.pid, signal.SIGCONT)
    external.until(lambda: ready(external), "the service does not find its registry again")

    # No reply of a call that was given up may reach a later one.
    again, created = external.tokenize(known, new)
    assert (again["item_id"], again["semantic_id"]) == ("known", first["semantic_id"])
    assert created["item_id"] == "new"
    assert created["suffix"] == 1
    assert external.http.get(f"/item/{created['semantic_id']}").json()["item_id"] == "new"


def test_the_services_own_registry_is_started_again_and_has_lost_nothing(
    embedded: Any, make_embedding: MakeEmbedding
) -> None:
    acknowledged: dict[str, str] = {}
    statuses: set[int] = set()
    enough = threading.Event()
    lock = threading.Lock()

    def feed(caller: int) -> None:
        with httpx.Client(base_url=embedded.http.base_url, timeout=30) as http:
            for i in range(10_000):
                if enough.is_set():
                    return
                item = {"item_id": f"{caller}-{i}", "embedding": make_embedding(i % 5)}
                response = http.post("/tokenize", json={"items": [item]})
                with lock:
                    statuses.add(response.status_code)
                    if response.status_code == 200:
                        (entry,) = response.json()["items"]
                        acknowledged[entry["item_id"]] = entry["semantic_id"]

    callers = [threading.Thread(target=feed, args=(caller,)) for caller in range(4)]
    for caller in callers:
        caller.start()
    try:
        for kill in range(3):
            goal = 40 * (kill + 1)
            embedded.until(lambda goal=goal: len(acknowledged) > goal, "the callers get no answers")
            with redis.Redis.from_url(embedded.redis_url) as client:
                pid = client.info("server")["process_id"]
            os.kill(pid, signal.SIGKILL)
            embedded.until(lambda: ready(embedded), "the service does not start its registry again")
        after = len(acknowledged)
        embedded.until(lambda: len(acknowledged) > after + 20, "the callers get no answers")
    finally:
        enough.set()
        for caller in callers:
            caller.join()

    assert statuses <= {200, 503}
    assert len(set(acknowledged.values())) == len(acknowledged)
    ids = list(acknowledged.values())
    for start in range(0, len(ids), 1000):
        asked = ids[start : start + 1000]
        found = embedded.http.post("/lookup", json={"semantic_ids": asked}).json()["items"]
        assert [acknowledged[entry["item_id"]] for entry in found] == asked
    for item_id in list(acknowledged)[::10]:
        assert embedded.http.get(f"/assignment/{item_id}").json()["semantic_id"] == acknowledged[item_id]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_model_is_not_called_alive(embedded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (known,) = embedded.tokenize({"item_id": "known", "text": "kettle"})

    def lost(*_: object, **_options: object) -> None:
        raise SystemExit("the model's thread dies")

    monkeypatch.setattr(embedded.batcher._encoder, "encode_texts", lost)

    dying = embedded.post({"item_id": "new", "text": "kettle"})
    embedded.until(lambda: not embedded.batcher.alive, "the thread does not end")
    late = embedded.post({"item_id": "new", "text": "kettle"})

    for response in (dying, late, embedded.http.get("/healthz"), embedded.http.get("/readyz")):
        assert response.status_code == 503
        assert response.json()["type"] == "urn:semid:problem:encoder_stopped"
        assert int(response.headers["retry-after"]) >= 1
    # What needs no model is still answered.
    assert embedded.tokenize({"item_id": "known", "text": "kettle"})[0]["semantic_id"] == known["semantic_id"]
    assert embedded.http.get(f"/item/{known['semantic_id']}").status_code == 200
    assert embedded.assigned().keys() == {"known"}

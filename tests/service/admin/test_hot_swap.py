"""Another tokenizer is loaded, made the default and unloaded, and no request is lost."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from fastapi.testclient import TestClient

from models import CheckpointError
from service.admin import hot_swap
from service.app import create_app
from service.errors import PlanUnreadable
from tests.service.admin.calls import copied, full, load, loaded, make_default, unload
from tests.topologies import wait_until

SERVICE_THREADS = 4
ROUNDS = 2


class Caller(threading.Thread):
    """Tokenizes without a pause; keeps every answer that is not what it has to be."""

    def __init__(self, service: Any, number: int, names: list[str | None], make_embedding: Any) -> None:
        super().__init__()
        self.answers: dict[tuple[str, str], str] = {}
        self.faults: list[str] = []
        self.turns = 0
        self.slowest_s = 0.0
        self.ended = threading.Event()
        self._http = httpx.Client(base_url=service.http.base_url, timeout=60)
        self._number = number
        self._names = names
        self._make_embedding = make_embedding

    def run(self) -> None:
        while not self.ended.is_set():
            turn = self.turns
            name = self._names[turn % len(self._names)]
            item = {
                "item_id": f"{self._number}-{turn}",
                "embedding": self._make_embedding(self._number * 100_000 + turn),
            }
            began = time.monotonic()
            response = self._http.post("/tokenize", json={"items": [item], "tokenizer": name})
            self.slowest_s = max(self.slowest_s, time.monotonic() - began)
            answer = response.json()
            if response.status_code != 200 or "error" in answer["items"][0]:
                self.faults.append(response.text)
            elif name is not None and answer["tokenizer"] != name:
                self.faults.append(f"{name} was named and {answer['tokenizer']} answered")
            else:
                self.answers[answer["tokenizer"], item["item_id"]] = answer["items"][0]["semantic_id"]
            self.turns += 1
        self._http.close()

    def take_every_name(self) -> None:
        """Return when each of the names was asked for since the call."""
        wanted = self.turns + 1 + len(self._names)  # the turn under way began before
        wait_until(lambda: self.turns >= wanted or not self.is_alive(), "a turn of each name")


def test_no_request_is_lost_while_a_tokenizer_comes_becomes_the_default_and_goes(
    start: Callable[..., Any], first: Path, second: Path, make_embedding: Any
) -> None:
    service = start()
    callers = [Caller(service, i, [None, full(first)], make_embedding) for i in range(SERVICE_THREADS)]
    for caller in callers:
        caller.start()

    for _ in range(ROUNDS):
        for call, of, default in (
            (load, second, first),
            (make_default, second, second),
            (make_default, first, first),
            (unload, second, first),
        ):
            response = call(service, of)
            assert response.status_code == 200, response.text
            assert response.json()["default"] == full(default)
            for caller in callers:
                caller.take_every_name()
    for caller in callers:
        caller.ended.set()
        caller.join()

    assert [caller.faults for caller in callers] == [[]] * SERVICE_THREADS
    assert load(service, second).status_code == 200
    answers = {key: given for caller in callers for key, given in caller.answers.items()}
    assert {tokenizer for tokenizer, _ in answers} == {full(first), full(second)}
    for tokenizer in (full(first), full(second)):
        items = {given: item_id for (of, item_id), given in answers.items() if of == tokenizer}
        some = list(items)[:64]
        found = service.http.post("/lookup", json={"semantic_ids": some, "tokenizer": tokenizer}).json()["items"]
        assert [each["item_id"] for each in found] == [items[given] for given in some]


def test_a_stream_under_way_ends_with_the_tokenizer_that_was_unloaded_and_then_its_model_stops(
    start: Callable[..., Any], first: Path, second: Path, make_embedding: Any
) -> None:
    service = start()
    assert load(service, second).json()["workers"] == 1
    batcher = service.state.tokenizers.named("second").batcher
    begun, unloaded = threading.Event(), threading.Event()

    def lines() -> Iterator[bytes]:
        for i in range(8):
            if i == 4:
                begun.set()
                assert unloaded.wait(30)
            yield orjson.dumps({"item_id": f"item-{i}", "embedding": make_embedding(i)}) + b"\n"

    with ThreadPoolExecutor(1) as pool:
        headers = {"content-type": "application/x-ndjson"}
        address = {"url": "/tokenize", "params": {"tokenizer": "second"}, "headers": headers}
        stream = pool.submit(lambda: service.http.post(**address, content=lines()))
        time.sleep(0.3)
        response = unload(service, second)
        alive = batcher.alive
        unloaded.set()
        answer = stream.result(60)

    assert response.status_code == 200
    assert alive
    entries = [orjson.loads(line) for line in answer.content.splitlines()]
    assert [entry["item_id"] for entry in entries if "semantic_id" in entry] == [f"item-{i}" for i in range(8)]
    assert answer.headers["semid-tokenizer"] == full(second)
    item = {"item_id": "late", "embedding": make_embedding(9)}
    assert service.post(item, tokenizer="second").json()["type"] == "urn:semid:problem:unknown_tokenizer"
    service.until(lambda: not batcher.alive, "the model stops once nobody has it")


def test_what_was_loaded_and_the_default_outlive_a_restart_until_the_settings_name_other_checkpoints(
    start: Callable[..., Any], first: Path, second: Path
) -> None:
    def since(service: Any) -> str | None:
        """When a call made the default tokenizer that."""
        found: str | None = service.http.get("/tokenizers").json()["default_since"]
        return found

    service = start()
    by_settings = since(service)
    assert load(service, second.name, default=True).json()["default"] == full(second)
    by_call = since(service)
    assert make_default(service, second).is_success  # which it is already
    assert unload(service, first).json()["loaded"] == [full(second)]
    service.stop()

    again = start()
    kept, kept_since = loaded(again), since(again)
    again.stop()
    with_both = start(further_checkpoints=(second,))
    anew = loaded(with_both)

    assert kept == [full(second)]
    assert kept_since == by_call is not None
    assert anew == [full(first), full(second)]
    assert since(with_both) is by_settings is None


def test_every_process_of_a_service_follows_and_one_that_cannot_undoes_it_for_all(
    start: Callable[..., Any], first: Path, second: Path
) -> None:
    service, beside = start(), start()
    done = load(service, second, default=True)
    assert (done.status_code, done.json()["workers"], done.json()["pending"]) == (200, 2, 0)
    assert loaded(beside) == [full(second), full(first)]
    assert make_default(beside, first).json()["default"] == full(first)
    assert unload(beside, second).status_code == 200
    assert loaded(service) == [full(first)]
    start(checkpoint_dirs=())  # may not load what the others may

    refused = load(service, second)

    assert refused.status_code == 503
    assert refused.json()["type"] == "urn:semid:problem:not_loaded_everywhere"
    assert "SID_CHECKPOINT_DIRS" in refused.json()["detail"]
    service.until(lambda: loaded(service) == loaded(beside) == [full(first)], "it is undone")


def test_replicas_on_one_registry_follow_together_by_one_data_directory_and_else_the_answer_says_so(
    start: Callable[..., Any], first: Path, second: Path, short_path: Path, shared_valkey: Any
) -> None:
    alone = start()
    service, beside = (start(redis_url=shared_valkey.url, data_dir=short_path / "one") for _ in range(2))
    elsewhere = start(redis_url=shared_valkey.url, data_dir=short_path / "another")

    told = load(service, second, default=True).json()

    assert told["workers"] == 2
    assert "plan of their own" in told["note"]
    assert loaded(beside) == loaded(service) == [full(second), full(first)]
    assert loaded(elsewhere) == [full(first)]
    assert load(alone, second).json()["note"] is None
    assert load(elsewhere, second, default=True).json()["workers"] == 1
    assert loaded(elsewhere) == loaded(service)


def test_the_answer_says_who_has_not_followed_in_time(
    start: Callable[..., Any], first: Path, second: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, beside = start(), start()
    assert load(service, second).status_code == 200
    monkeypatch.setattr(hot_swap, "WAIT_S", 0.2)
    beside.state.swap._following.cancel()  # as one that stands still

    late = make_default(service, second)

    assert (late.status_code, late.json()["workers"], late.json()["pending"]) == (202, 2, 1)
    beside.stop()
    assert make_default(service, first).status_code == 200


def test_of_two_calls_at_once_that_load_a_checkpoint_one_is_refused(start: Callable[..., Any], second: Path) -> None:
    service = start()

    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda _: load(service, second), range(2)))

    assert sorted(answer.status_code for answer in answers) == [200, 409]
    assert len(loaded(service)) == 2


@pytest.mark.parametrize("fault", ["the checkpoint has gone", "another lies there", "the file is broken"])
def test_a_plan_that_cannot_be_followed_at_start_is_refused_with_the_way_out(
    start: Callable[..., Any], first: Path, second: Path, tmp_path: Path, fault: str
) -> None:
    spring = copied(second, tmp_path / "spring")
    service = start(checkpoint_dirs=(tmp_path,))
    assert load(service, "spring", default=True).status_code == 200
    service.stop()
    plan = service.settings.data_dir / "tokenizers" / "plan.json"
    if fault == "the file is broken":
        plan.write_text(plan.read_text()[:-20])
    else:
        shutil.rmtree(spring)
    if fault == "another lies there":
        copied(first, spring)

    with (
        pytest.raises((CheckpointError, PlanUnreadable), match=r"move .*plan\.json away"),
        TestClient(create_app(service.settings)),
    ):
        pass
    plan.rename(plan.with_suffix(".away"))

    assert loaded(start(checkpoint_dirs=(tmp_path,))) == [full(first)]

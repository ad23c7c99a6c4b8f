"""Another tokenizer is loaded, made the default and unloaded, and no request is lost."""

from __future__ import annotations

import json
import pickle
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import httpx
import orjson
import pytest
from fastapi.testclient import TestClient
from safetensors.numpy import load_file, save_file

from models import CheckpointError, read_manifest
from models.checkpoint import MANIFEST, WEIGHTS
from service.access.keys import KeyFile, Scope
from service.admin import hot_swap
from service.app import create_app
from service.errors import PlanUnreadable

SERVICE_THREADS = 4
ROUNDS = 2


@pytest.fixture(scope="module")
def first(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("first", 16, 16, takes_text=False)


@pytest.fixture(scope="module")
def second(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("second", 8, 8, 8, seed=7, takes_text=False)


@pytest.fixture
def start(start_service: Callable[..., Any], data_dir: Path, first: Path, second: Path) -> Iterator[Callable[..., Any]]:
    """Starts a service on the first checkpoint, which may load the second."""
    started: list[Any] = []

    def begin(**settings: Any) -> Any:
        chosen = {"checkpoint": first, "checkpoint_dirs": (second.parent,), "data_dir": data_dir, **settings}
        started.append(start_service(**chosen))
        return started[-1]

    yield begin
    for service in started:
        if not service.http.is_closed:
            service.stop()


def full(checkpoint: Path) -> str:
    return read_manifest(checkpoint).full_name


def load(service: Any, checkpoint: Path | str, **members: Any) -> httpx.Response:
    return service.http.post("/admin/tokenizers", json={"checkpoint": str(checkpoint), **members})


def make_default(service: Any, checkpoint: Path, **members: Any) -> httpx.Response:
    return service.http.post(f"/admin/tokenizers/{full(checkpoint)}/default", json=members)


def unload(service: Any, checkpoint: Path) -> httpx.Response:
    return service.http.delete(f"/admin/tokenizers/{full(checkpoint)}")


def loaded(service: Any) -> list[str]:
    answer = service.http.get("/tokenizers").json()
    names = [each["tokenizer"] for each in answer["tokenizers"]]
    assert answer["default"] == names[0]
    return names


class Caller(threading.Thread):
    """Tokenizes without a pause; keeps every answer that is not what it has to be."""

    def __init__(self, service: Any, number: int, names: list[str | None], make_embedding: Any) -> None:
        super().__init__()
        self.answers: dict[tuple[str, str], str] = {}
        self.faults: list[str] = []
        self.slowest_s = 0.0
        self.ended = threading.Event()
        self._http = httpx.Client(base_url=service.http.base_url, timeout=60)
        self._number = number
        self._names = names
        self._make_embedding = make_embedding

    def run(self) -> None:
        turn = 0
        while not self.ended.is_set():
            turn += 1
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
        self._http.close()


def test_no_request_is_lost_while_a_tokenizer_comes_becomes_the_default_and_goes(
    start: Callable[..., Any], first: Path, second: Path, make_embedding: Any
) -> None:
    service = start()
    callers = [Caller(service, i, [None, full(first)], make_embedding) for i in range(SERVICE_THREADS)]
    for caller in callers:
        caller.start()

    for _ in range(ROUNDS):
        for response, default in (
            (load(service, second), first),
            (make_default(service, second), second),
            (make_default(service, first), first),
            (unload(service, second), first),
        ):
            assert response.status_code == 200, response.text
            assert response.json()["default"] == full(default)
            time.sleep(0.1)
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
    service = start()
    assert load(service, second.name, default=True).json()["default"] == full(second)
    assert unload(service, first).json()["loaded"] == [full(second)]
    service.stop()

    again = start()
    kept = loaded(again)
    again.stop()
    with_both = start(further_checkpoints=(second,))
    anew = loaded(with_both)

    assert kept == [full(second)]
    assert anew == [full(first), full(second)]


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
    spring = _copy(second, tmp_path / "spring")
    service = start(checkpoint_dirs=(tmp_path,))
    assert load(service, "spring", default=True).status_code == 200
    service.stop()
    plan = service.settings.data_dir / "tokenizers" / "plan.json"
    if fault == "the file is broken":
        plan.write_text(plan.read_text()[:-20])
    else:
        shutil.rmtree(spring)
    if fault == "another lies there":
        _copy(first, spring)

    with (
        pytest.raises((CheckpointError, PlanUnreadable), match=r"move .*plan\.json away"),
        TestClient(create_app(service.settings)),
    ):
        pass
    plan.rename(plan.with_suffix(".away"))

    assert loaded(start(checkpoint_dirs=(tmp_path,))) == [full(first)]


def _copy(checkpoint: Path, to: Path) -> Path:
    shutil.copytree(checkpoint, to)
    return to


def _tampered(checkpoint: Path, to: Path) -> Path:
    weights = load_file(_copy(checkpoint, to) / WEIGHTS)
    name = next(name for name in weights if "codebook" in name)
    weights[name] = weights[name] + 1e-3
    save_file(weights, to / WEIGHTS)
    return to


def _of_other_dimension(checkpoint: Path, to: Path) -> Path:
    manifest = json.loads((_copy(checkpoint, to) / MANIFEST).read_text())
    manifest["widths"][0] = 100
    (to / MANIFEST).write_text(json.dumps(manifest))
    return to


def _pickled(checkpoint: Path, to: Path) -> Path:
    (_copy(checkpoint, to) / WEIGHTS).write_bytes(pickle.dumps({"network": Bomb()}))
    return to


def _pickled_beside(checkpoint: Path, to: Path) -> Path:
    (_copy(checkpoint, to) / WEIGHTS).rename(to / "pytorch_model.bin")
    return to


def _linked_out(checkpoint: Path, to: Path) -> Path:
    to.symlink_to(checkpoint)
    return to


def _weights_linked_out(checkpoint: Path, to: Path) -> Path:
    (_copy(checkpoint, to) / WEIGHTS).unlink()
    (to / WEIGHTS).symlink_to(checkpoint / WEIGHTS)
    return to


def _through_dots(checkpoint: Path, to: Path) -> Path:
    return to.parent / ".." / checkpoint.parent.name / checkpoint.name


class Bomb:
    """Leaves a mark where it is unpickled."""

    def __reduce__(self) -> Any:
        return (open, ("/tmp/semid-unpickled", "w"))


FAULTS = {
    "weights that are not what was frozen": (_tampered, "checkpoint_refused", "quantizer"),
    "weights of another shape than the manifest says": (_of_other_dimension, "checkpoint_refused", "cannot be loaded"),
    "a pickle in the place of the weights": (_pickled, "checkpoint_refused", "cannot be loaded"),
    "a pickle beside": (_pickled_beside, "checkpoint_refused", "pickled is never loaded"),
    "a link that leads out": (_linked_out, "checkpoint_refused", "no directory"),
    "weights linked from elsewhere": (_weights_linked_out, "checkpoint_refused", "no plain file"),
    "dots that lead out": (_through_dots, "checkpoint_refused", "'..'"),
    "an absolute path elsewhere": (lambda checkpoint, _: checkpoint, "checkpoint_refused", "no directory"),
    "a file that is no checkpoint": (lambda *_: Path("/etc/passwd"), "checkpoint_refused", "no directory"),
    "the root itself": (lambda _, to: to.parent, "checkpoint_refused", "no directory"),
    "a character that no path has": (lambda *_: "a\0b", "checkpoint_refused", "no path"),
    "a path without end": (lambda *_: "a/" * 2000, "checkpoint_refused", "no"),
}


@pytest.fixture(scope="module")
def guarded(
    start_service: Callable[..., Any], first: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Any, Path]]:
    """A service, and the directory that it may load from."""
    root = tmp_path_factory.mktemp("root")
    directory = Path(tempfile.mkdtemp(prefix="semid-"))
    service = start_service(checkpoint=first, checkpoint_dirs=(root,), data_dir=directory, max_tokenizers=2)
    yield service, root
    service.stop()
    shutil.rmtree(directory, ignore_errors=True)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_checkpoint_is_refused_in_words_and_changes_nothing(
    guarded: tuple[Any, Path], second: Path, fault: str
) -> None:
    (service, root), before = guarded, loaded(guarded[0])
    make, slug, words = FAULTS[fault]
    plan = service.state.swap._plans.look()

    response = load(service, make(second, root / fault.replace(" ", "-")))

    assert response.status_code == 422, response.text
    assert response.json()["type"] == f"urn:semid:problem:{slug}"
    assert words in response.json()["detail"]
    assert loaded(service) == before
    assert service.state.swap._plans.look() == plan
    assert not Path("/tmp/semid-unpickled").exists()


def test_what_does_not_go_with_what_is_loaded_is_refused_unless_somebody_insists(
    guarded: tuple[Any, Path], first: Path, second: Path, make_checkpoint: Callable[..., Path]
) -> None:
    service, root = guarded
    _copy(second, root / "second")
    _copy(make_checkpoint("first", 8, 8, seed=11, takes_text=False), root / "namesake")

    def refusal(response: httpx.Response) -> str:
        assert response.headers["content-type"] == "application/problem+json"
        return response.json()["type"].rpartition(":")[2]

    assert refusal(load(service, _copy(first, root / "twice"))) == "tokenizer_loaded_twice"
    assert refusal(load(service, "namesake")) == "tokenizer_name_taken"
    assert refusal(unload(service, first)) == "tokenizer_is_default"
    assert refusal(unload(service, second)) == "unknown_tokenizer"
    assert load(service, "namesake", force=True).status_code == 200
    assert refusal(load(service, "second")) == "too_many_tokenizers"
    assert refusal(service.http.delete("/admin/tokenizers/first")) == "ambiguous_tokenizer"
    assert unload(service, root / "namesake").status_code == 200


def test_a_default_that_takes_no_texts_is_refused_where_callers_may_send_them(service: Any, second: Path) -> None:
    before = loaded(service)

    refused = load(service, second, default=True)

    assert refused.status_code == 409
    assert refused.json()["type"] == "urn:semid:problem:takes_other_content"
    assert "texts" in refused.json()["detail"]
    assert loaded(service) == before


def test_a_default_of_another_dimension_is_refused_unless_somebody_insists(
    guarded: tuple[Any, Path], first: Path, make_checkpoint: Callable[..., Path]
) -> None:
    service, root = guarded
    narrow = _copy(make_checkpoint("narrow", 8, 8, takes_text=False, dimension=32), root / "narrow")

    refused = load(service, narrow, default=True)
    assert "embeddings of 384 numbers" in refused.json()["detail"]
    assert len(loaded(service)) == 1
    assert load(service, narrow).status_code == 200
    assert make_default(service, narrow).json() == refused.json() | {"request_id": ANY}
    assert make_default(service, narrow, force=True).json()["default"] == full(narrow)
    assert make_default(service, first, force=True).json()["default"] == full(first)
    assert unload(service, narrow).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "rebound.example:8000"},
        {"host": "127.0.0.1:8000", "origin": "https://elsewhere.example"},
        {"host": "127.0.0.1:8000", "origin": "null"},
        {"host": "127.0.0.1:8000", "x-forwarded-for": "198.51.100.7"},
    ],
)
def test_without_keys_nobody_may_who_could_be_a_page_or_come_from_elsewhere(
    guarded: tuple[Any, Path], first: Path, headers: dict[str, str]
) -> None:
    response = guarded[0].http.post(f"/admin/tokenizers/{full(first)}/default", headers=headers)

    assert response.status_code == 403
    assert response.json()["type"] == "urn:semid:problem:admin_closed"


def test_beyond_loopback_an_admin_key_is_needed(
    start: Callable[..., Any], first: Path, second: Path, data_dir: Path
) -> None:
    open_to_all = start(host="0.0.0.0")
    file, secrets = KeyFile(), {}
    for scope in Scope:
        file, secrets[scope] = file.with_new(scope, scope)
    file.write(data_dir / "keys.json")
    with_keys = start(host="0.0.0.0", keys_file=data_dir / "keys.json")

    refused = load(open_to_all, second)
    statuses = {}
    for scope, secret in secrets.items():
        with_keys.http.headers["authorization"] = f"Bearer {secret}"
        statuses[scope] = make_default(with_keys, first).status_code

    assert refused.status_code == 403
    assert "SID_KEYS_FILE" in refused.json()["detail"]
    assert statuses == {Scope.READ: 403, Scope.TOKENIZE: 403, Scope.ADMIN: 200}

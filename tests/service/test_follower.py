"""A decoder's trie follows the record, through churn, outages and gaps."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from models import DEFAULT_CHECKPOINT, Trie
from service.decoding.change_tensors import as_tensors
from service.follower import Follower, FollowerError, ServiceAway
from service.semantic_id import SemanticId
from service.settings import Settings

MakeEmbedding = Callable[[int], list[float]]
README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
CHURN_S = float(os.environ.get("SID_CHURN_S", "5"))  # an hour before a release: make churn
ROUND_S = 1.0


class Road:
    """A TCP port whose other end can be a service, another one, or nothing."""

    def __init__(self) -> None:
        self._listener: socket.socket | None = None
        self._open: set[socket.socket] = set()
        self._port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def lead_to(self, address: tuple[str, int]) -> None:
        """Listen, on the same port each time."""
        self.close()
        self._listener = socket.create_server(("127.0.0.1", self._port))
        self._port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener, address), daemon=True).start()

    def close(self) -> None:
        """Refuse new connections and break the old ones."""
        for end in [*([self._listener] if self._listener else []), *self._open]:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self._open.clear()
        self._listener = None

    def _accept(self, listener: socket.socket, address: tuple[str, int]) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection(address)
                self._open |= {near, far}
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=self._carry, args=(one, other), daemon=True).start()

    def _carry(self, one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(65536):
                other.sendall(data)
        with contextlib.suppress(OSError):
            other.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def road(service: Any) -> Iterator[Road]:
    """Leads to the shared service at first."""
    road = Road()
    road.lead_to(service.address)
    yield road
    road.close()


def assign(service: Any, namespace: str, make_embedding: MakeEmbedding, *items: int, **options: Any) -> None:
    entries = [{"item_id": f"item {i}", "embedding": make_embedding(i)} for i in items]
    service.tokenize(*entries, namespace=namespace, **options)


def fresh(service: Any, namespace: str) -> Trie:
    return Trie.from_bytes(service.http.get("/trie", params={"namespace": namespace}).content)


def until_equal(follower: Follower, service: Any, namespace: str) -> None:
    """Wait for the follower to be where the record is: it is then what a fresh snapshot is, byte for byte."""
    snapshot = fresh(service, namespace)
    service.until(lambda: follower.revision >= snapshot.revision, "the follower does not arrive")
    assert follower.trie.to_bytes() == snapshot.to_bytes()


def url_of(service: Any) -> str:
    return str(service.http.base_url)


def test_a_follower_holds_what_the_record_does(service: Any, namespace: str, make_embedding: MakeEmbedding) -> None:
    assign(service, namespace, make_embedding, *range(20))
    with Follower(url_of(service), namespace=namespace, wait_s=0.5) as follower:
        first = follower.trie
        taken = first.to_bytes()

        service.http.delete("/assignment/item 3", params={"namespace": namespace})
        moved = {"item_id": "item 4", "embedding": make_embedding(99)}
        service.tokenize(moved, namespace=namespace, on_change="reassign")
        assign(service, namespace, make_embedding, 3, 77)

        until_equal(follower, service, namespace)
        assert follower.revision > first.revision == 20
        assert first.to_bytes() == taken


def test_a_namespace_without_items_is_followed_from_its_first(
    service: Any, namespace: str, make_embedding: MakeEmbedding
) -> None:
    with Follower(url_of(service), namespace=namespace, wait_s=0.5) as follower:
        assert (follower.revision, follower.trie.suffixes) == (0, 0)
        assign(service, namespace, make_embedding, 1)

        until_equal(follower, service, namespace)
        assert follower.revision == 1


def test_a_trie_of_another_epoch_is_taken_anew(service: Any, namespace: str, make_embedding: MakeEmbedding) -> None:
    assign(service, namespace, make_embedding, 1, 2)
    with Follower(url_of(service), namespace=namespace, interval_s=60) as follower:
        before = follower.trie
        follower._epoch = "another"  # as after an operator accepted an older registry

        after = follower.advance()

        assert after is not before
        assert after.to_bytes() == before.to_bytes()
        assert follower.advance() is after


def test_a_change_is_waited_for_and_not_polled(service: Any, namespace: str, make_embedding: MakeEmbedding) -> None:
    follower = Follower(url_of(service), namespace=namespace, wait_s=0.5)
    before = follower.advance()
    later = threading.Timer(0.5, assign, (service, namespace, make_embedding, 1))
    later.start()

    began = time.monotonic()
    after = follower.advance(wait_s=20.0)
    took_s = time.monotonic() - began
    later.join()

    assert follower.advance(wait_s=0.0) is after
    assert (before.revision, after.revision) == (0, 1)
    assert 0.4 < took_s < 10
    follower.stop()


def test_a_follower_that_was_away_too_long_takes_a_new_trie(
    start_service: Callable[..., Any], data_dir: Path, make_embedding: MakeEmbedding
) -> None:
    forgetful = start_service(data_dir=data_dir, changes_kept=0)
    follower = Follower(url_of(forgetful))
    follower.advance()
    for item in range(250):  # the log forgets whole pages of a hundred entries
        assign(forgetful, "default", make_embedding, item)
    answer = forgetful.http.get("/changes", params={"after": 0})

    trie = follower.advance()

    assert answer.status_code == 410
    assert trie.revision == 250
    assert trie.to_bytes() == fresh(forgetful, "default").to_bytes()
    follower.stop()
    forgetful.stop()


def test_a_record_that_is_not_as_far_as_the_follower_is_taken_anew(
    road: Road, service: Any, start_service: Callable[..., Any], data_dir: Path, make_embedding: MakeEmbedding
) -> None:
    namespace = "older"
    assign(service, namespace, make_embedding, 1, 2, 3)
    older = start_service(data_dir=data_dir)
    assign(older, namespace, make_embedding, 2)
    follower = Follower(road.url, namespace=namespace)
    before = follower.advance()

    road.lead_to(older.address)
    with contextlib.suppress(ServiceAway):  # where the break of the old connection is noticed too late
        follower.advance()
    after = follower.advance()
    follower.stop()

    assert (before.revision, after.revision) == (3, 1)
    assert after.to_bytes() == fresh(older, namespace).to_bytes()
    older.stop()


def test_a_service_that_is_down_for_a_while_is_waited_for(
    road: Road, service: Any, namespace: str, make_embedding: MakeEmbedding
) -> None:
    assign(service, namespace, make_embedding, 1, 2)
    with Follower(road.url, namespace=namespace, wait_s=1.0) as follower:
        road.close()
        held = follower.trie
        assign(service, namespace, make_embedding, 3)
        service.until(lambda: follower.silent_s > 2.0, "the follower hears of a service that it cannot reach")
        assert follower.trie is held

        road.lead_to(service.address)

        until_equal(follower, service, namespace)
        service.until(lambda: follower.silent_s < 2.0, "the follower hears of the service again")


def test_a_registry_that_is_down_for_a_while_is_waited_for(
    start_service: Callable[..., Any], data_dir: Path, valkey_process: Any, make_embedding: MakeEmbedding
) -> None:
    running = start_service(redis_url=valkey_process.url, data_dir=data_dir, registry_timeout_ms=300)
    assign(running, "default", make_embedding, 1)
    follower = Follower(url_of(running))
    held = follower.advance()
    valkey_process.kill()

    with pytest.raises(ServiceAway, match="503") as away:
        follower.advance()
    valkey_process.restart()
    running.until(lambda: running.http.get("/readyz").status_code == 200, "the service does not recover")

    assert away.value.retry_after_s >= 1
    assert follower.advance() is held
    follower.stop()
    running.stop()


def test_a_service_that_is_not_there_at_the_start_is_waited_for_or_given_up(
    road: Road, service: Any, namespace: str
) -> None:
    road.close()

    unreachable = Follower(road.url, namespace=namespace)
    with pytest.raises(ServiceAway, match="ConnectError"):
        unreachable.start(patience_s=0.3)
    unreachable.stop()
    later = threading.Timer(0.5, road.lead_to, (service.address,))
    later.start()
    with Follower(road.url, namespace=namespace) as follower:
        assert follower.revision == 0


@pytest.fixture
def running_other(service: Any, data_dir: Path) -> Iterator[Any]:
    """A service of another tokenizer, the shipped one."""
    other = type(service)(Settings(checkpoint=DEFAULT_CHECKPOINT, device="cpu", data_dir=data_dir))
    yield other
    other.stop()


def test_another_tokenizer_behind_the_address_is_an_error_and_the_old_trie_is_not_handed_out(
    road: Road, service: Any, running_other: Any, namespace: str
) -> None:
    with pytest.raises(FollowerError, match="not loaded"), Follower(road.url, tokenizer="nobody's"):
        pass
    # By its name alone as well: the fingerprint of the start is what counts.
    named = str(service.http.get("/tokenizers").json()["default"]).partition("@")[0]
    with Follower(road.url, namespace=namespace, tokenizer=named, wait_s=0.2) as follower:
        assert follower.revision == 0
        assert follower._tokenizer == service.http.get("/tokenizers").json()["default"]

        road.lead_to(running_other.address)

        service.until(lambda: not follower._thread.is_alive(), "the follower goes on")
        with pytest.raises(FollowerError, match="not loaded"):
            _ = follower.trie


def test_a_follower_stops_and_keeps_its_trie(service: Any, namespace: str, make_embedding: MakeEmbedding) -> None:
    follower = Follower(url_of(service), namespace=namespace, wait_s=1.0)
    with pytest.raises(FollowerError, match="no trie yet"):
        _ = follower.trie
    follower.start()
    threads = {thread.name for thread in threading.enumerate()}
    began = time.monotonic()

    follower.stop()

    assert time.monotonic() - began < 10
    assert "semid-follower" in threads
    assert "semid-follower" not in {thread.name for thread in threading.enumerate()}
    assert follower.revision == 0
    assign(service, namespace, make_embedding, 1)
    assert follower.revision == 0


def test_changes_become_tensors_in_their_order_and_unknown_ones_are_refused() -> None:
    one, two = SemanticId((1, 2), 0), SemanticId((0, 2), 7)

    ids, live = as_tensors([("assigned", one), ("retired", one), ("returned", two), ("replaced", two)], 2)
    none = as_tensors([], 2)

    assert ids.tolist() == [[1, 2, 0], [1, 2, 0], [0, 2, 7], [0, 2, 7]]
    assert live.tolist() == [True, False, True, False]
    assert (none.semantic_ids.shape, none.live.dtype) == ((0, 3), torch.bool)
    with pytest.raises(ValueError, match="unknown kind: moved"):
        as_tensors([("assigned", one), ("moved", two)], 2)


def test_the_readme_constrains_a_generator(
    start_service: Callable[..., Any], data_dir: Path, make_embedding: MakeEmbedding
) -> None:
    running = start_service(data_dir=data_dir)
    assign(running, "default", make_embedding, *range(40))
    words = ["<pad>", "</s>", *(f"<{letter}_{n}>" for letter in "abcd" for n in range(16))]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, "<pad>")), eos_token="</s>"
    )
    config = T5Config(
        vocab_size=len(words), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    code = README.split("## Constrain a generator")[1].split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {"model": T5ForConditionalGeneration(config).eval(), "tokenizer": tokenizer}

    exec(code.replace("http://127.0.0.1:8000", url_of(running)), names)
    ids = names["recommend"](input_ids=torch.tensor([[5, 6, 7], [8, 9, 10]]))
    gone = ids[0].tolist()
    held = running.http.get(f"/item/{'-'.join(map(str, gone))}").json()["item_id"]
    running.http.delete(f"/assignment/{held}")
    running.until(lambda: names["follower"].revision == 41, "the follower does not hear of it")
    later = names["recommend"](input_ids=torch.tensor([[5, 6, 7], [8, 9, 10]]))
    names["follower"].stop()
    running.stop()

    assert ids.shape == later.shape == (20, 4)
    assert len(ids[:10].unique(dim=0)) == 10
    assert gone not in later.tolist()
    assert names["follower"].trie.holds(later).all()
    assert len(code.strip().splitlines()) <= 15


# Churn ---------------------------------------------------------------------------------------------------------------


class Writer(threading.Thread):
    """Assigns, retires, lets return and reassigns at random, over HTTP, until it is told to pause."""

    def __init__(self, service: Any, namespace: str, make_embedding: MakeEmbedding, seed: int) -> None:
        super().__init__(daemon=True)
        self._service = service
        self._namespace = namespace
        self._make_embedding = make_embedding
        self._draw = random.Random(seed)
        self.busy = threading.Event()
        self.idle = threading.Event()
        self.ended = False
        self.kinds: dict[str, int] = {}

    def run(self) -> None:
        while not self.ended:
            if not self.busy.wait(0.05):
                self.idle.set()
                continue
            self.idle.clear()
            items = self._draw.sample(range(400), self._draw.randrange(1, 16))
            if self._draw.random() < 0.4:
                for item in items:
                    self._service.http.delete(f"/assignment/item {item}", params={"namespace": self._namespace})
            else:
                entries = [
                    {"item_id": f"item {item}", "embedding": self._make_embedding(self._draw.randrange(200))}
                    for item in items
                ]
                on_change = self._draw.choice(["reassign", "keep"])
                self._service.tokenize(*entries, namespace=self._namespace, on_change=on_change)

    def pause(self) -> None:
        self.busy.clear()
        assert self.idle.wait(60)


def test_a_decoder_that_follows_through_churn_holds_the_trie_of_a_fresh_snapshot(
    service: Any, namespace: str, make_embedding: MakeEmbedding, capsys: pytest.CaptureFixture[str]
) -> None:
    writers = [Writer(service, namespace, make_embedding, seed) for seed in range(2)]
    kinds: Counter[str] = Counter()
    rounds = tries = 0
    with Follower(url_of(service), namespace=namespace, wait_s=0.5, interval_s=0.02) as follower:
        for writer in writers:
            writer.start()
        deadline = time.monotonic() + CHURN_S
        while time.monotonic() < deadline or (len(kinds) < 4 and time.monotonic() < deadline + 60):  # a busy machine
            for writer in writers:
                writer.busy.set()
            round_ends = time.monotonic() + ROUND_S
            seen = {follower.trie}
            while time.monotonic() < round_ends:
                time.sleep(0.01)
                seen.add(follower.trie)
            for writer in writers:
                writer.pause()
            until_equal(follower, service, namespace)
            rounds += 1
            tries += len(seen)
            revision = follower.revision
            latest = {"after": max(0, revision - 1000), "limit": 1000, "namespace": namespace}
            kinds = Counter(each["change"] for each in service.http.get("/changes", params=latest).json()["changes"])
    for writer in writers:
        writer.ended = True
        writer.join()
    with capsys.disabled():
        found = f"{revision} changes, {tries} tries followed, {rounds} compared; {dict(kinds)}"
        print(f"\nChurn of {CHURN_S:.0f} s: {found}")
    assert tries > 2 * rounds
    assert kinds.keys() == {"assigned", "returned", "retired", "replaced"}

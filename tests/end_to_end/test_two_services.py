"""Two services on one Valkey, sixteen callers, and one service killed on the way."""

from __future__ import annotations

import base64
import os
import random
import secrets
import threading
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest

CALLERS = 16
REQUESTS = 40
ITEMS = 600
CONTENTS = 30
KILL_AFTER = 200  # requests, of CALLERS * REQUESTS


def content(number: int) -> str:
    return base64.b64encode(np.random.default_rng(number).standard_normal(384).astype("<f4").tobytes()).decode()


class Callers:
    """Sixteen threads that post overlapping batches of colliding items, and retry on the other service."""

    def __init__(self, services: list[Any], seed: int) -> None:
        self._urls = [str(service.http.base_url) for service in services]
        self._seed = seed
        self._contents = [content(number) for number in range(CONTENTS)]
        self._lock = threading.Lock()
        self.acknowledged: list[dict[str, Any]] = []
        self.requests = 0
        self.retries = 0
        self.faults: list[str] = []

    def items(self, numbers: list[int]) -> list[dict[str, str]]:
        return [{"item_id": f"item {i}", "embedding": self._contents[i % CONTENTS]} for i in numbers]

    def run(self, caller: int) -> None:
        """One caller's requests."""
        chance = random.Random(f"{self._seed}-{caller}")
        clients = [httpx.Client(base_url=url, timeout=30) for url in self._urls]
        for _request in range(REQUESTS):
            items = self.items(chance.sample(range(ITEMS), chance.randint(1, 24)))
            self._post(clients, chance.randrange(len(clients)), items)
        for client in clients:
            client.close()

    def _post(self, clients: list[httpx.Client], first: int, items: list[dict[str, str]]) -> None:
        for attempt in range(20):
            try:
                response = clients[(first + attempt) % len(clients)].post("/tokenize", json={"items": items})
            except httpx.TransportError:
                status = "no answer"
            else:
                if response.status_code == 200:
                    with self._lock:
                        self.requests += 1
                        self.acknowledged += response.json()["items"]
                    return
                status = str(response.status_code)
            with self._lock:
                self.retries += 1
            if status not in {"no answer", "429", "503"}:
                break
        with self._lock:
            self.faults.append(status)


def test_sixteen_callers_of_two_services_lose_and_double_nothing_when_one_is_killed(
    start_process: Callable[..., Any], valkey_process: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    seed = int(os.environ.get("SEMID_SEED") or secrets.randbits(32))
    services = [start_process(redis_url=valkey_process.url) for _service in range(2)]
    for service in services:
        service.wait_until_ready()
    callers = Callers(services, seed)
    threads = [threading.Thread(target=callers.run, args=(caller,)) for caller in range(CALLERS)]

    for thread in threads:
        thread.start()
    while callers.requests < KILL_AFTER and any(thread.is_alive() for thread in threads):
        threads[0].join(0.01)
    services[0].kill()
    killed_at = callers.requests
    for thread in threads:
        thread.join()

    with capsys.disabled():
        print(
            f"\nTwo services (SEMID_SEED={seed}): {callers.requests} requests and {len(callers.acknowledged)} items "
            f"acknowledged, one service killed after {killed_at}, {callers.retries} retries"
        )
    survivor = services[1].http
    assert callers.faults == []
    assert callers.requests == CALLERS * REQUESTS
    assert killed_at < callers.requests
    assert callers.retries > 0

    # Every acknowledgement of an item says the same ID, and at most one says that it was made.
    held: dict[str, str] = {}
    created: dict[str, int] = defaultdict(int)
    for entry in callers.acknowledged:
        assert held.setdefault(entry["item_id"], entry["semantic_id"]) == entry["semantic_id"]
        created[entry["item_id"]] += entry["created"]
    assert len(set(held.values())) == len(held)
    assert max(created.values()) == 1

    # All of it is still there, forward and reverse.
    found = survivor.post("/lookup", json={"semantic_ids": list(held.values())}).json()["items"]
    assert [entry["item_id"] for entry in found] == list(held)
    for item_id, semantic_id in held.items():
        assert survivor.get(f"/assignment/{item_id}").json()["semantic_id"] == semantic_id

    # Suffixes run 0..n-1 over everything that was assigned, acknowledged or not.
    everything = survivor.post("/tokenize", json={"items": callers.items(list(range(ITEMS)))}).json()["items"]
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for entry in everything:
        assert held.get(entry["item_id"], entry["semantic_id"]) == entry["semantic_id"]
        assert not (entry["created"] and entry["item_id"] in held)
        groups[tuple(entry["codes"])].append(entry["suffix"])
    assert len(groups) <= CONTENTS
    assert all(sorted(suffixes) == list(range(len(suffixes))) for suffixes in groups.values())

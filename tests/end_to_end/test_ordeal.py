"""Many items through the clients, against a service that is killed, restarted, overloaded and cut off on the way.

A third goes through the asynchronous client, a third as Arrow through the synchronous one, a third through
`semid tokenize`, which is killed, too. Then every row is answered exactly once, by the ID that the service holds.

    make ordeal                 100,000 items; minutes
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from service.client import AsyncTokenizerClient, TokenizedItem, TokenizerClient, Waiting
from tests.chaos.proxy import Network, Proxy
from tests.chaos.servers import ROOT, SEMID, Service
from tests.conftest import DIMENSION

BEAUTY = Path(__file__).parents[3] / "shared" / "data" / "amazon_beauty_2014" / "items.parquet"
ITEMS = int(os.environ.get("SID_ORDEAL_ITEMS", "1800"))
FULL = ITEMS > 10_000
STEPS = 10 if FULL else 1  # restarts; each is waited for by the sources, so that work is left for all of them
LIMITS = {"inflight_bytes": 2 * 2**20, "max_body_bytes": 2**19, "queue_tokens": 8192, "batch_tokens": 4096}
PATIENCE_S = 300.0
NAMESPACE = "ordeal"


def embeddings() -> np.ndarray[Any, Any]:
    """(ITEMS, D) float32: of the words of real titles; a title that comes again has another nudge."""
    if not BEAUTY.is_file():
        assert "CI" not in os.environ, f"the catalogue is missing: {BEAUTY}"
        pytest.skip(f"the catalogue is missing: {BEAUTY}")
    titles = pq.read_table(BEAUTY, columns=["title"])["title"].to_pylist()[:ITEMS]
    words: dict[str, Any] = {}
    rows = np.zeros((len(titles), DIMENSION), np.float32)
    for number, title in enumerate(titles):
        for word in re.findall(r"\w+", (title or "untitled").lower()) or ["untitled"]:
            if word not in words:
                words[word] = np.random.default_rng(zlib.crc32(word.encode())).standard_normal(DIMENSION)
            rows[number] += words[word]
    rows = rows[np.arange(ITEMS) % len(rows)]
    rows += 0.3 * np.random.default_rng(0).standard_normal(rows.shape, np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


class Gates:
    """What a source waits for: of each part of its rows, the step before it."""

    def __init__(self) -> None:
        self.done = 0
        self.reached = [0.0, 0.0]
        self._changed = threading.Condition()

    def pass_(self, source: int, share: float) -> None:
        """Wait at this share of a source's rows."""
        with self._changed:
            self.reached[source] = share
            self._changed.notify_all()
            self._changed.wait_for(lambda: share * (STEPS + 1) < self.done + 1)

    def wait_for_work(self, step: int) -> None:
        """Wait until every source is in the part before this step's end."""
        with self._changed:
            self._changed.wait_for(lambda: min(self.reached) * (STEPS + 1) >= step + 0.3, PATIENCE_S)

    def open(self) -> None:
        """A step is done."""
        with self._changed:
            self.done += 1
            self._changed.notify_all()


def gated(gates: Gates, source: int, values: list[Any]) -> Iterator[Any]:
    for number, value in enumerate(values):
        gates.pass_(source, number / len(values))
        yield value


class Command:
    """`semid tokenize`, started again whenever it was killed; it is killed, too, whenever it has kept one part more."""

    def __init__(self, file: Path, out: Path, url: str) -> None:
        self.kills = 0
        self.log = out.with_suffix(".log")
        words = ["--out", out, "--url", url, "--namespace", NAMESPACE, "--patience", PATIENCE_S]
        self._command = [*SEMID, "tokenize", file, *words]
        self._process: subprocess.Popen[bytes] | None = None
        self._journal = out.with_name(f".{out.name}.run")

    def run(self) -> int:
        """Its exit code, once it was not killed."""
        while True:
            with self.log.open("ab") as log:
                command = [str(word) for word in self._command]
                self._process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
            kept = self._parts()
            while self._process.poll() is None:
                if self._parts() > kept:
                    self.kill()
                time.sleep(0.01)
            code = self._process.wait()
            if code != -signal.SIGKILL:
                return code

    def _parts(self) -> int:
        return len(list(self._journal.glob("*.arrow")))

    def kill(self) -> None:
        """At whatever it is."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self.kills += 1


def restart(service: Service, ending: signal.Signals) -> None:
    service.kill(ending)
    while service.alive:
        time.sleep(0.02)
    service.start()
    service.wait_until_ready()


@pytest.fixture
def directory() -> Iterator[Path]:
    """With a path short enough for a unix socket in it."""
    path = Path(tempfile.mkdtemp(prefix="semid-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def service(directory: Path, make_checkpoint: Callable[..., Path]) -> Iterator[Service]:
    checkpoint = make_checkpoint("ordeal", 64, 64, 64, takes_text=False)
    running = Service(directory, "service", checkpoint=checkpoint, **LIMITS)
    running.start()
    running.wait_until_ready()
    yield running
    running.stop()


@pytest.fixture
def road(service: Service) -> Iterator[Proxy]:
    """To the service; cut now and then for as long as the test lasts."""
    network, over = Network(), threading.Event()
    proxy = Proxy(network, service.port, "ordeal")
    proxy.cuts = 0  # type: ignore[attr-defined]

    def cut() -> None:
        while not over.wait(1.0 if FULL else 0.3):
            proxy.cut()
            proxy.cuts += 1  # type: ignore[attr-defined]

    cutting = threading.Thread(target=cut)
    cutting.start()
    yield proxy
    over.set()
    cutting.join()
    network.close()


def test_every_item_is_answered_once_through_restarts_overload_and_cuts(
    service: Service, road: Proxy, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # given
    began = time.monotonic()
    matrix = embeddings()
    ids = [f"item-{number}" for number in range(ITEMS)]
    thirds = [range(start, ITEMS, 3) for start in range(3)]
    url = f"http://127.0.0.1:{road.port}"
    heard: list[Waiting] = []
    options = {"namespace": NAMESPACE, "patience_s": PATIENCE_S, "on_wait": heard.append}
    gates = Gates()
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(matrix.reshape(-1)), DIMENSION)
    table = pa.table({"item_id": ids, "embedding": embedding})
    pq.write_table(table.take(list(thirds[2])), directory / "items.parquet")
    command = Command(directory / "items.parquet", directory / "ids.parquet", url)

    async def by_items() -> list[tuple[str, str]]:
        answered = []
        items = [{"item_id": ids[row], "embedding": matrix[row]} for row in thirds[0]]

        async def arriving() -> Any:
            source = gated(gates, 0, items)
            while (item := await asyncio.to_thread(next, source, None)) is not None:
                yield item

        async with AsyncTokenizerClient(url, batch_items=64, in_flight=6, **options) as client:
            async for answer in client.tokenize(arriving()):
                assert isinstance(answer, TokenizedItem), answer
                answered.append((answer.item_id, answer.semantic_id))
        return answered

    def by_record_batches() -> list[tuple[str, str]]:
        answered = []
        rows = table.take(list(thirds[1])).to_batches(max_chunksize=1500 if FULL else 100)
        with TokenizerClient(url, batch_rows=1024, in_flight=6, **options) as client:
            for batch in client.tokenize_batches(gated(gates, 1, rows)):
                assert batch["error"].null_count == len(batch)
                answered += pairs(batch)
        return answered

    # when
    with ThreadPoolExecutor(3) as pool:
        work = [pool.submit(asyncio.run, by_items()), pool.submit(by_record_batches), pool.submit(command.run)]
        for step in range(STEPS):
            gates.wait_for_work(step)
            command.kill()
            restart(service, signal.SIGTERM if step % 2 else signal.SIGKILL)
            gates.open()
        first, second, code = (each.result(PATIENCE_S * 3) for each in work)
    took_s = time.monotonic() - began

    # then every row has its answer, once and in order
    assert code == 0, command.log.read_text()
    third = pairs(pq.read_table(directory / "ids.parquet"))
    for rows, answered in zip(thirds, (first, second, third), strict=True):
        assert [item_id for item_id, _ in answered] == [ids[row] for row in rows]
    answers = dict([*first, *second, *third])
    assert len(set(answers.values())) == ITEMS
    # and the record holds these and no others
    asyncio.run(check_record(f"http://127.0.0.1:{service.port}", answers))
    # and there was an ordeal
    causes = Counter(waiting.trouble.split(":")[0] for waiting in heard)
    assert causes["429 The service is at its limit"]
    assert causes.total() > causes["429 The service is at its limit"]
    with capsys.disabled():
        print(
            f"\nOrdeal: {ITEMS} items in {took_s:.0f} s, {STEPS} restarts, {road.cuts} cuts, the command killed "
            f"{command.kills} times; tried again: {dict(causes.most_common())}"
        )


def pairs(answers: Any) -> list[tuple[str, str]]:
    """Item id and Semantic ID of each row."""
    return list(zip(answers["item_id"].to_pylist(), answers["semantic_id"].to_pylist(), strict=True))


async def check_record(url: str, answers: dict[str, str]) -> None:
    """The record has these items alone: each is found by its ID, and a part of them by GET /assignment."""
    async with AsyncTokenizerClient(url, namespace=NAMESPACE) as client:
        assert (await client.prefix(limit=1)).count == len(answers)
        assert [found.item_id for found in await client.lookup(answers.values())] == list(answers)
        asked = list(answers)[:: 10 if FULL else 6]
        for start in range(0, len(asked), 32):
            some = asked[start : start + 32]
            found = await asyncio.gather(*map(client.assignment, some))
            assert [one.semantic_id for one in found] == [answers[item_id] for item_id in some]

"""Callers of two tokenizers while a catalogue is migrated from one to the other, and what they were answered.

Each request is one about the old record, about the new one, or about the default's, whichever that is; what the last
kind is answered says whose it was. Requests and answers are kept for each record, and `semid migrate` is one more
caller of the new one.
"""

from __future__ import annotations

import itertools
import json
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from typer.testing import CliRunner

from service.cli import app
from tests.chaos.client import Caller, ask, checked
from tests.chaos.history import History, Operation, read_history
from tests.chaos.observation import Final, Observer, ids_to_look_up
from tests.chaos.servers import ROOT, SEMID, START_TIMEOUT_S
from tests.chaos.workload import Plan, contents_of, workload

CLIENTS = 3
PAUSE_S = 0.08
"""Of each caller after an answer: the service shares its process with them, and the machine with other tests."""
ABOUT_THE_DEFAULT = 0.5
"""The share of requests that name no tokenizer, of the calls whose answers say whose they are."""


class Traffic:
    """Callers, each a thread.

    Args:
        port: The service's.
        names: Of the old tokenizer and the new one, in full.
        embeddings: (D,) of each content.
        seed: Of what they ask.

    Attributes:
        operations: All that was asked about each record and what was answered, by the tokenizer's name.
        failures: Whatever was not answered, or was answered by 429 or a failure.
        defaults: How many requests that named no tokenizer were answered by each.
    """

    def __init__(self, port: int, names: tuple[str, str], embeddings: list[list[float]], seed: int) -> None:
        self.operations: dict[str, list[Operation]] = {name: [] for name in names}
        self.failures: list[str] = []
        self.defaults = dict.fromkeys(names, 0)
        self._port = port
        self._names = names
        self._embeddings = embeddings
        self._seed = seed
        self._numbers = itertools.count(1)
        self._told: dict[str, list[str]] = {name: [] for name in names}
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(client,)) for client in range(CLIENTS)]

    def start(self) -> None:
        """Begins to ask."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Ends when all have their answers."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(60)

    def go_on(self, requests: int) -> None:
        """Returns when so many more were answered."""
        wanted = self._answered() + requests
        deadline = time.monotonic() + 60 + requests  # the machine may be busy with other things
        while self._answered() < wanted and not self.failures:
            assert time.monotonic() < deadline, f"{self._answered()} answers of {wanted}"
            time.sleep(0.01)

    def items(self) -> set[str]:
        """All that anybody has asked about."""
        found: set[str] = set()
        for operation in itertools.chain(*(list(operations) for operations in self.operations.values())):
            found |= {item for item, _ in operation.arguments.get("items", ())}
        return found

    def retired(self, name: str) -> set[str]:
        """The items that were ever retired in a record."""
        operations = list(self.operations[name])
        return {op.arguments["item"] for op in operations if op.call == "retire" and op.status == 200}

    def _answered(self) -> int:
        return sum(map(len, self.operations.values()))

    def _run(self, client: int) -> None:
        caller = Caller(self._port, timeout_s=30)
        chance = random.Random(f"{self._seed}-{client}")
        for plan in workload(self._seed, client, CLIENTS):
            if self._stopping.is_set():
                break
            try:
                self._ask(caller, f"client-{client}", plan, chance)
            except Exception as error:  # noqa: BLE001 - whatever it is, a caller was not answered
                self.failures.append(f"{plan}: {error!r}")
                break
            time.sleep(PAUSE_S)
        caller.close()

    def _ask(self, caller: Caller, client: str, plan: Plan, chance: random.Random) -> None:
        name = chance.choice(self._names)
        arguments = self._arguments(plan, name)
        if arguments is None:
            return
        number, start = next(self._numbers), time.monotonic()
        if plan.call == "tokenize" and chance.random() < ABOUT_THE_DEFAULT:
            items = [{"item_id": item, "embedding": self._embeddings[content]} for item, content in arguments["items"]]
            status, answer = caller.ask("POST", "/tokenize", {"items": items, "on_change": arguments["on_change"]})
            body = [checked(entry) for entry in answer.get("items", ())]
            name = answer.get("tokenizer", name)
            self.defaults[name] += 1
        else:
            status, body = ask(caller, plan.call, arguments, self._embeddings, tokenizer=name)
        found = Operation(client, number, plan.call, arguments, start, time.monotonic(), status, body)
        if not found.acknowledged:
            self.failures.append(str(found))
        self.operations[name].append(found)
        if plan.call == "tokenize" and status == 200:
            self._told[name] += [entry["semantic_id"] for entry in body if "semantic_id" in entry]

    def _arguments(self, plan: Plan, name: str) -> dict[str, Any] | None:
        if plan.call not in {"reverse", "lookup"}:
            return plan.arguments
        told = self._told[name]
        if not told:
            return None
        chosen = [told[int(pick * len(told))] for pick in plan.arguments["picks"]]
        return {"semantic_id": chosen[0]} if plan.call == "reverse" else {"semantic_ids": chosen}


def write_catalogue(path: Path, items: Sequence[str], embeddings: list[list[float]]) -> None:
    """The items with the content that each has most often."""
    rows = [embeddings[contents_of(item)[0]] for item in items]
    kind = pa.list_(pa.float32(), len(embeddings[0]))
    pq.write_table(pa.table({"item_id": list(items), "embedding": pa.array(rows, kind)}), path)


def kill_once(command: Sequence[str], log: Path, begun: Callable[[], bool]) -> None:
    """Starts a command and kills it (SIGKILL) as soon as it has begun its work, long before its end."""
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + START_TIMEOUT_S
    try:
        while not begun() and process.poll() is None:
            assert time.monotonic() < deadline, "it does not begin"
            time.sleep(0.02)
    finally:
        process.kill()
        ended = process.wait(30)
    assert ended == -signal.SIGKILL, log.read_text()


class Migration:
    """`semid migrate` as one more caller, whose requests and answers are kept beside the others'.

    Args:
        traffic: The other callers, who go on.
        url: The service's.
        embeddings: (D,) of each content.
        directory: For its files.
    """

    def __init__(self, traffic: Traffic, url: str, embeddings: list[list[float]], directory: Path) -> None:
        self._traffic = traffic
        self._url = url
        self._embeddings = embeddings
        self._catalogue = directory / "items.parquet"
        self._out = directory / "out"

    def fill(self, names: tuple[str, str], further: set[str], killed_when: Callable[[], bool]) -> None:
        """Migrates all items that callers have asked about, and further ones; killed once, and begun again."""
        self._migrate(names, further, killed_when)

    def go_over(self, names: tuple[str, str]) -> dict[str, Any]:
        """The same, and the default changes; the report. Callers bring new items all the time, so some are missing."""
        self._migrate(names, set(), None, "--switch", "--missing-at-most", "100000")
        report: dict[str, Any] = json.loads((self._out / "report.json").read_text())
        return report

    def _migrate(
        self, names: tuple[str, str], further: set[str], killed_when: Callable[[], bool] | None, *more: str
    ) -> None:
        """Runs it, and keeps what it asked of the new record and was answered.

        It may retire there whatever the old record has retired, and nobody says when.
        """
        items = sorted(self._traffic.items() | further)
        write_catalogue(self._catalogue, items, self._embeddings)
        words = ["migrate", *names, "--url", self._url, "--items", str(self._catalogue), "--out", str(self._out), *more]
        start = time.monotonic()
        if killed_when is not None:
            slowly = [*SEMID, *words, "--batch-items", "1", "--in-flight", "1"]
            kill_once(slowly, self._catalogue.with_name("killed.log"), killed_when)
        done = CliRunner().invoke(app, words)
        end = time.monotonic()
        assert done.exit_code in {0, 3}, done.output
        answers = {row["item_id"]: checked(row) for row in pq.read_table(self._out / "ids.parquet").to_pylist()}
        arguments = {"items": [[item, contents_of(item)[0]] for item in items], "on_change": "keep"}
        body = [answers[item] for item in items]
        operations = self._traffic.operations[names[1]]
        operations.append(Operation("migrate", len(operations), "tokenize", arguments, start, end, 200, body))
        for item in self._traffic.retired(names[0]):
            unknown = Operation("migrate", len(operations), "retire", {"item": item}, start, end, why="not told")
            operations.append(unknown)


def observe(
    traffic: Traffic, name: str, port: int, directory: Path, embeddings: list[list[float]]
) -> tuple[list[Operation], Final, list[str]]:
    """What `tests.chaos.checker.check` reads of a record, once nobody asks any more.

    Returns:
        All that was asked and answered, the last look-ups of everything too; what the record holds; the codes of
        each content.
    """
    observer = Observer(port, name, name)
    operations = sorted(traffic.operations[name], key=lambda operation: operation.start)
    items = {item for op in operations for item, _ in op.arguments.get("items", ())}
    items |= {op.arguments["item"] for op in operations if "item" in op.arguments}
    final = Final()
    directory.mkdir(parents=True)
    with History(directory / "checker.jsonl") as history:
        observer.look_up_items(history, sorted(items))
        final.feed = observer.feed()
        final.revision = final.feed[-1]["revision"]
        observer.views(final)
        told = [entry["semantic_id"] for op in operations if op.call == "tokenize" for entry in op.body or ()]
        observer.look_up_ids(history, ids_to_look_up(final.feed, told))
    observer.close()
    caller = Caller(port, timeout_s=30)
    contents = [{"item_id": f"{number}", "embedding": vector} for number, vector in enumerate(embeddings)]
    _, dry = caller.ask("POST", "/tokenize", {"items": contents, "assign": False, "tokenizer": name})
    caller.close()
    codes = ["-".join(map(str, entry["codes"])) for entry in dry["items"]]
    return [*operations, *read_history(directory / "checker.jsonl")], final, codes

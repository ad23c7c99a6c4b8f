"""One run: starts everything, lets the faults come, and then asks whether every promise was kept."""

from __future__ import annotations

import heapq
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from tqdm import tqdm

from tests.chaos.checker import Violation, check, replay
from tests.chaos.cluster import Cluster
from tests.chaos.history import History, Operation, read_history
from tests.chaos.observation import Final, Observer, ids_to_look_up
from tests.chaos.proxy import Network, Proxy
from tests.chaos.schedule import CUT, DELAY, HALF_CLOSE, KILL_SERVICE, KINDS, STALL, STOP_SERVICE, schedule
from tests.chaos.servers import ROOT, START_TIMEOUT_S, Service
from tests.chaos.tokenizer import embeddings, write_checkpoint
from tests.chaos.topology import Action, Single, Topology
from tests.chaos.workload import contents_of

TOPOLOGIES = {"single": Single, "cluster": Cluster}
SERVICES = 2
LONGEST_DELAY_S = 0.05
RECOVERY_S = 60.0
SETTLE_S = 3.0
"""How long the record must not change before it is read: longer than a call that nobody waits for any more."""
ASKED_AGAIN = 3000


@dataclass(frozen=True)
class Config:
    """What a run is.

    Attributes:
        directory: Where all its files go.
        seconds: How long faults come.
        seed: Of faults and requests.
        topology: The name of the registry's.
        clients: How many client processes.
        kinds: Of faults.
        accept: Whether an operator accepts, at the end, a registry that is older than what was acknowledged.
        durability: Of the services.
        server_options: Of the registry's servers, beside the harness' own.
        progress: Whether to show a bar.
    """

    directory: Path
    seconds: float
    seed: int
    topology: str = "single"
    clients: int = 4
    kinds: Collection[str] = KINDS
    accept: bool = False
    durability: str = "fsync"
    server_options: Mapping[str, str] = field(default_factory=dict)
    progress: bool = True


@dataclass
class Outcome:
    """What came of a run: figures, and what was broken."""

    violations: list[Violation]
    figures: dict[str, Any]

    def __str__(self) -> str:
        return "\n".join(f"  {name}: {value}" for name, value in self.figures.items())


class Run:
    """The processes and proxies of one run."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._directory = config.directory
        self._history = config.directory / "history"
        self._history.mkdir(parents=True)
        self._network = Network()
        self.faults: Counter[str] = Counter()
        self.topology: Topology = TOPOLOGIES[config.topology](
            config.directory, self._network, config.seed, SERVICES, config.server_options
        )
        checkpoint = write_checkpoint(config.directory / "checkpoint")
        self.services = [
            Service(
                config.directory,
                f"service-{i}",
                redis_url=self.topology.url(i),
                checkpoint=checkpoint,
                durability=config.durability,
                registry_timeout_ms=1000,
                drain_s=2,
                changes_kept=10_000_000,
            )
            for i in range(SERVICES)
        ]
        self._proxies = [
            Proxy(self._network, service.port, f"{config.seed}-{service.name}") for service in self.services
        ]
        self._embeddings = embeddings()
        self._askers: list[subprocess.Popen[bytes]] = []

    def perform(self) -> Outcome:
        """Runs from start to end."""
        try:
            self._start()
            codes = self._codes()
            self._begin_to_ask()
            self._suffer()
            try:
                self._recover()
            except TimeoutError as error:
                return Outcome([Violation("not ready after all faults", str(error))], {"faults": dict(self.faults)})
            final = self._observe()
        finally:
            self._stop()
        return self._judge(codes, final)

    def _start(self) -> None:
        self.topology.start()
        for service in self.services:
            service.start()
        for service in self.services:
            service.wait_until_ready()

    def _codes(self) -> list[str]:
        """The codes of each content, by a dry run."""
        items = [{"item_id": f"{i}", "embedding": embedding} for i, embedding in enumerate(self._embeddings)]
        url = f"http://127.0.0.1:{self.services[0].port}/tokenize"
        answer = httpx.post(url, json={"items": items, "assign": False}, timeout=30).raise_for_status().json()
        codes = ["-".join(map(str, entry["codes"])) for entry in answer["items"]]
        (self._directory / "codes.json").write_text(json.dumps(codes))
        return codes

    def _begin_to_ask(self) -> None:
        ports = [proxy.port for proxy in self._proxies]
        for i in range(self._config.clients):
            setup = {
                "seed": self._config.seed,
                "client": i,
                "clients": self._config.clients,
                "ports": ports,
                "stop": str(self._directory / "stop"),
                "embeddings": self._embeddings,
                "history": str(self._history / f"client-{i}.jsonl"),
            }
            self._ask("tests.chaos.client", f"client-{i}", setup)
        setup = {
            "seed": self._config.seed,
            "ports": ports,
            "until": str(self._directory / "until.json"),
            "told": str(self._directory / "told.jsonl"),
            "trie": str(self._directory / "followed.json"),
        }
        self._ask("tests.chaos.follower", "follower", setup)
        first_lines = [self._history / f"client-{i}.jsonl" for i in range(self._config.clients)]
        first_lines.append(self._directory / "told.jsonl")
        deadline = time.monotonic() + START_TIMEOUT_S
        while not all(path.exists() and path.stat().st_size for path in first_lines):
            assert time.monotonic() < deadline, f"clients do not start: see {self._directory}/*.log"
            time.sleep(0.05)

    def _ask(self, module: str, name: str, setup: dict[str, Any]) -> None:
        path = self._directory / f"{name}.setup.json"
        path.write_text(json.dumps(setup))
        with (self._directory / f"{name}.log").open("wb") as log:
            command = [sys.executable, "-m", module, str(path)]
            self._askers.append(subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT))

    def _suffer(self) -> None:
        """Lets the faults come, each at its time, and go."""
        start = time.monotonic()
        faults = schedule(self._config.seed, self._config.seconds, self._config.kinds)
        ahead: list[tuple[float, int, Callable[[], None]]] = []
        for number, fault in enumerate(faults):
            heapq.heappush(ahead, (fault.at_s, number, lambda fault=fault: self._begin(fault, ahead)))
        total = round(self._config.seconds)
        with tqdm(total=total, unit="s", disable=not self._config.progress, desc="chaos", mininterval=1) as bar:
            while (now := time.monotonic() - start) < self._config.seconds:
                while ahead and ahead[0][0] <= now:
                    heapq.heappop(ahead)[2]()
                for server in (*self.topology.servers, *self.services):
                    server.notice()
                bar.set_postfix(faults=self.faults.total(), refresh=False)
                bar.update(min(int(now), total) - bar.n)
                time.sleep(0.02)
            bar.update(total - bar.n)

    def _begin(self, fault: Any, ahead: list[tuple[float, int, Callable[[], None]]]) -> None:
        self.faults[fault.kind] += 1
        end = self._befall(fault.kind, fault.pick, fault.duration_s)
        if end is not None:
            heapq.heappush(ahead, (fault.at_s + fault.duration_s, -self.faults.total(), end))

    def _befall(self, kind: str, pick: float, duration_s: float) -> Action | None:
        """Begins a fault; what ends it."""
        if kind in {KILL_SERVICE, STOP_SERVICE}:
            service = self.services[int(pick * len(self.services))]
            service.kill(signal.SIGKILL if kind == KILL_SERVICE else signal.SIGTERM)
            return lambda: self._start_again(service)
        if kind in {CUT, HALF_CLOSE, STALL, DELAY}:
            proxies = [*self.topology.proxies, *self._proxies]
            proxy = proxies[int(pick * len(proxies))]
            if kind == DELAY:
                proxy.delay(LONGEST_DELAY_S)
                return lambda: proxy.delay(0.0)
            if kind == STALL:
                proxy.stall(duration_s)
            else:
                {CUT: proxy.cut, HALF_CLOSE: proxy.half_close}[kind]()
            return None
        return self.topology.befall(kind, pick)

    def _start_again(self, service: Service) -> None:
        """After a SIGTERM that it has not followed yet, by force."""
        if service.alive and not service.wanted:
            self.faults["drain cut short"] += 1
            service.kill()
        service.start()

    def _recover(self) -> None:
        """Ends all faults and waits until everything is up and nobody asks."""
        (self._directory / "stop").touch()
        for proxy in (*self.topology.proxies, *self._proxies):
            proxy.delay(0.0)
        for server in self.topology.servers:
            server.start()
        self.topology.wait_until_whole()
        for service in self.services:
            self._start_again(service)
        if self._config.accept:
            self.services[0].accept_the_registry()
        for service in self.services:
            service.wait_until_ready(RECOVERY_S)
        for client in self._askers[:-1]:
            assert client.wait(30) == 0, f"a client failed: see {self._directory}/client-*.log"

    def _observe(self) -> Final:
        """What the record holds, and in the history of the checker what it answers about every item and ID."""
        final = Final()
        observers = [Observer(service.port, service.name) for service in self.services]
        first = observers[0]
        first.settled_revision(SETTLE_S)
        operations = self._operations()
        with History(self._history / "checker.jsonl") as history:
            # First: on a cluster, whoever finds an item half changed finishes what was begun.
            first.look_up_items(history, sorted({item for operation in operations for item in _items(operation)}))
            final.revision = first.settled_revision(0.5)
            # Written whole before it is there.
            (self._directory / "until.part").write_text(json.dumps(final.revision))
            (self._directory / "until.part").rename(self._directory / "until.json")
            final.feed = first.feed()
            for observer in observers:
                observer.views(final)
            first.look_up_ids(history, ids_to_look_up(final.feed, _told(operations)))
            live = _live_items(final.feed)[:ASKED_AGAIN]
            observers[-1].ask_again(history, [(item, contents_of(item)[0]) for item in live], self._embeddings)
        for observer in observers:
            observer.close()
        self._askers[-1].wait(60)
        final.views["the follower's trie"] = json.loads((self._directory / "followed.json").read_text())
        final.save(self._directory / "final.json")
        return final

    def _operations(self) -> list[Operation]:
        found = [operation for path in self._history.glob("*.jsonl") for operation in read_history(path)]
        return sorted(found, key=lambda operation: operation.start)

    def _stop(self) -> None:
        for process in self._askers:
            if process.poll() is None:
                process.kill()
            process.wait()
        for server in (*self.services, *self.topology.servers):
            server.stop()
        self._network.close()

    def _judge(self, codes: Sequence[str], final: Final) -> Outcome:
        operations = self._operations()
        lines = [json.loads(line) for line in (self._directory / "told.jsonl").read_text().splitlines()]
        told = [change for line in lines for change in line.get("changes", ())]
        violations = check(operations, final, codes, followed=[told], atomic=self.topology.atomic)
        violations += [Violation("changes gone", line["detail"]) for line in lines if "gone" in line]
        for server in (*self.services, *self.topology.servers):
            violations += [
                Violation("ended by itself", f"with {code}: see {server.log}") for code in server.ended_by_itself
            ]
        return Outcome(violations, self._figures(operations, final, len(told)))

    def _figures(self, operations: Sequence[Operation], final: Final, told: int) -> dict[str, Any]:
        asked = [operation for operation in operations if operation.client != "checker"]
        wanted = [operation for operation in asked if not (operation.why or "").startswith("left")]
        acknowledged = [operation for operation in wanted if operation.acknowledged]
        errors = Counter(
            f"{operation.status}" if operation.status else operation.why or "client ended"
            for operation in asked
            if not operation.acknowledged
        )
        tokenized = [op for op in acknowledged if op.call == "tokenize"]
        return {
            "requests": len(asked),
            "acknowledged": len(acknowledged),
            "availability": f"{len(acknowledged) / max(len(wanted), 1):.2%} of the requests that were waited for",
            "items acknowledged": sum(len(op.body) for op in tokenized if op.status == 200),
            "distinct items": len({item for op in tokenized for item, _ in op.arguments["items"]}),
            "live at the end": len(final.views.get("the follower's trie", ())),
            "changes": f"{final.revision}, of which a follower was told {told}",
            "errors": dict(errors.most_common()),
            "faults": dict(self.faults.most_common()),
        }


def _items(operation: Operation) -> list[str]:
    if operation.call == "tokenize":
        return [item for item, _ in operation.arguments["items"]]
    return [operation.arguments["item"]] if "item" in operation.arguments else []


def _told(operations: Sequence[Operation]) -> list[str]:
    """The IDs that clients were told of when they tokenized."""
    answers = [operation.body for operation in operations if operation.call == "tokenize" and operation.status == 200]
    return [entry["semantic_id"] for body in answers for entry in body if "semantic_id" in entry]


def _live_items(feed: Sequence[dict[str, Any]]) -> list[str]:
    """The items that hold an ID after all changes."""
    holder = {change["semantic_id"]: change["item_id"] for change in feed}
    return [holder[semantic_id] for semantic_id in replay(feed)]

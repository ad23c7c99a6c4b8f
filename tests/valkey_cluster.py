"""A real cluster on loopback: primaries that share the slots, each with a replica; killed and started again at will."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import redis

from tests.ports import free_ports
from tests.valkey import Valkey

SLOTS = 16_384
TIMEOUT_S = 60.0
OPTIONS = {
    "cluster-enabled": "yes",
    "cluster-node-timeout": "1500",
    "cluster-allow-replica-migration": "no",
    "repl-diskless-sync-delay": "0",
}


class ValkeyCluster:
    """Primaries and as many replicas; as they fail over they change roles."""

    def __init__(self, directory: Path, primaries: int = 3, *, password: str = "", **options: str) -> None:
        self.password = password
        self.nodes: list[Valkey] = []
        try:
            for port in free_ports(2 * primaries):
                node = directory / f"node-{port}"
                node.mkdir()
                self.nodes.append(Valkey(node, password=password, port=str(port), **{**OPTIONS, **options}))
            self._join(primaries)
        except BaseException:
            self.stop()
            raise

    @property
    def url(self) -> str:
        """By which a registry finds it."""
        return f"redis+cluster://127.0.0.1:{self.nodes[0].port}"

    def _join(self, primaries: int) -> None:
        clients = [node.client() for node in self.nodes]
        for number, client in enumerate(clients[:primaries]):
            first, end = SLOTS * number // primaries, SLOTS * (number + 1) // primaries
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", first, end - 1)
            client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        for node in self.nodes[1:]:
            clients[0].execute_command("CLUSTER", "MEET", "127.0.0.1", node.port)
        ids = [client.execute_command("CLUSTER", "MYID").decode() for client in clients]
        for primary, client in zip(ids, clients[primaries:], strict=False):
            wait_until(lambda client=client: _knows(client, len(self.nodes)), "the nodes do not meet")
            client.execute_command("CLUSTER", "REPLICATE", primary)
        self.until_whole()

    def until_whole(self) -> None:
        """Wait until all nodes run, know each other and serve all slots, and every replica is in step."""
        wait_until(self._whole, "the cluster does not become whole")

    def _whole(self) -> bool:
        for node in self.nodes:
            with node.client() as client:
                if client.execute_command("CLUSTER INFO")["cluster_state"] != "ok":
                    return False
                replication = client.info("replication")
            if replication["role"] == "slave" and replication["master_link_status"] != "up":
                return False
        return len(self.primaries()) == len(self.nodes) // 2

    def primaries(self) -> list[Valkey]:
        """The nodes that are primaries now."""
        return [node for node in self.nodes if node.running and _role(node) == "master"]

    def primary_of(self, slot: int) -> Valkey:
        """The primary that serves a slot."""
        return next(node for node in self.primaries() if _serves(node, slot))

    def replicas(self) -> list[Valkey]:
        """The nodes that are replicas now."""
        return [node for node in self.nodes if node.running and _role(node) == "slave"]

    def fail_over(self) -> None:
        """Kill a primary, and return when its replica serves and it has come back as a replica."""
        before = self.primaries()[0]
        count = len(self.primaries())
        before.kill()
        wait_until(lambda: len(self.primaries()) == count, "no replica is promoted")
        before.restart()
        self.until_whole()

    def stop(self) -> None:
        """Kill all nodes."""
        for node in self.nodes:
            node.kill()


def _role(node: Valkey) -> str:
    with node.client() as client:
        return str(client.info("replication")["role"])


def _serves(node: Valkey, slot: int) -> bool:
    with node.client() as client:
        table = client.execute_command("CLUSTER SLOTS")
    return any(first <= slot <= end and primary[1] == node.port for first, end, primary, *_ in table)


def _knows(client: redis.Redis, count: int) -> bool:
    return len(client.execute_command("CLUSTER NODES")) == count


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Wait for a condition; a server that does not answer yet is none."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            if condition():
                return
        except redis.RedisError:
            pass
        time.sleep(0.05)
    raise AssertionError(what)

"""A cluster of three primaries, each with a replica and a proxy; a primary that is killed comes back as such."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tests.chaos.proxy import Network, Proxy
from tests.chaos.schedule import FLUSH_SCRIPTS, KILL_PRIMARY
from tests.chaos.servers import Valkey
from tests.chaos.topology import Action, flush_scripts
from tests.ports import free_port
from tests.valkey_cluster import SLOTS, wait_until

PRIMARIES = 3
OPTIONS = {
    "cluster-enabled": "yes",
    "cluster-announce-ip": "127.0.0.1",
    # No failover: what it may lose is another promise. So a cluster that lost a primary waits for it.
    "cluster-node-timeout": "30000",
    "cluster-replica-no-failover": "yes",
    "cluster-allow-replica-migration": "no",
    "repl-diskless-sync-delay": "0",
}


class Node(Valkey):
    """A server that sends clients to its proxy; the other nodes talk to it directly."""

    def __init__(self, directory: Path, network: Network, seed: str, options: Mapping[str, str]) -> None:
        port = free_port()
        self.bus = free_port()
        self.proxy = Proxy(network, port, seed)
        super().__init__(
            directory,
            port=f"{port}",
            **{"cluster-port": f"{self.bus}", "cluster-announce-client-port": f"{self.proxy.port}"},
            **OPTIONS,
            **options,
        )


class Cluster:
    """As `topology.Single`; all services reach a node through the same proxy."""

    atomic = False

    def __init__(
        self, directory: Path, network: Network, seed: int, _services: int, options: Mapping[str, str]
    ) -> None:
        self.servers = [
            Node(directory / f"node-{i}", network, f"{seed}-node-{i}", options) for i in range(2 * PRIMARIES)
        ]
        self.primaries, self.replicas = self.servers[:PRIMARIES], self.servers[PRIMARIES:]
        self.proxies = [node.proxy for node in self.servers]

    def url(self, _service: int, /) -> str:
        return "redis+cluster://" + ",".join(f"127.0.0.1:{node.proxy.port}" for node in self.primaries)

    def start(self) -> None:
        for node in self.servers:
            node.start()
        for node in self.servers:
            node.wait_until_ready()
        self._join()
        self.wait_until_whole()

    def _join(self) -> None:
        clients = [node.client() for node in self.servers]
        for number, client in enumerate(clients[:PRIMARIES]):
            first, end = SLOTS * number // PRIMARIES, SLOTS * (number + 1) // PRIMARIES
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", first, end - 1)
            client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        for node in self.servers[1:]:
            clients[0].execute_command("CLUSTER", "MEET", "127.0.0.1", node.port, node.bus)
        ids = [client.execute_command("CLUSTER", "MYID").decode() for client in clients]
        for primary, client in zip(ids, clients[PRIMARIES:], strict=False):
            wait_until(
                lambda client=client: len(client.execute_command("CLUSTER NODES")) == len(self.servers),
                "the nodes do not meet",
            )
            client.execute_command("CLUSTER", "REPLICATE", primary)
        for client in clients:
            client.close()

    def wait_until_whole(self) -> None:
        """Returns once all nodes serve and every replica is in step."""
        wait_until(lambda: all(map(_serves, self.servers)), "the cluster does not become whole")

    def befall(self, kind: str, pick: float, /) -> Action | None:
        """Begins a fault of one of its nodes."""
        number = int(pick * PRIMARIES)
        if kind == FLUSH_SCRIPTS:
            if self.primaries[number].alive:
                flush_scripts(self.primaries[number])
            return None
        node = (self.primaries if kind == KILL_PRIMARY else self.replicas)[number]
        node.kill()
        return node.start


def _serves(node: Node) -> bool:
    with node.client() as client:
        if client.execute_command("CLUSTER INFO")["cluster_state"] != "ok":
            return False
        replication = client.info("replication")
    return replication["role"] == "master" or replication["master_link_status"] == "up"

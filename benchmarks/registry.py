"""Claims a second and bytes an item of the registry, beside redis-benchmark and a plain layout on the same server.

    python -P benchmarks/registry.py [--items 50000] [--per-call 256] [--layout cluster]

Item ids of 12 bytes, 4 codebooks of 256. The codes are drawn evenly, the worst case for memory: nearly every item is
alone under its prefix. A claim reads what the item and its codes hold, writes both and a change, and is synced to disk
when it is acknowledged; redis-benchmark sets one key of the same size in pipelines as long. The plain layout is two
string keys an item, and a counter for each group.
"""

from __future__ import annotations

import asyncio
import random
import re
import shutil
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

from redis import Redis

sys.path.append(str(Path(__file__).parents[1]))
from benchmarks.harness import Comparison, Result, keep, parser_of, rate, rounds_of, seconds
from service.registry import Claim, Registry
from service.registry.embedded import EmbeddedValkey
from tests.valkey_cluster import ValkeyCluster  # the cluster that the tests start

SIZES = (256, 256, 256, 256)
CALLERS = 2
COMPACT = {"hash_max_listpack_entries": "512", "hash_max_listpack_value": "320"}  # as the embedded server has it
NEW, KNOWN, PLAIN, SET = "new claims", "known claims", "plain layout, not idempotent", "redis-benchmark, SET"


def claims_of(items: int) -> list[Claim]:
    """Claims of that many items, the same in every run."""
    draw = random.Random(0)
    return [
        Claim(f"{item:012d}", tuple(draw.randrange(size) for size in SIZES), draw.randbytes(8)) for item in range(items)
    ]


async def claim_all(url: str, claims: Sequence[Claim], per_call: int) -> None:
    """Claim all, a few callers at once."""
    registry = await Registry.connect(url)
    record = await registry.record("default", "0123456789abcdef", SIZES)
    batches = iter([claims[start : start + per_call] for start in range(0, len(claims), per_call)])

    async def caller() -> None:
        for batch in batches:
            await record.claim(batch)

    await asyncio.gather(*[caller() for _ in range(CALLERS)])
    await registry.close()


def plainly(client: Redis, claims: Sequence[Claim], per_call: int) -> None:
    """Two string keys an item and a counter a group, as one would write it first."""
    prefix = "sid:default:0123456789abcdef"
    for start in range(0, len(claims), per_call):
        pipeline = client.pipeline(transaction=False)
        for claim in claims[start : start + per_call]:
            codes = "-".join(map(str, claim.codes))
            pipeline.set(f"{prefix}:item:{claim.item_id}", f"{codes}-0")
            pipeline.set(f"{prefix}:id:{codes}-0", claim.item_id)
            pipeline.incr(f"{prefix}:count:{codes}")
        pipeline.execute()


def redis_benchmark(socket: str, items: int, per_call: int) -> float:
    """SETs a second by its own measure."""
    options = f"-t set -n {items} -r {items} -d 12 -P {per_call} -c {CALLERS} --csv"
    said = subprocess.check_output(["redis-benchmark", "-s", socket, *options.split()], text=True)
    return float(re.findall(r'"SET","([\d.]+)"', said)[0])


def kept_by(clients: Sequence[Redis]) -> int:
    """Bytes of memory that these servers have in use, but for what they keep for their replicas."""
    memory = [client.info("memory") for client in clients]
    return sum(int(one["used_memory"]) - int(one["mem_replication_backlog"]) for one in memory)


class Measurement:
    """What is timed on one server or cluster, each path on an empty one.

    Args:
        url: Of it.
        clients: Of each of its servers.
        arguments: The benchmark's.
    """

    def __init__(self, url: str, clients: Sequence[Redis], arguments: Namespace) -> None:
        self._url = url
        self._clients = clients
        self._claims = claims_of(arguments.items)
        self._per_call = arguments.per_call
        self.bytes_an_item: dict[str, list[float]] = {}

    def new(self, _: int) -> float:
        """Claims a second of items that are new."""
        return self._on_an_empty_server(NEW, self._claim)

    def known(self, _: int) -> float:
        """Claims a second of items that have their assignment."""
        self._on_an_empty_server(NEW, self._claim)
        return rate(len(self._claims), self._claim)

    def plain(self, _: int) -> float:
        """Items a second of the plain layout."""
        return self._on_an_empty_server(PLAIN, lambda: plainly(self._clients[0], self._claims, self._per_call))

    def _claim(self) -> None:
        asyncio.run(claim_all(self._url, self._claims, self._per_call))

    def _on_an_empty_server(self, name: str, work: Callable[[], object]) -> float:
        for client in self._clients:
            client.flushall()
        empty = kept_by(self._clients)
        elapsed = seconds(work)
        kept = self.bytes_an_item.setdefault(name, [])
        kept.append((kept_by(self._clients) - empty) / len(self._claims))
        return len(self._claims) / elapsed


def run(arguments: Namespace) -> Result:
    """Measure on one server, or on a cluster of three primaries."""
    result = Result("registry")
    with tempfile.TemporaryDirectory(prefix="semid-") as directory:
        if arguments.layout == "cluster":
            cluster = ValkeyCluster(Path(directory), **COMPACT)
            clients = [node.client() for node in cluster.primaries()]
            found = Measurement(cluster.url, clients, arguments)
            figures = rounds_of({NEW: found.new, KNOWN: found.known}, arguments.rounds, "items/s")
            cluster.stop()
            result.comparisons.append(Comparison("Claims on a cluster", "items/s", [NEW, KNOWN], NEW, figures))
            return result
        with asyncio.Runner() as runner:
            server = runner.run(EmbeddedValkey(Path(directory)).start())
            try:
                measure_one(result, server.url, arguments)
            finally:
                runner.run(server.stop())
    return result


def measure_one(result: Result, url: str, arguments: Namespace) -> None:
    """Measure on one server."""
    with Redis.from_url(url) as client:
        found = Measurement(url, [client], arguments)
        paths = {NEW: found.new, KNOWN: found.known, PLAIN: found.plain}
        if shutil.which("redis-benchmark"):
            socket = url.removeprefix("unix://").partition("?")[0]
            paths[SET] = lambda _: redis_benchmark(socket, arguments.items, arguments.per_call)
        else:
            result.skipped[SET] = "not installed; Debian has it in redis-tools"
        figures = rounds_of(paths, arguments.rounds, "items/s")
    against = SET if SET in paths else PLAIN
    title = f"Claims, {arguments.per_call} a call"
    result.comparisons.append(Comparison(title, "items/s", [NEW, KNOWN], against, figures))
    kept = {NEW: found.bytes_an_item[NEW][: arguments.rounds], PLAIN: found.bytes_an_item[PLAIN]}
    result.comparisons.append(Comparison("Memory of the server", "bytes an item", [NEW], PLAIN, kept))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = parser_of(__doc__)
    parser.add_argument("--items", type=int, default=50_000, help="items (default %(default)s)")
    parser.add_argument("--per-call", type=int, default=256, help="claims of one call (default %(default)s)")
    parser.add_argument("--layout", choices=["single", "cluster"], default="single", help="(default %(default)s)")
    arguments = parser.parse_args(argv)
    keep(run(arguments), arguments)


if __name__ == "__main__":
    main()

"""Claims a second and bytes an item of the registry, beside redis-benchmark and a plain layout on the same server.

    python -P benchmarks/registry.py [--items 50000] [--per-call 256] [--layout cluster]

Item ids of 12 bytes, 4 codebooks of 256. The codes are drawn evenly, the worst case for memory: nearly every item is
alone under its prefix. A claim reads what the item and its codes hold, writes both and a change, and is synced to disk
when it is acknowledged. Bulks are of 8,192 items, claimed or looked up as columns. redis-benchmark sets one key of the
same size in pipelines as long as a call. The plain layout is two string keys an item, and a counter for each group.
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
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
from redis import Redis

sys.path.append(str(Path(__file__).parents[1]))
from benchmarks.harness import Comparison, Result, keep, parser_of, rate, rounds_of
from service.registry import Claim, Record, Registry
from service.registry.embedded import EmbeddedValkey
from tests.valkey_cluster import ValkeyCluster  # the cluster that the tests start

SIZES = (256, 256, 256, 256)
CALLERS = 2
COMPACT = {"hash_max_listpack_entries": "512", "hash_max_listpack_value": "320"}  # as the embedded server has it
ITEMS_PER_BULK = 8192
NEW, KNOWN, PLAIN, SET = "new claims", "known claims", "plain layout, not idempotent", "redis-benchmark, SET"
BULK, RECALL = "new claims of bulks, as columns", "look-ups of bulks"


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


class Columns:
    """The same items as columns, in bulks, a few callers at once."""

    def __init__(self, claims: Sequence[Claim]) -> None:
        """Of these claims."""
        self._item_ids = [claim.item_id.encode() for claim in claims]
        self._digests = np.frombuffer(b"".join(claim.digest for claim in claims), np.uint64)
        self._codes = np.array([claim.codes for claim in claims], np.int32)

    async def claim(self, record: Record, bulk: slice) -> None:
        """Claim one bulk."""
        await record.claim_columns(self._item_ids[bulk], self._digests[bulk], self._codes[bulk])

    async def recall(self, record: Record, bulk: slice) -> None:
        """Look one bulk up."""
        await record.held(self._item_ids[bulk])

    async def all(self, url: str, act: Callable[[Record, slice], Awaitable[None]]) -> None:
        """Do this with all bulks."""
        registry = await Registry.connect(url)
        record = await registry.record("default", "0123456789abcdef", SIZES)
        bulks = iter([slice(at, at + ITEMS_PER_BULK) for at in range(0, len(self._item_ids), ITEMS_PER_BULK)])

        async def caller() -> None:
            for bulk in bulks:
                await act(record, bulk)

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
    sets = max(items, 20_000)  # of too few it tells no rate
    options = f"-t set -n {sets} -r {items} -d 12 -P {per_call} -c {CALLERS} --csv"
    said = subprocess.check_output(["redis-benchmark", "-s", socket, *options.split()], text=True)
    return float(re.findall(r'"SET","([\d.]+)"', said)[0])


def kept_by(clients: Sequence[Redis]) -> int:
    """Bytes of memory that these servers have in use, but for what they keep for their replicas."""
    memory = [client.info("memory") for client in clients]
    return sum(int(one["used_memory"]) - int(one["mem_replication_backlog"]) for one in memory)


Servers = tuple[str, list[Redis]]


@contextmanager
def single() -> Iterator[Servers]:
    """A new server: its URL, and a client of it."""
    with tempfile.TemporaryDirectory(prefix="semid-") as directory, asyncio.Runner() as runner:
        server = runner.run(EmbeddedValkey(Path(directory)).start())
        try:
            with Redis.from_url(server.url) as client:
                yield server.url, [client]
        finally:
            runner.run(server.stop())


@contextmanager
def cluster() -> Iterator[Servers]:
    """A new cluster: its URL, and a client of each primary."""
    with tempfile.TemporaryDirectory(prefix="semid-") as directory:
        servers = ValkeyCluster(Path(directory), **COMPACT)
        try:
            yield servers.url, [node.client() for node in servers.primaries()]
        finally:
            servers.stop()


class Measurement:
    """What is timed, each path in each round on new servers.

    Args:
        servers: Starts them.
        arguments: The benchmark's.
    """

    def __init__(self, servers: Callable[[], AbstractContextManager[Servers]], arguments: Namespace) -> None:
        self._servers = servers
        self._claims = claims_of(arguments.items)
        self._columns = Columns(self._claims)
        self._per_call = arguments.per_call
        self.bytes_an_item: dict[str, list[float]] = {NEW: [], PLAIN: []}

    def new(self, _: int) -> float:
        """Claims a second of items that are new."""
        with self._servers() as (url, clients):
            return self._weighed(NEW, clients, lambda: self._claim(url))

    def known(self, _: int) -> float:
        """Claims a second of items that have their assignment."""
        with self._servers() as (url, _clients):
            self._claim(url)
            return rate(len(self._claims), lambda: self._claim(url))

    def bulk(self, _: int) -> float:
        """Claims a second of new items that come in bulks."""
        with self._servers() as (url, _clients):
            return rate(len(self._claims), lambda: asyncio.run(self._columns.all(url, self._columns.claim)))

    def recall(self, _: int) -> float:
        """Look-ups a second of items that come in bulks and have their assignment."""
        with self._servers() as (url, _clients):
            self._claim(url)
            return rate(len(self._claims), lambda: asyncio.run(self._columns.all(url, self._columns.recall)))

    def plain(self, _: int) -> float:
        """Items a second of the plain layout."""
        with self._servers() as (_url, clients):
            return self._weighed(PLAIN, clients, lambda: plainly(clients[0], self._claims, self._per_call))

    def sets(self, _: int) -> float:
        """SETs a second."""
        with self._servers() as (url, _clients):
            socket = url.removeprefix("unix://").partition("?")[0]
            return redis_benchmark(socket, len(self._claims), self._per_call)

    def _claim(self, url: str) -> None:
        asyncio.run(claim_all(url, self._claims, self._per_call))

    def _weighed(self, name: str, clients: Sequence[Redis], work: Callable[[], object]) -> float:
        empty = kept_by(clients)
        found = rate(len(self._claims), work)
        self.bytes_an_item[name].append((kept_by(clients) - empty) / len(self._claims))
        return found


def run(arguments: Namespace) -> Result:
    """Measure on one server, or on a cluster of three primaries."""
    result = Result("registry")
    if arguments.layout == "cluster":
        found = Measurement(cluster, arguments)
        figures = rounds_of({NEW: found.new, KNOWN: found.known}, arguments.rounds, "items/s")
        result.comparisons.append(Comparison("Claims on a cluster", "items/s", [NEW, KNOWN], NEW, figures))
        return result
    found = Measurement(single, arguments)
    paths = {NEW: found.new, KNOWN: found.known, BULK: found.bulk, RECALL: found.recall, PLAIN: found.plain}
    if shutil.which("redis-benchmark"):
        paths[SET] = found.sets
    else:
        result.skipped[SET] = "not installed; Debian has it in redis-tools"
    figures = rounds_of(paths, arguments.rounds, "items/s")
    against = SET if SET in paths else PLAIN
    title = f"Claims, {arguments.per_call} a call"
    result.comparisons += [
        Comparison(title, "items/s", [NEW, KNOWN, BULK, RECALL], against, figures),
        Comparison("Memory of the server", "bytes an item", [NEW], PLAIN, found.bytes_an_item),
    ]
    return result


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

"""Claims a second and bytes an item of the registry.

`python benchmarks/registry.py [ITEMS] [CLAIMS PER CALL] [cluster]`

Item ids of 12 bytes, 4 codebooks of 256. The codes are drawn evenly, the worst case for memory: nearly every item is
alone under its prefix. Measured on a server of its own, beside the plain layout: two string keys an item, and a
counter for each group.
"""

from __future__ import annotations

import asyncio
import random
import sys
import tempfile
import time
from pathlib import Path

from redis import Redis

from service.registry import Claim, Registry
from service.registry.embedded import EmbeddedValkey

sys.path.append(str(Path(__file__).parents[1]))  # the cluster that the tests start
from tests.valkey_cluster import ValkeyCluster

SIZES = (256, 256, 256, 256)
CALLERS = 2
COMPACT = {"hash_max_listpack_entries": "512", "hash_max_listpack_value": "320"}  # as the embedded server has it


def claims_of(items: int) -> list[Claim]:
    """Claims of that many items, the same in every run."""
    draw = random.Random(0)
    return [
        Claim(f"{item:012d}", tuple(draw.randrange(size) for size in SIZES), draw.randbytes(8)) for item in range(items)
    ]


async def claim_all(url: str, claims: list[Claim], per_call: int) -> float:
    """The seconds that claiming takes, a few callers at once."""
    registry = await Registry.connect(url)
    record = await registry.record("default", "0123456789abcdef", SIZES)
    batches = iter([claims[start : start + per_call] for start in range(0, len(claims), per_call)])

    async def caller() -> None:
        for batch in batches:
            await record.claim(batch)

    started = time.perf_counter()
    await asyncio.gather(*[caller() for _ in range(CALLERS)])
    seconds = time.perf_counter() - started
    await registry.close()
    return seconds


def plainly(client: Redis, claims: list[Claim]) -> None:
    """Two string keys an item and a counter a group, as one would write it first."""
    prefix = "sid:default:0123456789abcdef"
    for start in range(0, len(claims), 1024):
        pipeline = client.pipeline(transaction=False)
        for claim in claims[start : start + 1024]:
            codes = "-".join(map(str, claim.codes))
            pipeline.set(f"{prefix}:item:{claim.item_id}", f"{codes}-0")
            pipeline.set(f"{prefix}:id:{codes}-0", claim.item_id)
            pipeline.incr(f"{prefix}:count:{codes}")
        pipeline.execute()


def kept_by(clients: list[Redis]) -> int:
    """Bytes of memory that these servers have in use, but for what they keep for their replicas."""
    memory = [client.info("memory") for client in clients]
    return sum(int(one["used_memory"]) - int(one["mem_replication_backlog"]) for one in memory)


def servers_s(clients: list[Redis]) -> float:
    """Seconds of processor time that they have spent, on scripts almost alone; not on waiting for the disk."""
    return sum(float(client.info("cpu")["used_cpu_user"]) for client in clients)


async def measure(url: str, clients: list[Redis], claims: list[Claim], per_call: int) -> None:
    """Prints the figures of one way to lay the servers out."""
    items = len(claims)
    empty, idle = kept_by(clients), servers_s(clients)
    new = await claim_all(url, claims, per_call)
    kept = kept_by(clients) - empty
    print(f"{items:,} items, {per_call} a call: {items / new:,.0f} new claims/s, {kept / items:.1f} bytes an item")
    print(f"of which the servers worked {1e6 * (servers_s(clients) - idle) / items:.1f} us a claim")
    some = claims[: min(items, 50_000)]
    known = await claim_all(url, some, per_call)
    print(f"the same again: {len(some) / known:,.0f} known claims/s")


async def main(items: int, per_call: int, layout: str = "single") -> None:
    """Prints the figures."""
    claims = claims_of(items)
    with tempfile.TemporaryDirectory(prefix="semid-") as directory:
        if layout == "cluster":
            cluster = ValkeyCluster(Path(directory), **COMPACT)
            await measure(cluster.url, [node.client() for node in cluster.primaries()], claims, per_call)
            cluster.stop()
            return
        server = await EmbeddedValkey(Path(directory)).start()
        client = Redis.from_url(server.url)
        await measure(server.url, [client], claims, per_call)
        client.flushall()
        empty = kept_by([client])
        await asyncio.to_thread(plainly, client, claims)
        print(f"the plain layout: {(kept_by([client]) - empty) / items:.1f} bytes an item")
        await server.stop()


if __name__ == "__main__":
    numbers, layouts = sys.argv[1:3], sys.argv[3:]
    asyncio.run(main(*map(int, [*numbers, *("200000", "256")[len(numbers) :]]), *layouts))

"""A record on a real server, beside what `occupancy` predicts of it: keys, entries of each bucket, encoding, memory."""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

import numpy as np
from redis import Redis

from benchmarks.harness import Check, Table, seconds
from benchmarks.occupancy import COMPACT_ENTRIES, Reverse, memory_bytes
from benchmarks.populations import Keys, item_ids, unpack
from service.registry import Registry
from service.registry.keys import RecordKeys
from service.semantic_id import CodeLayout
from tests.valkey import Valkey

NAME = "0123456789abcdef"
ITEMS_PER_BULK = 8192
ITEMS_PER_BUCKET = (100, 25)
KEYS_PER_READ = 1000
PAUSE_S = 0.01
COMPACT = {"hash_max_listpack_entries": str(COMPACT_ENTRIES), "hash_max_listpack_value": "320"}


class Cost(NamedTuple):
    """What items cost a server, each."""

    memory_bytes: float
    server_us: float
    log_bytes: float
    rewritten_bytes: float
    rewrite_s: float
    fork_us: float
    used_mb: float


def beside(codes: Keys, levels: int) -> tuple[Table, Check]:
    """Claim items with these codes, (N,) packed in any order, and compare; one server for each number of buckets."""
    table: Table = {}
    compared = differ = 0
    # Of a bulk, items of near codes are claimed together.
    bulks = [np.sort(codes[start : start + ITEMS_PER_BULK]) for start in range(0, len(codes), ITEMS_PER_BULK)]
    reverse = Reverse(np.concatenate(bulks), levels)
    ids = list(item_ids(len(codes)))
    for each in ITEMS_PER_BUCKET:
        buckets = max(1, len(codes) // each)
        forward = np.bincount([crc32(item_id) % buckets for item_id in ids], minlength=buckets)
        entries, size_bytes = reverse.counts(buckets)
        memory = memory_bytes(entries, size_bytes) + memory_bytes(forward, forward * reverse.forward_bytes)
        predicted = _predicted(reverse, forward, entries, buckets)
        with tempfile.TemporaryDirectory(prefix="semid-") as directory:
            server = Valkey(Path(directory), **COMPACT)
            try:
                cost = _claim(server, Path(directory), ids, unpack(codes, levels), buckets)
                real = _buckets(server)
            finally:
                server.kill()
        compared += len(predicted | real)
        differ += sum(predicted.get(key) != real.get(key) for key in predicted | real)
        row = f"{len(codes):,} items in {buckets:,} buckets"
        table[row] = {
            "keys": len(real),
            "bytes an item, predicted": memory / len(codes),
            "bytes an item": cost.memory_bytes,
            "server's µs an item": cost.server_us,
            "append-only bytes an item": cost.log_bytes,
            "rewritten bytes an item": cost.rewritten_bytes,
            "rewrite, µs an item": cost.rewrite_s * 1e6 / len(codes),
            "fork, µs a MB": cost.fork_us / cost.used_mb,
        }
    return table, Check("Buckets, their entries and encoding, beside those predicted", compared, differ)


Buckets = dict[bytes, tuple[int, bool]]


def _predicted(reverse: Reverse, forward: np.ndarray, entries: np.ndarray, buckets: int) -> Buckets:
    """Key -> its entries, and whether it is compact."""
    keys = RecordKeys(f"default:{NAME}", CodeLayout((256,) * reverse.levels), buckets)
    found = {keys.forward_bucket(number): int(count) for number, count in enumerate(forward)}
    found |= {keys.root: len(reverse.distinct(1))}
    for code, row in enumerate(entries):
        first = keys.layout.pack_prefix([code])
        found |= {keys.reverse_bucket(first, number): int(count) for number, count in enumerate(row)}
    return {key: (count, count <= COMPACT_ENTRIES) for key, count in found.items() if count}


def _buckets(server: Valkey) -> Buckets:
    """The same of a server; its facts and its log of changes are none."""
    found: Buckets = {}
    with server.client() as client:
        keys = [key for key in client.scan_iter(count=KEYS_PER_READ) if not key.endswith((b":meta", b":c", b":synced"))]
        for start in range(0, len(keys), KEYS_PER_READ):
            some = keys[start : start + KEYS_PER_READ]
            pipeline = client.pipeline(transaction=False)
            for key in some:
                pipeline.hlen(key)
                pipeline.object("encoding", key)
            answers = pipeline.execute()
            found |= dict(
                zip(some, zip(answers[::2], [one == b"listpack" for one in answers[1::2]], strict=True), strict=True)
            )
    return found


def _claim(server: Valkey, directory: Path, ids: list[bytes], codes: np.ndarray, buckets: int) -> Cost:
    """Claim all in bulks, and say what it cost the server."""
    digests = np.random.default_rng(0).integers(2**63, size=len(ids)).astype(np.uint64)

    async def claim() -> None:
        registry = await Registry.connect(server.url, buckets=buckets, changes_kept=0)
        record = await registry.record("default", NAME, (256,) * codes.shape[1])
        for start in range(0, len(ids), ITEMS_PER_BULK):
            bulk = slice(start, start + ITEMS_PER_BULK)
            await record.claim_columns(ids[bulk], digests[bulk], codes[bulk])
        await registry.close()

    with server.client() as client:
        client.config_set("auto-aof-rewrite-percentage", 0)
        empty, before = _memory(client), _cpu_s(client)
        asyncio.run(claim())
        memory, server_s, log = _memory(client) - empty, _cpu_s(client) - before, _log_bytes(directory)
        rewrite_s = seconds(lambda: _rewritten(client))
        rewritten, fork_us, used = _log_bytes(directory), client.info("stats")["latest_fork_usec"], _memory(client)
    each = 1 / len(ids)
    return Cost(
        memory * each, server_s * 1e6 * each, log * each, rewritten * each, rewrite_s, float(fork_us), used / 1e6
    )


def _rewritten(client: Redis) -> None:
    """Rewrite the append-only file, and wait."""
    client.bgrewriteaof()
    while client.info("persistence")["aof_rewrite_in_progress"]:
        time.sleep(PAUSE_S)


def _memory(client: Redis) -> int:
    return int(client.info("memory")["used_memory"])


def _cpu_s(client: Redis) -> float:
    found = client.info("cpu")
    return float(found["used_cpu_user"]) + float(found["used_cpu_sys"])


def _log_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("appendonlydir/*"))

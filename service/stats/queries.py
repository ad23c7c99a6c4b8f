"""The use case: how a record's codes are used, and how far what comes in lies from the training."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from models import Manifest
from service.answers import Answer
from service.decoding.snapshot import take
from service.records import Records
from service.registry.record import Record
from service.stats.drift import WINDOW_S, Drift
from service.stats.training import TAIL, expected_shares
from service.stats.usage import LevelUse, Use, use_of
from service.tokenizers import LoadedTokenizer, Tokenizers

RECORDS_KEPT = 16
PAUSES = 20  # counting has a twentieth of the time at most, however often it is asked for


class _Counted(NamedTuple):
    """A record's use, and when and how long it was counted."""

    record: Record
    use: Use
    at: datetime
    done: float
    took_s: float


class Statistics:
    """Counts one record at a time, and keeps what it counted of those last asked for."""

    def __init__(self, tokenizers: Tokenizers, records: Records) -> None:
        self._tokenizers = tokenizers
        self._records = records
        self._kept: deque[_Counted] = deque(maxlen=RECORDS_KEPT)
        self._counting = asyncio.Lock()

    async def stats(self, namespace: str, name: str | None, *, codewords: bool) -> Answer:
        """Answer `GET /stats`.

        Args:
            namespace: The catalogue's.
            name: The tokenizer's.
            codewords: Whether to tell the counts of every codeword.

        Raises:
            RegistryUnavailable: The registry cannot be reached, or changes faster than it can be read.
        """
        tokenizer = self._tokenizers.named(name)
        counted = await self._of(await self._records.of(namespace, tokenizer.manifest))
        report = _report(tokenizer.manifest)
        use = counted.use
        return {
            **tokenizer.origin(namespace),
            "revision": use.revision,
            "counted_at": counted.at,
            "items": use.items,
            "levels": [
                _level(number, level, report.get("levels"), codewords=codewords)
                for number, level in enumerate(use.levels, 1)
            ],
            "collisions": {
                "rate": use.collision_rate,
                "groups": use.groups,
                "largest_group": use.largest_group,
                "group_sizes": {str(size): count for size, count in use.group_sizes.items()},
                "training": _collisions(report.get("collisions")),
            },
            "drift": _drift(tokenizer),
        }

    async def _of(self, record: Record) -> _Counted:
        """The use of a record: of its present revision, or of one before where counting would be too often."""
        async with self._counting:
            last = next((one for one in self._kept if one.record is record), None)
            if last is not None and time.monotonic() - last.done < PAUSES * last.took_s:
                return last
            if last is not None:
                if last.use.revision == await record.changes.revision():
                    return last
                self._kept.remove(last)
            started = time.monotonic()
            trie = await take(record)
            use = await asyncio.to_thread(use_of, trie)
            done = time.monotonic()
            self._kept.append(_Counted(record, use, datetime.now(UTC), done, done - started))
            return self._kept[-1]


def _report(manifest: Manifest) -> Mapping[str, Any]:
    return manifest.report if isinstance(manifest.report, Mapping) else {}


def _level(number: int, level: LevelUse, trained: object, *, codewords: bool) -> Answer:
    """One level; beside it the same figures of the training, where the manifest tells them."""
    told = trained[number - 1] if isinstance(trained, Sequence) and len(trained) >= number else None
    return {
        "level": number,
        "codewords": len(level.counts),
        "used": level.used,
        "perplexity": level.perplexity,
        "entropy": level.entropy,
        "counts": level.counts.tolist() if codewords else None,
        "training": {name: told.get(name) for name in ("used", "perplexity", "entropy")}
        if isinstance(told, Mapping)
        else None,
    }


def _collisions(trained: object) -> Answer | None:
    if not isinstance(trained, Mapping):
        return None
    return {name: trained.get(name) for name in ("rate", "largest_group")}


def _drift(tokenizer: LoadedTokenizer) -> Answer:
    drift = Drift(tokenizer.errors.seen(), tokenizer.errors.training)
    training = drift.training
    return {
        "window_s": WINDOW_S,
        "rows": drift.seen.rows,
        "mean": drift.seen.mean,
        "counts": list(drift.seen.counts) if training else None,
        "expected_shares": list(expected_shares()) if training else None,
        "training": training.as_dict() if training else None,
        "tail": TAIL,
        "share_beyond_tail": drift.beyond,
        "population_stability_index": drift.stability_index,
        "verdict": drift.verdict,
        "meaning": drift.meaning,
    }

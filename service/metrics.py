"""Prometheus metrics, one registry of collectors for each app; those of several workers are told as one."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
    values,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector
from torch import Tensor

from models import Precision
from service.batching.lanes import Lane
from service.stats.minutes import Fellows
from service.stats.training import QUANTILES
from service.telemetry.serving import SERVING, Part

SUMMED_OVER_WORKERS: Final = "livesum"
_PID = ".pid"

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


class Metrics:
    """Everything the service counts."""

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self, fellows: Fellows | None = None) -> None:
        """Counts from nothing, or as one of several workers; see `shared_metrics`."""
        self.fellows = fellows
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a sample more for each, which several workers would not have
        self._collectors = collectors = CollectorRegistry()
        ProcessCollector(registry=collectors)  # process_resident_memory_bytes and its like
        self.requests = Counter(
            "semid_http_requests", "Requests by route and status", ["method", "route", "status"], registry=collectors
        )
        self.request_seconds = Histogram(
            "semid_http_request_seconds", "Time to answer", ["route"], buckets=_SECONDS, registry=collectors
        )
        self.items = Counter(
            "semid_items",
            "Items by outcome: created, known (answered without the model), existing, dry_run, failed",
            ["tokenizer", "outcome"],
            registry=collectors,
        )
        self.overflows = Counter(
            "semid_overflows", "Items placed at a next-nearest codeword", ["tokenizer"], registry=collectors
        )
        self.collisions = Counter(
            "semid_collisions",
            "Items that were given codes which others had before them: their collision suffix is above 0",
            ["tokenizer"],
            registry=collectors,
        )
        self.workers = Gauge(
            "semid_workers", "Processes that serve", registry=collectors, multiprocess_mode=SUMMED_OVER_WORKERS
        )
        self._queue_tokens = Gauge(
            "semid_queue_tokens",
            "Word pieces queued for the model",
            ["tokenizer", "lane"],
            registry=collectors,
            multiprocess_mode=SUMMED_OVER_WORKERS,
        )
        self.queue_tokens_limit = Gauge(
            "semid_queue_tokens_limit",
            "Word pieces that may be queued for all models together",
            registry=collectors,
            multiprocess_mode=SUMMED_OVER_WORKERS,
        )
        self._queue_seconds = Histogram(
            "semid_queue_seconds",
            "Time from the queue to a batch",
            ["tokenizer", "lane"],
            buckets=_SECONDS,
            registry=collectors,
        )
        self._batch_rows = Histogram(
            "semid_batch_rows", "Rows of a batch", ["tokenizer"], buckets=_SIZES, registry=collectors
        )
        self._batch_tokens = Histogram(
            "semid_batch_tokens", "Tokens of a batch", ["tokenizer"], buckets=_SIZES, registry=collectors
        )
        self._model_seconds = Histogram(
            "semid_model_seconds", "Time of the model for a batch", ["tokenizer"], buckets=_SECONDS, registry=collectors
        )
        self._recomputed = Counter(
            "semid_rows_recomputed",
            "Rows near a tie, computed again on the canonical path",
            ["tokenizer"],
            registry=collectors,
        )
        self._final = Counter(
            "semid_rows_final",
            "Rows by the path whose codes were final: bfloat16, float16, float32, float64, canonical",
            ["tokenizer", "path"],
            registry=collectors,
        )
        self._error_bound = Gauge(
            "semid_error_bound",
            "What a path's latents may be off by: rows with a smaller margin go on to a more exact path",
            ["tokenizer", "path"],
            multiprocess_mode="livemax",
            registry=collectors,
        )
        self._error_ranks = Histogram(
            "semid_quantization_error_rank",
            "Where quantization errors of what was encoded lie among those of the training items: 0.5 at their median",
            ["tokenizer"],
            buckets=tuple(QUANTILES.values()),
            registry=collectors,
        )
        self.registry_seconds = Histogram(
            "semid_registry_seconds", "Time of a registry call", ["call"], buckets=_SECONDS, registry=collectors
        )
        for counted in (self.requests, self.request_seconds, self.items, self.registry_seconds):
            counted.labels = cache(counted.labels)  # type: ignore[assignment,method-assign]  # asked for by every request

    def of_model(self, tokenizer: str) -> ModelMetrics:
        """What is counted of one tokenizer's model, by its full name."""
        return ModelMetrics(
            queue_tokens={lane: self._queue_tokens.labels(tokenizer, lane) for lane in Lane},
            queue_seconds={lane: self._queue_seconds.labels(tokenizer, lane) for lane in Lane},
            batch_rows=self._batch_rows.labels(tokenizer),
            batch_tokens=self._batch_tokens.labels(tokenizer),
            model_seconds=self._model_seconds.labels(tokenizer),
            recomputed=self._recomputed.labels(tokenizer),
            final=[
                self._final.labels(tokenizer, path.name.lower()) for path in Precision if path != Precision.UNDECIDED
            ],
        )

    def ranks_of_model(self, tokenizer: str) -> Ranks:
        """Where the drift of one tokenizer's contents is counted, by its full name."""
        return Ranks(self._error_ranks.labels(tokenizer))

    def bounds_of_model(self, tokenizer: str, bounds: Mapping[str, float | None]) -> None:
        """Tell the error bounds that a tokenizer works with, by path; None: the path is not taken."""
        for path, bound in bounds.items():
            if bound is not None:
                self._error_bound.labels(tokenizer, path).set(bound)

    def registry_call(self, call: str) -> RegistryCall:
        """Times a call of the registry, `with metrics.registry_call("claim"):`."""
        return RegistryCall(self.registry_seconds.labels(call), call)

    def render(self) -> bytes:
        """The exposition in Prometheus' text format; of all workers together, whichever is asked."""
        if self.fellows is None:
            return generate_latest(self._collectors)
        collectors = CollectorRegistry()
        collectors.register(CountsOfWorkers(self.fellows.directory))
        collectors.register(WorkerProcesses(self.fellows.directory))
        return generate_latest(collectors)


class Ranks:
    """Quantization errors by their places among those of the training items; any thread may count."""

    def __init__(self, histogram: Histogram) -> None:
        self._histogram = histogram

    def count(self, counts: Sequence[int], total: float) -> None:
        """Count many at once, which costs what one does.

        Args:
            counts: How many lie below the first training quantile, between each two, and beyond the last.
            total: The sum of their ranks.
        """
        # The library itself takes one value at a time; a batch has thousands.
        for bucket, count in zip(self._histogram._buckets, counts, strict=True):  # noqa: SLF001
            if count:
                bucket.inc(count)
        self._histogram._sum.inc(total)  # noqa: SLF001


class RegistryCall:
    """A call of the registry under way: timed for all, and for the request that it is made for."""

    __slots__ = ("_call", "_seconds", "_started")

    def __init__(self, seconds: Histogram, call: str) -> None:
        self._seconds = seconds
        self._call = call

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        ended = time.perf_counter()
        self._seconds.observe(ended - self._started)
        if (serving := SERVING.get()) is not None:
            serving.waited(Part.REGISTRY, ended - self._started)
            if serving.spans is not None:
                serving.spans.add("assign" if self._call == "claim" else self._call, self._started, ended)


def shared_metrics(directory: Path, place: int) -> Metrics:
    """The metrics of one of several workers, for all that is counted in this process from now on.

    Each worker counts in files of its own in a directory that they share, and tells the sums over all files. A worker
    that takes the place of one that ended goes on with its files: no counter falls, and there are never more files than
    places.

    Args:
        directory: The workers' own.
        place: A small number that no other running worker has.
    """
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(directory)  # where prometheus_client looks, and nowhere else
    _pid_file(directory, place).write_text(str(os.getpid()))
    values.ValueClass = values.MultiProcessValue(lambda: place)  # type: ignore[no-untyped-call]
    return Metrics(Fellows(directory, place))


def forget_gauges(directory: Path, place: int) -> None:
    """What the worker that had this place had just then, it has no more; what it counted stands."""
    mark_process_dead(place, str(directory))  # type: ignore[no-untyped-call]
    _pid_file(directory, place).unlink(missing_ok=True)


class CountsOfWorkers(Collector):
    """All that the workers counted, each in its files."""

    def __init__(self, directory: Path) -> None:
        """Of the workers that share this directory."""
        self._directory = directory

    def collect(self) -> Iterable[Metric]:
        """The sums. A file that a worker makes just now is empty for a moment, which its reader takes for broken."""
        files = [str(file) for file in self._directory.glob("*.db") if _size(file) > 0]
        metrics: Iterable[Metric] = MultiProcessCollector.merge(files)  # type: ignore[no-untyped-call]
        return metrics


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:  # gauges of a worker that has just ended
        return 0


class WorkerProcesses(Collector):
    """`process_resident_memory_bytes` and its like: sums over the workers, and the latest start."""

    def __init__(self, directory: Path) -> None:
        """Of the workers that share this directory."""
        self._directory = directory

    def collect(self) -> Iterable[Metric]:
        """The sums; a worker that has just ended is left out."""
        sums: dict[str, Metric] = {}
        for file in self._directory.glob(f"*{_PID}"):
            for metric in _of_process(file):
                known = sums.setdefault(metric.name, metric)
                if known is not metric:
                    both = (known.samples[0].value, metric.samples[0].value)
                    value = max(both) if metric.name == "process_start_time_seconds" else sum(both)
                    known.samples = [known.samples[0]._replace(value=value)]
        return sums.values()


def _of_process(pid_file: Path) -> Iterable[Metric]:
    try:
        pid = int(pid_file.read_text())
    except (OSError, ValueError):
        return ()
    return ProcessCollector(pid=lambda: pid, registry=None).collect()


def _pid_file(directory: Path, place: int) -> Path:
    return directory / f"{place}{_PID}"


@dataclass(frozen=True)
class ModelMetrics:
    """What is counted of one model."""

    queue_tokens: Mapping[Lane, Gauge]
    queue_seconds: Mapping[Lane, Histogram]
    batch_rows: Histogram
    batch_tokens: Histogram
    model_seconds: Histogram
    recomputed: Counter
    final: Sequence[Counter]

    def batch(self, *, rows: int, tokens: int, seconds: float, precision: Tensor) -> None:
        """Count one batch.

        Args:
            rows: How many.
            tokens: Of all rows.
            seconds: How long the model took.
            precision: (rows,) int64, of the path that each row was final on; rows that are undecided are not counted.
        """
        self.batch_rows.observe(rows)
        self.batch_tokens.observe(tokens)
        self.model_seconds.observe(seconds)
        self.rows_final(precision)

    def rows_final(self, precision: Tensor) -> None:
        """Count rows by the path (rows,) int64 that each was final on."""
        counts = precision.bincount(minlength=len(Precision)).tolist()
        for counter, count in zip(self.final, counts[: len(self.final)], strict=True):
            if count:
                counter.inc(count)
        if counts[Precision.CANONICAL]:
            self.recomputed.inc(counts[Precision.CANONICAL])

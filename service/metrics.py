"""Prometheus metrics, one registry of collectors for each app."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from service.lanes import Lane

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


class Metrics:
    """Everything the service counts."""

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self) -> None:
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
        self._queue_tokens = Gauge(
            "semid_queue_tokens", "Word pieces queued for the model", ["tokenizer", "lane"], registry=collectors
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
        self.registry_seconds = Histogram(
            "semid_registry_seconds", "Time of a registry call", ["call"], buckets=_SECONDS, registry=collectors
        )

    def of_model(self, tokenizer: str) -> ModelMetrics:
        """What is counted of one tokenizer's model, by its full name."""
        return ModelMetrics(
            queue_tokens={lane: self._queue_tokens.labels(tokenizer, lane) for lane in Lane},
            queue_seconds={lane: self._queue_seconds.labels(tokenizer, lane) for lane in Lane},
            batch_rows=self._batch_rows.labels(tokenizer),
            batch_tokens=self._batch_tokens.labels(tokenizer),
            model_seconds=self._model_seconds.labels(tokenizer),
            recomputed=self._recomputed.labels(tokenizer),
        )

    def render(self) -> bytes:
        """The exposition in Prometheus' text format."""
        return generate_latest(self._collectors)


@dataclass(frozen=True)
class ModelMetrics:
    """What is counted of one model."""

    queue_tokens: Mapping[Lane, Gauge]
    queue_seconds: Mapping[Lane, Histogram]
    batch_rows: Histogram
    batch_tokens: Histogram
    model_seconds: Histogram
    recomputed: Counter

    def batch(self, *, rows: int, tokens: int, seconds: float, recomputed: int) -> None:
        """Count one batch."""
        self.batch_rows.observe(rows)
        self.batch_tokens.observe(tokens)
        self.model_seconds.observe(seconds)
        self.recomputed.inc(recomputed)

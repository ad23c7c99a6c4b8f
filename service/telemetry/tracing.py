"""Traces by OpenTelemetry, where they are asked for and its SDK is installed (`pip install semid[otel]`).

FastAPI begins the span of a request, a part of its caller's trace (`traceparent`). What the request waits for are spans
below it: `queue` and `encode` in the model's queue and in its batches, `recall`, `assign`, `find` and `retire` in the
registry.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from typing import TYPE_CHECKING, Any

from opentelemetry import context as contexts
from opentelemetry import trace

from service.telemetry.serving import NO_ROUTE

if TYPE_CHECKING:
    from fastapi.telemetry import TelemetryConfig
    from opentelemetry.sdk.trace import TracerProvider

log = logging.getLogger(__name__)

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
REDACTED = "REDACTED"


def begin_tracing(*, asked: bool | None, version: str, paths: bool) -> Tracing | None:
    """Traces from now on, sent where OpenTelemetry's own variables say; None where there are to be none.

    Args:
        asked: Whether there are to be traces; None: where one of `ENDPOINTS` is set.
        version: The service's.
        paths: Whether spans have the paths of requests, which may hold item ids.
    """
    if not (any(map(os.environ.get, ENDPOINTS)) if asked is None else asked):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        log.warning("Traces are asked for, and there are none: install OpenTelemetry by `pip install semid[otel]`")
        return None
    name = os.environ.get("OTEL_SERVICE_NAME", "semid")
    provider = TracerProvider(resource=Resource.create({"service.name": name, "service.version": version}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracing(provider, version=version, paths=paths)


def telemetry_of(tracing: Tracing | None) -> TelemetryConfig:
    """What FastAPI is to tell of each request: its span, where there are traces, and nothing else."""
    nothing: TelemetryConfig = {"metrics": False, "logs": False, "operation_spans": False, "auto_configure": False}
    if tracing is None:
        return {"tracing": False, **nothing}
    return {"tracer_provider": tracing.provider, **nothing}


class Tracing:
    """The traces of a process.

    Args:
        provider: What spans are begun by and sent from.
        version: The service's.
        paths: See `begin_tracing`.
    """

    def __init__(self, provider: TracerProvider, *, version: str, paths: bool) -> None:
        self.provider = provider
        self._tracer: trace.Tracer = provider.get_tracer("semid", version)
        self._paths = paths

    def request(self, request_id: str) -> RequestSpans | None:
        """The spans of the request that is served just now; None where its trace is not sampled."""
        span = trace.get_current_span()
        if not span.is_recording():
            return None
        span.set_attribute("semid.request_id", request_id)
        if not self._paths:
            span.set_attribute("url.path", REDACTED)
            if "url.query" in (getattr(span, "attributes", None) or ()):
                span.set_attribute("url.query", REDACTED)
        return RequestSpans(self._tracer, span)

    async def end(self) -> None:
        """Send what is left."""
        await asyncio.to_thread(self.provider.shutdown)


class RequestSpans:
    """What a request waits for, as spans below its own."""

    def __init__(self, tracer: trace.Tracer, span: trace.Span) -> None:
        self._tracer = tracer
        self._span = span
        self._below: contexts.Context = trace.set_span_in_context(span)

    def add(self, name: str, started: float, ended: float) -> None:
        """Tell of something that took from one time to another, both by `time.perf_counter`."""
        epoch_s = time.time() - time.perf_counter()
        at: dict[str, Any] = {"start_time": int((epoch_s + started) * 1e9)}
        self._tracer.start_span(name, self._below, **at).end(int((epoch_s + ended) * 1e9))

    def answered(self, method: str, route: str) -> None:
        """Name the request by its route, where there is one; FastAPI does so where it finds the route itself."""
        if route == NO_ROUTE:
            return
        self._span.update_name(f"{method} {route}")
        self._span.set_attribute("http.route", route)

"""Traces, as a collector receives them."""

from __future__ import annotations

import builtins
import gzip
import logging
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from service.telemetry.tracing import begin_tracing, telemetry_of

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED, NOT_SAMPLED = f"00-{TRACE}-{PARENT}-01", f"00-{TRACE[::-1]}-{PARENT}-00"


class Collector(ThreadingHTTPServer):
    """What takes traces by OTLP over HTTP."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        super().__init__(("127.0.0.1", 0), _Taker)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def spans(self) -> list[Any]:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        requests = [ExportTraceServiceRequest.FromString(body) for body in self.bodies]
        found = [resource for request in requests for resource in request.resource_spans]
        assert {members(resource.resource)["service.name"] for resource in found} == {"semid"}
        return [span for resource in found for scope in resource.scope_spans for span in scope.spans]


class _Taker(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert self.path == "/v1/traces"
        body = self.rfile.read(int(self.headers["content-length"]))
        packed = self.headers.get("content-encoding") == "gzip"
        self.server.bodies.append(gzip.decompress(body) if packed else body)  # type: ignore[attr-defined]
        self.send_response(200)
        self.send_header("content-type", "application/x-protobuf")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing."""


def members(told: Any) -> dict[str, Any]:
    """Attributes by name."""
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in told.attributes}


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http.trace_exporter")
    running = Collector()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{running.server_port}")
    yield running
    running.shutdown()
    running.server_close()


def test_a_request_is_a_part_of_its_callers_trace_with_a_span_for_each_wait(
    collector: Collector, start_service: Callable[..., Any], data_dir: Path
) -> None:
    service = start_service(data_dir=data_dir)
    item = {"item_id": "secret-id", "text": "a kettle"}
    said = {"traceparent": SAMPLED, "X-Request-ID": "mine"}
    service.http.post("/tokenize", json={"items": [item]}, headers=said)
    service.http.get("/assignment/secret-id", params={"namespace": "secret-id"}, headers=said)
    service.http.get("/nothing/secret-id", headers={"traceparent": SAMPLED})
    service.http.get("/tokenizers", headers={"traceparent": NOT_SAMPLED})
    service.stop()  # what is left is sent

    spans = collector.spans()
    roots = {span.name: span for span in spans if span.parent_span_id.hex() == PARENT}
    assert set(roots) == {"POST /tokenize", "GET /assignment/{item_id}", "GET"}
    assert {span.trace_id.hex() for span in spans} == {TRACE}

    tokenize = roots["POST /tokenize"]
    below = {span.name: span for span in spans if span.parent_span_id == tokenize.span_id}
    assert set(below) == {"recall", "queue", "encode", "assign"}
    times = [(below[name].start_time_unix_nano, below[name].end_time_unix_nano) for name in below]
    for began, ended in times:
        assert tokenize.start_time_unix_nano <= began <= ended <= tokenize.end_time_unix_nano + 1_000_000
    in_order = [below[name].start_time_unix_nano for name in ("recall", "queue", "encode", "assign")]
    assert in_order == sorted(in_order)
    told = members(tokenize)
    assert (told["http.route"], told["http.response.status_code"]) == ("/tokenize", 200)
    assert told["semid.request_id"] == "mine"

    find = [span.name for span in spans if span.parent_span_id == roots["GET /assignment/{item_id}"].span_id]
    assert find == ["find"]
    assert not any(b"secret-id" in body for body in collector.bodies)


def test_there_are_none_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    assert begin_tracing(asked=None, version="1", paths=False) is None
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    assert begin_tracing(asked=False, version="1", paths=False) is None
    assert telemetry_of(None)["tracing"] is False


def test_without_the_extra_the_log_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    without = builtins.__import__

    def missing(name: str, *arguments: Any, **more: Any) -> Any:
        if name.startswith("opentelemetry.exporter"):
            raise ImportError(name)
        return without(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    with caplog.at_level(logging.WARNING):
        assert begin_tracing(asked=True, version="1", paths=False) is None

    assert "pip install semid[otel]" in caplog.text

"""Composition: settings -> registry, tokenizers -> use cases -> app."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.routing import Match, Route

from models import CheckpointError, Manifest, read_manifest
from service.access.door import Door, scope_of
from service.access.keys import Keys
from service.admin.directories import Directories
from service.admin.door import AdminDoor
from service.admin.hot_swap import HotSwap, Sources
from service.admin.plan import Plan, PlanFile
from service.admin.reports import Reports
from service.admin.routes import router as admin_router
from service.admin.schemas import DefaultRequest, LoadRequest
from service.assignments import Assignments
from service.bodies import BodyGate
from service.bulk.column_tokenization import ColumnTokenization
from service.bulk.entries import EntryTokenization
from service.bulk.row_thread import RowThread
from service.bulk.terms import StreamTerms
from service.decoding.queries import Decoding
from service.decoding.routes import router as decoding_router
from service.decoding.schemas import ChangesGoneProblem, NextRequest
from service.errors import PROBLEM_JSON, ItemError, MalformedRequest, SemidError, ServiceError
from service.explaining.queries import Explaining
from service.explaining.routes import router as explaining_router
from service.explaining.schemas import ExplainRequest
from service.http.direct import DirectRoutes
from service.http.pages import router as pages_router
from service.http.routes import router
from service.loading import Loader
from service.metrics import Metrics
from service.opening import Patience, open_registry
from service.overflow import OverflowPolicy
from service.records import Records
from service.registry import Registry
from service.registry.embedded import EmbeddedValkey
from service.registry.marks import Marks
from service.schemas import (
    AssignmentsRequest,
    LookupRequest,
    Problem,
    RetiredProblem,
    RetireRequest,
    TokenizeRequest,
    describe,
)
from service.settings import Settings
from service.state import State
from service.stats.queries import Statistics
from service.stats.routes import router as stats_router
from service.telemetry.requests import REQUEST_ID, RequestTelemetry
from service.telemetry.serving import request_id
from service.telemetry.tracing import begin_tracing, telemetry_of
from service.tokenization import Tokenization
from service.tokenizers import require_distinct

VERSION = "0.1.0"
CLIENT_CLOSED_REQUEST = 499
CORS: Mapping[str, Any] = {
    "allow_methods": ["GET", "POST", "DELETE"],
    "allow_headers": ["authorization", "content-type", "if-none-match", "traceparent", "x-request-id"],
    "expose_headers": ["etag", "retry-after", "server-timing", "x-request-id"],
}
ROUTERS = (router, decoding_router, explaining_router, stats_router, admin_router, pages_router)


def create_app(settings: Settings | None = None, metrics: Metrics | None = None) -> FastAPI:
    """The service as an ASGI app; everything it holds is made when it starts."""
    settings = settings or Settings()
    metrics = metrics or Metrics()
    tracing = begin_tracing(asked=settings.traces, version=VERSION, paths=settings.log_item_ids)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            if tracing is not None:
                stack.push_async_callback(tracing.end)
            try:
                app.state.semid = await compose(settings, metrics, stack)
            except (CheckpointError, SemidError) as error:
                app.state.refusal = str(error)
                raise
            metrics.workers.set(1)
            yield
            metrics.workers.set(0)
        del app.state.semid  # FastAPI's caches keep every app that ever was: with this one its model would stay

    app = FastAPIOffline(
        title="semid",
        summary="Catalogue items to Semantic IDs, and the durable record of which item holds which ID.",
        version=VERSION,
        lifespan=lifespan,
        telemetry=telemetry_of(tracing),
        redoc_url=None,
    )
    for part in ROUTERS:
        app.include_router(part)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(Exception, _unforeseen)
    answered = {ServiceError: _service_error, ItemError: _item_error, ClientDisconnect: _client_left}
    for error, handler in answered.items():
        app.add_exception_handler(error, handler)
    app.add_middleware(DirectRoutes, routes=[route for part in ROUTERS for route in part.routes], handlers=answered)
    if settings.keys_file is not None:
        app.add_middleware(Door, keys=lambda: app.state.semid.keys, answer=_service_error)
    if settings.cors_origins:
        app.add_middleware(CORSMiddleware, allow_origins=settings.cors_origins, **CORS)
    app.add_middleware(  # around the others
        RequestTelemetry,
        metrics=metrics,
        tracing=tracing,
        access_log=settings.access_log,
        log_paths=settings.log_item_ids,
    )
    return app


async def open_records(settings: Settings, stack: AsyncExitStack) -> tuple[list[Manifest], Registry, Records]:
    """What needs no model: the manifests, and the registry with a record of each; the stack closes it.

    Raises:
        CheckpointError: A checkpoint has no manifest.
        SemidError: The registry refuses or cannot be reached in time, or a tokenizer is given twice.
    """
    manifests = [read_manifest(directory) for directory in settings.checkpoints]
    require_distinct(manifests)
    marks = Marks.open(settings.data_dir)
    stack.push_async_callback(marks.close)
    patience = Patience(settings.registry_wait_s)
    records = Records(registry := await open_registry(settings, stack, marks, patience))
    for manifest in manifests:  # found out now, not at the first request: whether its record can be read
        await patience.answer(partial(records.of, "default", manifest))
    return manifests, registry, records


async def compose(settings: Settings, metrics: Metrics, stack: AsyncExitStack) -> State:
    """Make the parts and put them together; what is started is stopped by the stack, in reverse."""
    keys = None if settings.keys_file is None else Keys(settings.keys_file)
    manifests, registry, records = await open_records(settings, stack)
    swap = await _begin_swap(settings, manifests, Loader(settings, metrics), records)
    stack.push_async_callback(swap.close)
    tokenizers = swap.tokenizers
    tokenization = Tokenization(
        tokenizers=tokenizers,
        records=records,
        max_items=settings.max_items,
        overflow=OverflowPolicy(settings.overflow),
        metrics=metrics,
    )
    row_thread = stack.enter_context(RowThread())
    columns = ColumnTokenization(tokenization, records, metrics, row_thread)
    return State(
        assignments=Assignments(tokenizers, records, settings.max_lookups, metrics),
        columns=columns,
        entries=EntryTokenization(tokenization, columns, row_thread),
        row_thread=row_thread,
        decoding=Decoding(tokenizers, records, max_prefixes=settings.max_lookups, max_wait_s=settings.max_wait_s),
        explaining=Explaining(tokenizers, records),
        statistics=Statistics(tokenizers, records),
        tokenizers=tokenizers,
        registry=registry,
        gate=BodyGate(
            max_body_bytes=settings.max_body_bytes,
            inflight_bytes=settings.inflight_bytes,
            timeout_s=settings.body_timeout_s,
        ),
        terms=StreamTerms(settings.stream_timeout_s),
        metrics=metrics,
        keys=keys,
        swap=swap,
        admin_door=AdminDoor(settings.host, has_keys=keys is not None),
        registry_is_shared=settings.redis_url
        not in {None, EmbeddedValkey(settings.data_dir).url},  # workers are told it
    )


def plan_of(settings: Settings, manifests: Sequence[Manifest]) -> PlanFile:
    """Which tokenizers to load: those of the settings, whose manifests these are, or what calls have changed it to."""
    named = {manifest.full_name: path for manifest, path in zip(manifests, settings.checkpoints, strict=True)}
    return PlanFile(settings.data_dir / "tokenizers", Plan.of_settings(named))


async def _begin_swap(settings: Settings, manifests: Sequence[Manifest], loader: Loader, records: Records) -> HotSwap:
    plans = plan_of(settings, manifests)
    if settings.workers == 1:  # else their supervisor has
        plans.begin()
    named = {manifest.full_name: path for manifest, path in zip(manifests, settings.checkpoints, strict=True)}
    directories = Directories(settings.checkpoint_dirs, settings.checkpoints)
    sources = Sources(loader, records, directories, named)
    return await HotSwap.begin(sources, plans, Reports(plans.path.parent), settings.max_tokenizers)


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, with the schemas of the bodies that the routes read themselves."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        for model in (
            TokenizeRequest,
            LookupRequest,
            AssignmentsRequest,
            RetireRequest,
            Problem,
            RetiredProblem,
            ChangesGoneProblem,
            NextRequest,
            ExplainRequest,
            LoadRequest,
            DefaultRequest,
        ):
            schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas.update(schema.pop("$defs", {}))
            schemas[model.__name__] = schema
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                if (needed := scope_of(method.upper(), path)) is not None:
                    operation["security"] = [{}, {"key": []}]  # none is asked for where the service has no keys
                    operation["x-semid-scope"] = needed
        app.openapi_schema = document
    return app.openapi_schema


def _problem(problem: dict[str, Any], headers: dict[str, str] | None = None) -> Response:
    told = {**problem, "request_id": request_id()}
    return Response(orjson.dumps(told, option=orjson.OPT_UTC_Z), problem["status"], headers, PROBLEM_JSON)


async def _service_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    return _problem(error.as_problem(), error.headers())


async def _item_error(_: Request, error: Exception) -> Response:
    """Of the item that is all of a request; one among others has its error in its place."""
    assert isinstance(error, ItemError)
    return _problem(error.as_problem())


async def _validation_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return _problem(MalformedRequest(describe(error.errors())).as_problem())


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    if "Allow" in headers:
        headers["Allow"] = _allowed(request) or headers["Allow"]
    problem = {"type": "about:blank", "title": error.detail, "detail": error.detail, "status": error.status_code}
    return _problem(problem, headers)


def _allowed(request: Request) -> str:
    """The methods of all routes of a path; the router names those of the first alone."""
    routes = [route for part in ROUTERS for route in part.routes if isinstance(route, Route)]
    matching = [route for route in routes if route.matches(request.scope)[0] is not Match.NONE]
    methods = {method for route in matching for method in route.methods or ()}
    return ", ".join(sorted(methods | ({"HEAD"} if "GET" in methods else set())))


async def _client_left(_request: Request, _error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _unforeseen(_request: Request, _error: Exception) -> Response:
    """Answered around all else, so that it has to say itself which request it is of."""
    problem = SemidError("an unforeseen error; the service's log has it").as_problem()
    return _problem(problem, {REQUEST_ID.decode(): request_id() or ""})

"""The E2B-compatible REST API as one ASGI application."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import FastAPI, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from penstock import __version__
from penstock.api import checkpoints, events, keys, nodes, observe, problems, quarantine, sandboxes, templates
from penstock.api.bounds import BodyLimit
from penstock.api.front import Front

_EXPOSED = ["X-Next-Token", "X-Total-Running", "Retry-After"]


def build(front: Front, registry: CollectorRegistry, *, ready: Callable[[], bool]) -> FastAPI:
    """The application. `ready()` is what /health reports; `registry` holds the metrics of the whole process."""
    app = FastAPI(
        title="Penstock",
        version=__version__,
        summary="E2B-compatible sandboxes",
        docs_url=None,  # the interactive pages load scripts from a public network
        redoc_url=None,
        separate_input_output_schemas=False,
    )
    app.state.front = front
    app.state.ready = ready  # streams end when the daemon begins to stop
    problems.install(app)
    app.add_middleware(BodyLimit)
    app.add_middleware(
        CORSMiddleware, allow_origins=["*"], allow_methods=["*"], allow_headers=["*"], expose_headers=_EXPOSED
    )
    app.add_middleware(_Measured, registry=registry, monotonic=front.clock.monotonic)

    @app.get("/health", tags=["operate"])
    async def health() -> Response:
        if not ready():
            return problems.problem(503, "starting or stopping", headers={"Retry-After": "1"})
        return PlainTextResponse("Health check successful")

    @app.get("/metrics", tags=["operate"])
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    # `observe` first: /sandboxes/metrics must not be read as the sandbox called "metrics". `checkpoints` last: its
    # deletion takes whatever comes after /templates/.
    for room in (observe, sandboxes, templates, keys, nodes, events, quarantine, checkpoints):
        app.include_router(room.router)
    return app


class _Measured:
    """Counts and times every request by its route template (never by its path, which has no bound)."""

    def __init__(self, app: ASGIApp, *, registry: CollectorRegistry, monotonic: Callable[[], float]) -> None:
        self._app, self._monotonic = app, monotonic
        self._requests = Counter(
            "penstock_api_requests", "Requests by route and status", ["route", "method", "status"], registry=registry
        )
        self._seconds = Histogram("penstock_api_request_seconds", "Duration by route", ["route"], registry=registry)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = self._monotonic(), 500

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            route = getattr(scope.get("route"), "path", "unknown")
            self._requests.labels(route, scope["method"], status).inc()
            self._seconds.labels(route).observe(self._monotonic() - started)

"""Errors at the edge: one mapping from the error tree to HTTP, and one body for all of them."""

from __future__ import annotations

import math
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException as StarletteHTTPException
from structlog import get_logger

from penstock.core.errors import Kind, PenstockError

log = get_logger("api")

STATUS: Final[dict[Kind, int]] = {
    Kind.INVALID: 400,
    Kind.UNAUTHENTICATED: 401,
    Kind.FORBIDDEN: 403,
    Kind.NOT_FOUND: 404,
    Kind.CONFLICT: 409,
    Kind.EXHAUSTED: 429,
    Kind.INTERNAL: 500,
    Kind.UNSUPPORTED: 501,
    Kind.UNAVAILABLE: 503,
    Kind.DEADLINE: 504,
}


def problem(status: int, message: str, *, code: str = "", headers: dict[str, str] | None = None) -> Response:
    """The body every E2B SDK reads: `{code, message, error_code?}`."""
    body: dict[str, Any] = {"code": status, "message": message}
    if code:
        body["error_code"] = code
    return JSONResponse(body, status_code=status, headers=headers)


def respond(error: PenstockError) -> Response:
    """The reply to an error of ours. A limit tells the SDK not to hammer; what passes tells when to come back."""
    status = STATUS[error.kind]
    headers: dict[str, str] = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if status in (429, 501, 504):
        # Without it the SDK repeats 429, 502, 503 and 504 three times (e2b-sdk 2): a limit would cost four calls.
        headers["Should-Retry"] = "false"
    code = "" if error.kind in (Kind.INVALID, Kind.NOT_FOUND, Kind.UNAUTHENTICATED) else error.code
    return problem(status, str(error), code=code, headers=headers)


def install(app: FastAPI) -> None:
    """Register the mapping on `app`. What nobody raised on purpose is a 500 whose cause only the log knows."""

    @app.exception_handler(PenstockError)
    async def ours(_: Request, error: PenstockError) -> Response:
        if error.kind is Kind.INTERNAL:
            log.error("request failed", code=error.code, error=str(error))
        return respond(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return problem(400, f"validation error: the body is not JSON ({first.get('ctx', {}).get('error', '')})")
        where = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path", "header"))
        return problem(400, f"validation error: {where or 'body'}: {first['msg']}")

    @app.exception_handler(StarletteHTTPException)
    async def plain(request: Request, error: StarletteHTTPException) -> Response:
        message = str(error.detail)
        if error.status_code == 404:
            message = f"no such endpoint: {request.method} {request.url.path}"
        return problem(error.status_code, message, headers=dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        log.error("bug in a request handler", path=request.url.path, exc_info=error)
        return problem(500, "internal error; the daemon's log has the cause", code="internal")

"""Errors at the edge: one mapping from the error tree to HTTP, and one body for all of them."""

from __future__ import annotations

import math
import re
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException as StarletteHTTPException
from structlog import get_logger

from penstock.core.errors import Kind, PenstockError
from penstock.model.ids import mint

log = get_logger("api")

REFERENCE_LENGTH: Final = 10
# Two segments at least: a lone "/s" or "and/or" is no path of a host.
_PATH: Final = re.compile(r"(?<![\w/.])/[\w.@+~-]+(?:/[\w.@+~-]*)+")

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
_TOLD_BY_STATUS: Final = frozenset({"invalid", "not_found", "unauthenticated"})


def problem(status: int, message: str, *, code: str = "", headers: dict[str, str] | None = None) -> Response:
    """The body every E2B SDK reads: `{code, message, error_code?}`."""
    body: dict[str, Any] = {"code": status, "message": message}
    if code:
        body["error_code"] = code
    return JSONResponse(body, status_code=status, headers=headers)


def without_paths(text: str) -> str:
    """`text` with every absolute path taken out: how this host is laid out is no caller's business."""
    return _PATH.sub("…", text)


def said(error: PenstockError, reference: str) -> str:
    """What a caller is told. What we keep to ourselves is in the log, under `reference`.

    An error of the caller's own making (bad input, a limit, a state) speaks of what they sent, and is told whole. One
    of ours may name files, processes and system calls of this host.
    """
    if error.kind is Kind.INTERNAL:
        told = f"{error.what}: {error.which}" if error.which else error.what
        return f"{without_paths(told)} (internal error, reference {reference})"
    whole = str(error)
    if error.kind not in (Kind.UNAVAILABLE, Kind.DEADLINE):
        return whole
    told = without_paths(whole)
    return told if told == whole else f"{told} (reference {reference})"


def respond(error: PenstockError, reference: str) -> Response:
    """The reply to an error of ours. A limit tells the SDK not to hammer; what passes tells when to come back."""
    status = STATUS[error.kind]
    headers: dict[str, str] = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if status in (429, 501, 504):
        # Without it the SDK repeats 429, 502, 503 and 504 three times (e2b-sdk 2): a limit would cost four calls.
        headers["Should-Retry"] = "false"
    code = "" if error.code in _TOLD_BY_STATUS else error.code
    return problem(status, said(error, reference), code=code, headers=headers)


def install(app: FastAPI) -> None:
    """Register the mapping on `app`. What nobody raised on purpose is a 500 whose cause only the log knows."""

    @app.exception_handler(PenstockError)
    async def ours(request: Request, error: PenstockError) -> Response:
        reference = _reference(request)
        if error.kind is Kind.INTERNAL:
            log.error("request failed", reference=reference, code=error.code, error=str(error))
        elif error.kind in (Kind.UNAVAILABLE, Kind.DEADLINE):
            log.warning("request not served", reference=reference, code=error.code, error=str(error))
        return respond(error, reference)

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
        reference = _reference(request)
        log.error("bug in a request handler", reference=reference, path=request.url.path, exc_info=error)
        return problem(500, f"internal error, reference {reference}", code="internal")


def _reference(request: Request) -> str:
    """Names one failed request, in its answer and in the log."""
    return mint(request.app.state.front.rng, REFERENCE_LENGTH)

"""What the ingress itself answers: errors as JSON for programs and as a page for people.

Bodies are exact: the E2B SDKs search them for `was not found` and `port is not open` (spec/e2b-sdk.md 5).
"""

from __future__ import annotations

import html
from http import HTTPStatus
from typing import Final

import msgspec

from penstock.wire import routing
from penstock.wire.http1 import RequestHead

TRAFFIC_HEADER: Final = routing.TRAFFIC_TOKEN_HEADER.decode()
_BROWSERS: Final = (b"mozilla", b"chrome", b"safari", b"firefox", b"edge", b"opera", b"msie")
_SCRIPTED: Final = frozenset({b"cors", b"no-cors", b"same-origin", b"websocket"})


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """An answer the ingress gives by itself. Fields that are None do not appear in the body."""

    status: int
    message: str
    sandbox: str | None = None
    port: int | None = None
    connection_limit: int | None = None
    path: str | None = None
    retry_after_s: int | None = None
    cause: str = ""  # label of the metric; a closed set

    def fields(self) -> dict[str, object]:
        named: dict[str, object] = {"sandboxId": self.sandbox, "message": self.message, "port": self.port}
        named |= {"connectionLimit": self.connection_limit, "path": self.path}
        return {name: value for name, value in named.items() if value is not None} | {"code": self.status}


def sandbox_not_found(sandbox: str) -> Refusal:
    return Refusal(status=502, sandbox=sandbox, message="The sandbox was not found", cause="not_found")


def port_closed(sandbox: str, port: int) -> Refusal:
    message = "The sandbox is running but port is not open"
    return Refusal(status=502, sandbox=sandbox, port=port, message=message, cause="port_closed")


def upstream_failed(sandbox: str, why: str) -> Refusal:
    return Refusal(status=502, sandbox=sandbox, message=f"The server in the sandbox failed: {why}", cause="upstream")


def token_missing(sandbox: str) -> Refusal:
    message = f"This port needs a traffic access token: header {TRAFFIC_HEADER} is missing"
    return Refusal(status=403, sandbox=sandbox, message=message, cause="token")


def token_invalid(sandbox: str) -> Refusal:
    message = f"The traffic access token in header {TRAFFIC_HEADER} is invalid"
    return Refusal(status=403, sandbox=sandbox, message=message, cause="token")


def reserved_path(path: str) -> Refusal:
    message = "This path is reserved for the platform's control plane"
    return Refusal(status=404, path=path, message=message, cause="reserved")


def too_many_connections(sandbox: str, limit: int) -> Refusal:
    message = "Too many connections to the sandbox are open"
    return Refusal(status=429, sandbox=sandbox, message=message, connection_limit=limit, retry_after_s=1, cause="limit")


def resume_denied(sandbox: str) -> Refusal:
    message = "The sandbox is paused, and this request may not resume it"
    return Refusal(status=403, sandbox=sandbox, message=message, cause="token")


def still_changing(sandbox: str) -> Refusal:
    return Refusal(status=409, sandbox=sandbox, message="sandbox is still transitioning", cause="resume")


def team_limit(sandbox: str) -> Refusal:
    message = "The sandbox is paused, and its team has reached its limit of concurrent sandboxes"
    return Refusal(status=429, sandbox=sandbox, message=message, retry_after_s=5, cause="resume")


def too_many_waiting(sandbox: str) -> Refusal:
    message = "Too many requests wait for the sandbox to be resumed"
    return Refusal(status=429, sandbox=sandbox, message=message, retry_after_s=1, cause="limit")


def not_resumed(sandbox: str) -> Refusal:
    message = "The sandbox is paused and could not be resumed now"
    return Refusal(status=503, sandbox=sandbox, message=message, retry_after_s=2, cause="resume")


def full() -> Refusal:
    return Refusal(status=503, message="The ingress has no descriptor left", retry_after_s=1, cause="full")


def starting() -> Refusal:
    return Refusal(status=503, message="The ingress is starting", retry_after_s=1, cause="starting")


def bad_request(status: int, why: str) -> Refusal:
    return Refusal(status=status, message=why, cause="bad_request")


def wants_json(head: RequestHead) -> bool:
    """JSON unless a person's browser navigates here. Source: spec/e2b.md 3.1."""
    accept = head.header(b"accept").lower()
    if b"application/json" in accept and b"text/html" not in accept:
        return True
    mode = head.header(b"sec-fetch-mode").lower()
    if mode in _SCRIPTED or head.header(b"x-requested-with"):
        return True
    if mode == b"navigate":
        return False
    agent = head.header(b"user-agent").lower()
    return not any(browser in agent for browser in _BROWSERS)


def render(refusal: Refusal, head: RequestHead | None, *, close: bool) -> bytes:
    """The whole response. `head` chooses JSON or HTML, and no body for HEAD; None (unreadable head) means JSON."""
    if head is None or wants_json(head):
        kind, body = "application/json", msgspec.json.encode(refusal.fields())
    else:
        kind, body = "text/html", _page(refusal).encode()
    return respond(
        refusal.status,
        f"{kind}; charset=utf-8",
        body,
        bodiless=head is not None and head.method == b"HEAD",
        close=close,
        retry_after_s=refusal.retry_after_s,
    )


def respond(
    status: int, kind: str, body: bytes, *, bodiless: bool = False, close: bool, retry_after_s: int | None = None
) -> bytes:
    lines = [f"HTTP/1.1 {status} {_phrase(status)}", f"Content-Type: {kind}", f"Content-Length: {len(body)}"]
    lines.append("Cache-Control: no-store")
    if retry_after_s is not None:
        lines.append(f"Retry-After: {retry_after_s}")
    if close:
        lines.append("Connection: close")
    head = "\r\n".join([*lines, "", ""]).encode("ascii")
    return head if bodiless else head + body


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Error"


def _page(refusal: Refusal) -> str:
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>"
        for name, value in refusal.fields().items()
        if name != "message"
    )
    title = html.escape(refusal.message)
    return (
        f'<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        "<style>body{font:16px/1.5 system-ui,sans-serif;max-width:36rem;margin:15vh auto;padding:0 1rem}"
        "th{text-align:left;padding-right:1rem;font-weight:600}</style></head>"
        f"<body><h1>{title}</h1><table>{rows}</table></body></html>"
    )

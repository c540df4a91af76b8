"""Bounds on what a request may send, before any handler sees it."""

from __future__ import annotations

import contextlib
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from penstock.api.problems import problem
from penstock.core.deadlines import DeadlinePassed, within

BODY_BYTES_MAX: Final = 16 * 1024 * 1024  # the original's limit (e2b 1.6)
# What is still read of a body that is refused, to nowhere: a client that writes all of it before it looks at the answer
# would meet a reset instead, since closing a socket with unread bytes resets it (RFC 9112, 9.6).
DISCARD_BYTES_MAX: Final = 64 * 1024 * 1024
DISCARD_S: Final = 5.0


class BodyLimit:
    """Answers 413 to a body above `bytes_max`, by its Content-Length or, chunked, as soon as it grows too long."""

    def __init__(self, app: ASGIApp, *, bytes_max: int = BODY_BYTES_MAX) -> None:
        self._app, self._bytes_max = app, bytes_max

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > self._bytes_max:
            if b"expect" not in dict(scope["headers"]):  # who asks first waits for our word, and sends nothing then
                await _discard(receive)
            await self._refuse(scope, receive, send)
            return
        seen, started = 0, False

        async def bounded() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._bytes_max:
                raise _TooLarge
            return message

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, bounded, watched)
        except _TooLarge:
            if not started:
                await _discard(receive)
                await self._refuse(scope, receive, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        limit = self._bytes_max // (1024 * 1024)
        reply = problem(413, f"the body is larger than {limit} MiB", headers={"Connection": "close"})
        await reply(scope, receive, send)


async def _discard(receive: Receive) -> None:
    """Read what is left of the body, bounded in bytes and time."""
    left_bytes = DISCARD_BYTES_MAX
    with contextlib.suppress(DeadlinePassed):
        async with within(DISCARD_S, "the rest of a refused body"):
            while left_bytes > 0:
                message = await receive()
                if message["type"] != "http.request" or not message.get("more_body"):
                    return
                left_bytes -= len(message.get("body", b""))


class _TooLarge(Exception):
    pass

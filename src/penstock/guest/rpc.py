"""Connect calls on top of the HTTP server: the JSON codec, unary and streaming, errors in Connect's words.

    rpc.unary("/filesystem.Filesystem/Stat", stat)                  # async (call, message) -> message
    rpc.server_stream("/filesystem.Filesystem/WatchDir", watch_dir)   # async (call, message, events) -> None
    rpc.client_stream("/process.Process/StreamInput", stream_input)   # async (call, messages) -> message

A handler raises ConnectError (or any PenstockError) to fail its call. Unknown fields of messages are ignored.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

from penstock.core.deadlines import within
from penstock.core.errors import PenstockError
from penstock.guest.access import basic_user
from penstock.guest.exchange import Disconnected, Exchange, HttpError, Stream
from penstock.guest.server import Routes
from penstock.guest.settings import Settings
from penstock.guest.users import User, Users
from penstock.wire import connect
from penstock.wire.connect import Code, ConnectError

KEEPALIVE_DEFAULT_S: Final = 90.0
KEEPALIVE_MAX_S: Final = 3600.0
TIMEOUT_DIGITS_MAX: Final = 10  # of Connect-Timeout-Ms; source: the protocol
KEEPALIVE: Final = b"keepalive-ping-interval"

Message = dict[str, Any]
Unary = Callable[["Call", Message], Awaitable[Message]]
ServerStream = Callable[["Call", Message, "Events"], Awaitable[None]]
ClientStream = Callable[["Call", AsyncIterator[Message]], Awaitable[Message]]


class Call:
    """What a call says beside its message."""

    __slots__ = ("_settings", "_users", "exchange", "timeout_s")

    def __init__(self, exchange: Exchange, users: Users, settings: Settings) -> None:
        self.exchange = exchange
        self._users, self._settings = users, settings
        self.timeout_s = _parse_timeout(exchange)  # None: no limit

    @property
    def user(self) -> User:
        """Whom the call acts as: Basic credentials, else the sandbox's default. Raises UnknownUser."""
        return self._users.get(self.user_name)

    @property
    def user_name(self) -> str:
        """Its name, not looked up."""
        try:
            name = basic_user(self.exchange)
        except HttpError as error:
            raise ConnectError(Code.UNAUTHENTICATED, error.message) from None
        return name or self._settings.user

    @property
    def keepalive_s(self) -> float:
        """Silence after which a stream owes its client a keepalive event; a nonsensical wish counts as none."""
        text = self.exchange.header_text(KEEPALIVE)
        if not text.isascii() or not text.isdigit() or len(text) > 6 or not int(text):
            return KEEPALIVE_DEFAULT_S
        return min(float(text), KEEPALIVE_MAX_S)


class Events:
    """The answers of a streaming call. The response head leaves with the first event, in one packet."""

    __slots__ = ("_exchange", "_stream")

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._stream: Stream | None = None

    async def send(self, message: Message) -> None:
        """Returns when the client has room for more. Raises Disconnected."""
        await self.send_payload(json.dumps(message).encode())

    async def send_payload(self, payload: bytes) -> None:
        """`send` of a message that is encoded already."""
        data = connect.frame(payload)
        if self._stream is None:
            self._stream = await self._exchange.start_stream(200, _STREAM_FIELDS, first=data)
        else:
            await self._stream.write(data)

    def push(self, frame: bytes) -> bool:
        """Send an envelope (`connect.frame`) without waiting, after the first event was sent. False: the client is
        slow, stop until `on_writable` calls back. Raises Disconnected."""
        assert self._stream is not None, "the first event is sent with `send`"
        return self._stream.push(frame)

    def on_writable(self, callback: Callable[[], None]) -> None:
        assert self._stream is not None
        self._stream.on_writable(callback)

    async def finish(self, error: ConnectError | None = None, *, last: bytes = b"") -> None:
        """End the stream; `last` is one more envelope that leaves with the end."""
        end = last + connect.end_frame(error)
        if self._stream is None:
            await self._exchange.respond(200, _STREAM_FIELDS, end)
        else:
            await self._stream.finish(end)

    @property
    def finished(self) -> bool:
        return self._exchange.answered and (self._stream is None or self._stream.finished)


class Rpc:
    """Registers calls on routes. `on_fault(exchange, error)` hears of handlers' bugs."""

    def __init__(
        self, routes: Routes, users: Users, settings: Settings, on_fault: Callable[[Exchange, BaseException], None]
    ) -> None:
        self._routes, self._users, self._settings, self._on_fault = routes, users, settings, on_fault

    def unary(self, path: str, handler: Unary) -> None:
        async def serve(exchange: Exchange) -> None:
            _check_codec(exchange, connect.UNARY_TYPE, b"content-encoding")
            try:
                call = Call(exchange, self._users, self._settings)
                message = _decode(await _read(exchange, connect.MESSAGE_BYTES_MAX))
                async with within(call.timeout_s, f"the answer to {path}"):
                    answer = await handler(call, message)
            except Disconnected:
                raise
            except Exception as error:
                failed = self._as_connect_error(exchange, error)
                await exchange.respond(failed.connect_code.status, _UNARY_FIELDS, connect.error_body(failed))
                return
            exchange.answer(200, _UNARY_FIELDS, json.dumps(answer).encode())

        self._routes.add("POST", path, serve)

    def server_stream(self, path: str, handler: ServerStream, *, limits_itself: bool = False) -> None:
        """With `limits_itself` the handler alone decides what Connect-Timeout-Ms means."""

        async def serve(exchange: Exchange) -> None:
            _check_codec(exchange, connect.STREAM_TYPE, b"connect-content-encoding")
            events = Events(exchange)
            try:
                call = Call(exchange, self._users, self._settings)
                message = await _read_only_message(exchange)
                async with within(None if limits_itself else call.timeout_s, f"the end of {path}"):
                    await handler(call, message, events)
            except Disconnected:
                raise
            except Exception as error:
                if not events.finished:
                    await events.finish(self._as_connect_error(exchange, error))
                return
            if not events.finished:
                await events.finish()

        self._routes.add("POST", path, serve)

    def client_stream(self, path: str, handler: ClientStream) -> None:
        async def serve(exchange: Exchange) -> None:
            _check_codec(exchange, connect.STREAM_TYPE, b"connect-content-encoding")
            events = Events(exchange)
            try:
                call = Call(exchange, self._users, self._settings)
                async with within(call.timeout_s, f"the end of {path}"):
                    answer = await handler(call, _read_messages(exchange))
            except Disconnected:
                raise
            except Exception as error:
                await events.finish(self._as_connect_error(exchange, error))
                return
            await events.finish(last=connect.frame(json.dumps(answer).encode()))

        self._routes.add("POST", path, serve)

    def _as_connect_error(self, exchange: Exchange, error: Exception) -> ConnectError:
        if isinstance(error, PenstockError):
            return connect.as_connect_error(error)
        if isinstance(error, HttpError):
            code = Code.RESOURCE_EXHAUSTED if error.status == 413 else Code.INVALID_ARGUMENT
            return ConnectError(code, error.message)
        self._on_fault(exchange, error)
        return ConnectError(Code.INTERNAL, "internal error of the guest; its log says more")


_UNARY_FIELDS: Final = ((b"content-type", connect.UNARY_TYPE),)
_STREAM_FIELDS: Final = ((b"content-type", connect.STREAM_TYPE),)


def _check_codec(exchange: Exchange, wanted: bytes, encoding_field: bytes) -> None:
    given = exchange.header(b"content-type").partition(b";")[0].strip().lower()
    if given != wanted:
        shown = given.decode("latin-1")[:100] or "none"
        raise HttpError(
            415,
            f"content type {shown!r} is not served: this server speaks Connect with the JSON codec only, "
            f"{wanted.decode()} for this call",
            [(b"accept-post", wanted)],
        )
    encoding = exchange.header(encoding_field)
    if encoding not in (b"", b"identity"):
        raise HttpError(415, "compressed messages are not served: send them with the identity encoding")
    version = exchange.header(b"connect-protocol-version")
    if version not in (b"", b"1"):
        raise HttpError(400, f"connect-protocol-version must be 1, not {version.decode('latin-1')[:20]!r}")


def _parse_timeout(exchange: Exchange) -> float | None:
    text = exchange.header_text(b"connect-timeout-ms")
    if not text:
        return None
    if not text.isascii() or not text.isdigit() or len(text) > TIMEOUT_DIGITS_MAX:
        raise ConnectError(Code.INVALID_ARGUMENT, f"invalid Connect-Timeout-Ms: {text[:40]!r}")
    return int(text) / 1000 or None


async def _read(exchange: Exchange, max_bytes: int) -> bytes:
    try:
        return await exchange.read_body(max_bytes)
    except HttpError as error:
        code = Code.RESOURCE_EXHAUSTED if error.status == 413 else Code.INVALID_ARGUMENT
        raise ConnectError(code, error.message) from None


async def _read_only_message(exchange: Exchange) -> Message:
    body = await _read(exchange, connect.MESSAGE_BYTES_MAX + 5)
    reader = connect.FrameReader()
    frames = [payload for flags, payload in reader.feed(body) if not flags & connect.END_STREAM]
    if len(frames) != 1 or reader.unfinished:
        raise ConnectError(Code.INVALID_ARGUMENT, f"this call takes exactly one message, {len(frames)} came whole")
    return _decode(frames[0])


async def _read_messages(exchange: Exchange) -> AsyncIterator[Message]:
    reader = connect.FrameReader()
    async for piece in exchange.iter_body():
        for flags, payload in reader.feed(piece):
            if not flags & connect.END_STREAM:
                yield _decode(payload)
    if reader.unfinished:
        raise ConnectError(Code.INVALID_ARGUMENT, "the stream ended inside a message")


def _decode(payload: bytes) -> Message:
    try:
        message = json.loads(payload or b"{}")
    except (ValueError, RecursionError) as error:
        raise ConnectError(Code.INVALID_ARGUMENT, f"message is not JSON: {str(error)[:200]}") from None
    if not isinstance(message, dict):
        raise ConnectError(Code.INVALID_ARGUMENT, "message is not a JSON object")
    return message

"""The guest's HTTP server: listening sockets, routes, who may call them, the bounds.

    routes = Routes()
    routes.add("GET", "/health", health, guarded=False)
    server = Server(routes, access, spawn=crew.spawn, on_fault=log_it)
    await server.listen(sock, Peer.PUBLIC)

A handler is `async def handler(exchange: Exchange) -> None`; see `exchange`. It runs in a task of its own, one at a
time per connection, and is not cancelled when its client goes away: it learns that from `Disconnected`, from
`exchange.disconnected` or `exchange.on_disconnect`.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol

from penstock.core.errors import PenstockError
from penstock.guest.connection import RECEIVE_BYTES, Connection
from penstock.guest.exchange import STATUS_OF_KIND, Disconnected, Exchange, HttpError, Peer, Stream, error_answer

__all__ = ["Disconnected", "Exchange", "Handler", "HttpError", "Peer", "Routes", "Server", "Stream"]

CONNECTIONS_MAX: Final = 1024  # beyond: 503 and close
BACKLOG: Final = 1024
SWEEP_S: Final = 1.0  # deadlines are seen at most this late
PREFLIGHT_MAX_AGE_S: Final = 7200

Handler = Callable[[Exchange], Coroutine[Any, Any, None]]
_REFUSAL_BODY: Final = b'{"code": 503, "message": "too many connections to this sandbox"}'
_REFUSAL: Final = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\nconnection: close\r\n"
    b"content-length: %d\r\n\r\n%b" % (len(_REFUSAL_BODY), _REFUSAL_BODY)
)


class Spawn(Protocol):
    """`core.crew.Crew.spawn`."""

    def __call__(self, coro: Coroutine[Any, Any, None], *, name: str) -> asyncio.Task[None]: ...


class Access(Protocol):
    """Decides about requests to guarded routes."""

    def require(self, exchange: Exchange) -> None:
        """Return when the caller may, else raise HttpError(401)."""


class Route(NamedTuple):
    handler: Handler
    guarded: bool
    internal: bool


class Routes:
    """(method, path) → handler. Paths are exact; HEAD falls back to GET, whose body is then not sent."""

    def __init__(self) -> None:
        self._routes: dict[tuple[str, str], Route] = {}
        self._paths: dict[str, list[str]] = {}

    def add(self, method: str, path: str, handler: Handler, *, guarded: bool = True, internal: bool = False) -> None:
        """`guarded`: needs the access token (when the sandbox has one). `internal`: for the control socket only;
        others are told that it does not exist. Raises ValueError when the place is taken."""
        if (method, path) in self._routes:
            raise ValueError(f"{method} {path} is served already")
        self._routes[method, path] = Route(handler, guarded, internal)
        self._paths.setdefault(path, []).append(method)

    def find(self, method: str, path: str, peer: Peer) -> Route:
        """Raises HttpError 404 or 405."""
        route = self._routes.get((method, path))
        if route is None and method == "HEAD":
            route = self._routes.get(("GET", path))
        if route is not None and not (route.internal and peer is not Peer.CONTROL):
            return route
        if route is None and path in self._paths:
            allow = ", ".join(self._paths[path]).encode()
            raise HttpError(405, f"{method} is not served on this path", [(b"allow", allow)])
        raise HttpError(404, "no such path")


@dataclass(frozen=True)
class Statistics:
    connections: int
    serving: int
    accepted: int
    refused: int
    requests: int
    faults: int


class Server:
    """Serves `routes` on any number of sockets. `on_fault(exchange, error)` hears of every handler's bug."""

    def __init__(
        self,
        routes: Routes,
        access: Access,
        *,
        spawn: Spawn,
        on_fault: Callable[[Exchange, BaseException], None],
        connections_max: int = CONNECTIONS_MAX,
    ) -> None:
        self._routes, self._access, self._spawn, self._on_fault = routes, access, spawn, on_fault
        self.connections_max = connections_max
        self._connections: dict[Connection, None] = {}  # in order of arrival
        self._listeners: list[asyncio.Server] = []
        self._buffer: memoryview | None = None
        self._sweep: asyncio.TimerHandle | None = None
        self._serving = self._accepted = self._refused = self._requests = self._faults = 0

    async def listen(self, sock: socket.socket, peer: Peer) -> None:
        """Serve on `sock`, a bound stream socket; the server owns it from here."""
        loop = asyncio.get_running_loop()
        make: Callable[[], Connection] = lambda: Connection(self, peer)  # noqa: E731
        if sock.family == socket.AF_UNIX:
            self._listeners.append(await loop.create_unix_server(make, sock=sock, backlog=BACKLOG))
        else:
            self._listeners.append(await loop.create_server(make, sock=sock, backlog=BACKLOG))

    def stop(self) -> None:
        """Accept nothing more; close each connection after its current answer."""
        for listener in self._listeners:
            listener.close()
        for connection in tuple(self._connections):
            connection.stop_when_idle()

    def statistics(self) -> Statistics:
        return Statistics(
            connections=len(self._connections),
            serving=self._serving,
            accepted=self._accepted,
            refused=self._refused,
            requests=self._requests,
            faults=self._faults,
        )

    # ---- for connections -----------------------------------------------------------------------------------

    @property
    def receive_buffer(self) -> memoryview:
        """Shared by all connections; made at the first byte received, so that an idle guest does not pay for it."""
        if self._buffer is None:
            self._buffer = memoryview(bytearray(RECEIVE_BYTES))
        return self._buffer

    def admit(self, connection: Connection) -> bytes | None:
        """None when the connection may stay, else what to tell it before closing."""
        if len(self._connections) >= self.connections_max:
            self._refused += 1
            return _REFUSAL
        self._accepted += 1
        self._connections[connection] = None
        return None

    def forget(self, connection: Connection) -> None:
        self._connections.pop(connection, None)

    def serve(self, exchange: Exchange, connection: Connection) -> None:
        self._requests += 1
        self._spawn(self._run(exchange, connection), name=exchange.path)

    def note_deadline(self, at: float) -> None:
        """Something is due at `at` (loop time). One timer serves all connections; without connections none runs."""
        if self._sweep is not None:
            if self._sweep.when() <= at + SWEEP_S:
                return
            self._sweep.cancel()
        self._sweep = asyncio.get_running_loop().call_at(at + SWEEP_S, self._expire)

    # ---- private parts -------------------------------------------------------------------------------------

    async def _run(self, exchange: Exchange, connection: Connection) -> None:
        self._serving += 1
        try:
            await self._answer(exchange)
        finally:
            self._serving -= 1
            connection.done(exchange)

    async def _answer(self, exchange: Exchange) -> None:
        try:
            if exchange.head.method == b"OPTIONS" and exchange.peer is Peer.PUBLIC:
                exchange.answer(204, _preflight(exchange))
                return
            route = self._routes.find(exchange.method, exchange.path, exchange.peer)
            if route.guarded and exchange.peer is Peer.PUBLIC:
                self._access.require(exchange)
            await route.handler(exchange)
            if not exchange.answered:
                raise AssertionError(f"the handler of {exchange.path} gave no answer")
        except Disconnected:
            pass
        except HttpError as error:
            _answer_error(exchange, error)
        except PenstockError as error:
            _answer_error(exchange, HttpError(STATUS_OF_KIND[error.kind], str(error)))
        except Exception as error:
            # Safe: pid 1 must outlive any handler's bug; the fault is counted, logged, and answered.
            self._faults += 1
            self._on_fault(exchange, error)
            _answer_error(exchange, HttpError(500, "internal error of the guest; its log says more"))

    def _expire(self) -> None:
        self._sweep = None
        now = asyncio.get_running_loop().time()
        for connection in [each for each in self._connections if each.deadline <= now]:
            connection.expire()
        earliest = min((each.deadline for each in self._connections), default=float("inf"))
        if earliest != float("inf"):
            self.note_deadline(earliest)


def _answer_error(exchange: Exchange, error: HttpError) -> None:
    """Tell the client, when nothing was told yet; else the connection is torn down by `Connection.done`."""
    if exchange.answered:
        return
    try:
        exchange.answer(*error_answer(error))
    except Disconnected:
        pass


def _preflight(exchange: Exchange) -> list[tuple[bytes, bytes]]:
    wanted = exchange.header(b"access-control-request-headers") or b"*"
    return [
        (b"access-control-allow-methods", b"GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"),
        (b"access-control-allow-headers", wanted),
        (b"access-control-max-age", b"%d" % PREFLIGHT_MAX_AGE_S),
    ]

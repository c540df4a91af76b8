"""Listening sockets: plain ones served by the loop itself, TLS ones accepted by us.

TLS is accepted by us because a connection in its handshake has no protocol object yet: the loop would let any number of
them use up the descriptors. Here they count, and there are HANDSHAKES_MAX at most.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from typing import Final

from penstock.core.crew import CrewClosed
from penstock.ingress.client import Client
from penstock.ingress.hub import BACKLOG, Hub

HANDSHAKES_MAX: Final = 512
HANDSHAKE_S: Final = 10.0
SHUTDOWN_S: Final = 3.0  # for the peer's close_notify
ACCEPTS_AT_ONCE: Final = 32  # then other work gets its turn
STARVED_S: Final = 0.1  # pause of accepting when the process is out of descriptors
KEEPALIVE_S: Final = 20  # TCP probes on quiet connections; three lost ones end it


def bind(host: str, port: int) -> socket.socket:
    """A bound, listening socket whose connections inherit keep-alive probing. Raises OSError. Port 0: a free one."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (
            (socket.TCP_NODELAY, 1),
            (socket.TCP_KEEPIDLE, KEEPALIVE_S),
            (socket.TCP_KEEPINTVL, KEEPALIVE_S),
            (socket.TCP_KEEPCNT, 3),
        ):
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
        sock.bind((host, port))
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def address(sock: socket.socket) -> str:
    """`127.0.0.1:3002`, `[::1]:3002`."""
    host, port = sock.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Listeners:
    """Owns the sockets given to it."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._servers: list[asyncio.Server] = []
        self._tls: list[socket.socket] = []

    async def serve(self, sock: socket.socket) -> None:
        """Plain HTTP on `sock` until `close`."""
        server = await self._hub.loop.create_server(lambda: Client(self._hub), sock=sock, backlog=BACKLOG)
        self._servers.append(server)

    def serve_tls(self, sock: socket.socket, context: ssl.SSLContext) -> None:
        """HTTP over TLS on `sock` until `close`. A certificate loaded into `context` later is used from then on."""
        self._tls.append(sock)
        self._hub.loop.add_reader(sock.fileno(), self._accept, sock, context)

    def close(self) -> None:
        """Accept nothing more. Connections go on; `Hub.stop` ends them."""
        for server in self._servers:
            server.close()
        for sock in self._tls:
            self._hub.loop.remove_reader(sock.fileno())
            sock.close()
        self._servers.clear()
        self._tls.clear()

    def _accept(self, listener: socket.socket, context: ssl.SSLContext) -> None:
        for _ in range(ACCEPTS_AT_ONCE):
            try:
                sock, _ = listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError:
                self._rest(listener, context)
                return
            if self._hub.handshakes >= HANDSHAKES_MAX or not self._hub.make_room():
                sock.close()
                continue
            sock.setblocking(False)
            try:
                self._hub.spawn(self._shake_hands(sock, context), name="TLS handshake")
            except CrewClosed:
                sock.close()

    def _rest(self, listener: socket.socket, context: ssl.SSLContext) -> None:
        """Out of descriptors: a level-triggered loop would spin on the listener until one is free."""
        loop = self._hub.loop
        loop.remove_reader(listener.fileno())

        def again() -> None:
            if listener in self._tls:
                loop.add_reader(listener.fileno(), self._accept, listener, context)

        loop.call_later(STARVED_S, again)

    async def _shake_hands(self, sock: socket.socket, context: ssl.SSLContext) -> None:
        self._hub.handshakes += 1
        try:
            await self._hub.loop.connect_accepted_socket(
                lambda: Client(self._hub),
                sock,
                ssl=context,
                ssl_handshake_timeout=HANDSHAKE_S,
                ssl_shutdown_timeout=SHUTDOWN_S,
            )
        except (OSError, ssl.SSLError):
            sock.close()  # Safe: a client that cannot speak TLS has nothing to be told.
        finally:
            self._hub.handshakes -= 1

"""Connecting into a sandbox: to its guest by a unix socket, to a user's port from inside its network namespace."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Callable
from typing import Final, Protocol, TypeVar

from penstock.core.deadlines import DeadlinePassed, within
from penstock.core.errors import Kind, PenstockError
from penstock.ingress.netns import NamespaceGone, Namespaces
from penstock.ingress.table import Route
from penstock.wire.routing import GUEST_PORT

DIAL_S: Final = 30.0  # spec/e2b.md 3.1; only a server that does not accept, with a full backlog, takes that long
RETRY_S: Final = (0.05, 0.15)  # a server that is just starting; spec: 5 times, for a forwarder we do not have
BUSY_S: Final = 0.005  # between attempts while a unix socket's backlog is full
UNIX_PATH_BYTES_MAX: Final = 107
# The same inner address in every slot; then servers that listen on loopback only.
INNER: Final = (
    (socket.AF_INET, "10.200.0.2"),
    (socket.AF_INET, "127.0.0.1"),
    (socket.AF_INET6, "::1"),
)
_NOBODY: Final = frozenset(
    {
        errno.ECONNREFUSED,
        errno.EADDRNOTAVAIL,
        errno.ENETUNREACH,
        errno.EHOSTUNREACH,
        errno.EAFNOSUPPORT,
        errno.ECONNRESET,
    }
)
_FULL: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

P = TypeVar("P", bound=asyncio.BaseProtocol)


class PortClosed(PenstockError):
    """The sandbox runs and nobody listens on the port."""

    kind = Kind.UNAVAILABLE
    code = "port_closed"


class SandboxGone(PenstockError):
    """The sandbox does not answer any more; the table will say so in a moment."""

    kind = Kind.NOT_FOUND
    code = "sandbox_gone"


class NoDescriptor(PenstockError):
    """This process or the machine has no descriptor left for another connection."""

    kind = Kind.EXHAUSTED
    code = "no_descriptor"


class Dialler(Protocol):
    """The port to the world: `LinuxDialler`, or in simulation one that connects in memory."""

    async def dial(self, route: Route, port: int, make: Callable[[], P]) -> P:
        """A connected protocol made by `make`. Raises PortClosed, SandboxGone, NoDescriptor.

        If cancelled, nothing is left open.
        """

    def forget(self, route: Route) -> None:
        """The sandbox has ended: drop what is kept for dialling it."""


class LinuxDialler:
    def __init__(self, namespaces: Namespaces, *, dial_s: float = DIAL_S) -> None:
        self._namespaces, self._dial_s = namespaces, dial_s

    async def dial(self, route: Route, port: int, make: Callable[[], P]) -> P:
        try:
            if port == GUEST_PORT:
                return await self._dial_guest(route, make)
            return await self._dial_port(route, port, make)
        except NamespaceGone as error:
            raise SandboxGone("sandbox has no network namespace", which=route.sandbox, why=str(error)) from error
        except OSError as error:
            if error.errno in _FULL:
                raise NoDescriptor("cannot connect", which=route.sandbox, why=str(error), retry_after_s=1.0) from error
            raise

    def forget(self, route: Route) -> None:
        self._namespaces.forget(route)

    async def _dial_guest(self, route: Route, make: Callable[[], P]) -> P:
        try:
            async with within(self._dial_s, f"connection to the guest of {route.sandbox}"):
                sock = await _connect_unix(route.guest_socket)
        except DeadlinePassed as error:
            raise SandboxGone("guest does not accept", which=route.sandbox, why=str(error)) from error
        except OSError as error:
            if error.errno in _FULL:
                raise
            raise SandboxGone("guest does not listen", which=route.sandbox, why=str(error)) from error
        return await _hand_over(sock, make, unix=True)

    async def _dial_port(self, route: Route, port: int, make: Callable[[], P]) -> P:
        try:
            async with within(self._dial_s, f"connection to port {port} of {route.sandbox}"):
                for pause_s in (*RETRY_S, None):
                    sock = await self._connect_inside(route, port)
                    if sock is not None:
                        return await _hand_over(sock, make, unix=False)
                    if pause_s is not None:
                        await asyncio.sleep(pause_s)
        except DeadlinePassed as error:
            raise PortClosed("nobody accepts", which=f"{route.sandbox}:{port}", why=str(error)) from error
        raise PortClosed("nobody listens", which=f"{route.sandbox}:{port}")

    async def _connect_inside(self, route: Route, port: int) -> socket.socket | None:
        loop = asyncio.get_running_loop()
        for family, address in INNER:
            sock = self._namespaces.socket(route, family)
            try:
                await loop.sock_connect(sock, (address, port))
                return sock
            except OSError as error:
                sock.close()
                if error.errno not in _NOBODY:
                    raise
            except BaseException:
                sock.close()
                raise
        return None


async def _connect_unix(path: str) -> socket.socket:
    """Connect at once, or again while the listener's backlog is full. Raises OSError.

    Not `loop.sock_connect`: a full backlog is EAGAIN on a unix socket, which the loop would take for "in progress" and,
    the socket being writable, for success.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        while True:
            try:
                _connect_path(sock, path)
                return sock
            except BlockingIOError:
                await asyncio.sleep(BUSY_S)
    except BaseException:
        sock.close()
        raise


def _connect_path(sock: socket.socket, path: str) -> None:
    if len(os.fsencode(path)) <= UNIX_PATH_BYTES_MAX:
        sock.connect(path)
        return
    folder = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sock.connect(f"/proc/self/fd/{folder}/{os.path.basename(path)}")
    finally:
        os.close(folder)


async def _hand_over(sock: socket.socket, make: Callable[[], P], *, unix: bool) -> P:
    loop = asyncio.get_running_loop()
    try:
        if unix:
            _, protocol = await loop.create_unix_connection(make, sock=sock)
        else:
            _, protocol = await loop.create_connection(make, sock=sock)
    except BaseException:
        sock.close()
        raise
    return protocol

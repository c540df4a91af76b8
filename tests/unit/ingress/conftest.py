"""An ingress in this process, in front of servers that say exactly the bytes a test gives them."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import uvloop

from penstock.core.crew import Crew
from penstock.ingress.dial import LinuxDialler, NoDescriptor, PortClosed
from penstock.ingress.hub import Hub
from penstock.ingress.listen import Listeners, bind
from penstock.ingress.netns import Namespaces
from penstock.ingress.sandbox_tokens import Tokens
from penstock.ingress.table import Route, Table
from penstock.wire.routing import GUEST_PORT

SEED = b"\x07" * 32
SANDBOX = "i" + "a" * 20

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item) -> dict[str, Callable]:
    """Everything on the loop of production and on the standard library's, which simulation builds on."""
    return {"uvloop": uvloop.new_event_loop, "asyncio": asyncio.new_event_loop}


class TestDialler(LinuxDialler):
    """The guest by its real unix socket; user ports on this machine's loopback instead of a namespace's."""

    __test__ = False

    def __init__(self) -> None:
        super().__init__(Namespaces(), dial_s=2.0)
        self.ports: dict[tuple[str, int], int] = {}
        self.dials = 0
        self.full = False
        self.late_s = 0.0  # from a guest's accept until we go on: it may speak first

    async def dial(self, route, port, make):
        self.dials += 1
        if self.full:
            raise NoDescriptor("none left")
        if port == GUEST_PORT:
            made = await super().dial(route, port, make)
            await asyncio.sleep(self.late_s)
            return made
        real = self.ports.get((route.sandbox, port))
        if real is None:
            raise PortClosed("nobody listens")
        try:
            _, protocol = await asyncio.get_running_loop().create_connection(make, "127.0.0.1", real)
        except ConnectionRefusedError as error:
            raise PortClosed("nobody listens") from error
        return protocol


class Fixture:
    def __init__(self, hub: Hub, dialler: TestDialler, address: tuple[str, int], folder: Path) -> None:
        self.hub, self.dialler, self.address, self._folder = hub, dialler, address, folder
        self.servers: list[asyncio.AbstractServer] = []

    async def guest(self, serve: Serve, *, sandbox: str = SANDBOX, **facts: object) -> Route:
        path = str(self._folder / f"{sandbox}.sock")
        self.servers.append(await asyncio.start_unix_server(_quiet(serve), path))
        route = Route(sandbox=sandbox, guest_socket=path, pid=1000, start_ticks=5, **facts)
        self.hub.table.put(sandbox, route)
        return route

    async def port(self, port: int, serve: Serve, *, sandbox: str = SANDBOX, **facts: object) -> None:
        server = await asyncio.start_server(_quiet(serve), "127.0.0.1", 0)
        self.servers.append(server)
        self.dialler.ports[sandbox, port] = server.sockets[0].getsockname()[1]
        if sandbox not in self.hub.table.routes or facts:
            self.hub.table.put(sandbox, Route(sandbox=sandbox, pid=1000, start_ticks=5, **facts))

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(*self.address)

    async def exchange(self, request: bytes, *, within_s: float = 5.0) -> bytes:
        """Send, and return everything until the ingress closes."""
        reader, writer = await self.open()
        writer.write(request)
        try:
            return await asyncio.wait_for(reader.read(), within_s)
        finally:
            writer.close()


def _quiet(serve: Serve) -> Serve:
    async def served(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await serve(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    return served


@asynccontextmanager
async def running(folder: Path, **options: object) -> AsyncIterator[Fixture]:
    async with Crew("test ingress") as crew:
        dialler = TestDialler()
        options = {"descriptors_max": 1000, **options}
        hub = Hub(
            loop=asyncio.get_running_loop(),
            table=Table(),
            dialler=dialler,
            tokens=Tokens(SEED),
            crew=crew,
            **options,
        )
        sock = bind("127.0.0.1", 0)
        address = sock.getsockname()
        listeners = Listeners(hub)
        await listeners.serve(sock)
        fixture = Fixture(hub, dialler, address, folder)
        try:
            yield fixture
        finally:
            listeners.close()
            await hub.stop(grace_s=0.0)
            for server in fixture.servers:
                server.close()


@pytest.fixture
async def ingress(tmp_path: Path) -> AsyncIterator[Fixture]:
    async with running(tmp_path) as fixture:
        yield fixture


def head(
    target: str = "/", *, method: str = "GET", sandbox: str = SANDBOX, port: int = GUEST_PORT, extra: str = ""
) -> bytes:
    """A request by the routing headers. `extra` holds whole lines, each with its CRLF."""
    return (
        f"{method} {target} HTTP/1.1\r\nHost: localhost\r\nE2b-Sandbox-Id: {sandbox}\r\n"
        f"E2b-Sandbox-Port: {port}\r\n{extra}\r\n"
    ).encode()


async def read_head(reader: asyncio.StreamReader) -> bytes:
    return await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5.0)


async def read_response(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """(head, body by Content-Length)."""
    got = await read_head(reader)
    length = 0
    for line in got.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            length = int(value)
    return got, await asyncio.wait_for(reader.readexactly(length), 5.0)


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers each bodiless request with its own head."""
    while True:
        got = await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(got) + got)


__all__ = ["SANDBOX", "SEED", "Fixture", "echo", "head", "read_head", "read_response", "running", "socket"]

"""A guest that serves only files, on a unix socket, with a home below a temporary directory."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx

from penstock.core.clock import SystemClock
from penstock.core.crew import Crew
from penstock.guest import compose, files, filesystem, metrics
from penstock.guest.access import TokenAccess
from penstock.guest.exchange import Exchange, Peer
from penstock.guest.log import Log
from penstock.guest.parts import Parts
from penstock.guest.rpc import Rpc
from penstock.guest.server import Routes, Server
from penstock.guest.settings import Settings
from penstock.guest.users import Users
from penstock.wire import connect

# As root, files really change hands; otherwise the user is whoever runs the tests.
UID = 1000 if os.getuid() == 0 else os.getuid()
GID = 1000 if os.getuid() == 0 else os.getgid()


class Room:
    def __init__(self, home: Path, client: httpx.AsyncClient, settings: Settings, faults: list[BaseException]) -> None:
        self.home, self.client, self.settings, self.faults = home, client, settings, faults

    async def call(self, method: str, **message: Any) -> tuple[int, dict[str, Any]]:
        answer = await self.client.post(f"/filesystem.Filesystem/{method}", json=message)
        return answer.status_code, answer.json()

    async def ok(self, method: str, **message: Any) -> dict[str, Any]:
        status, answer = await self.call(method, **message)
        assert status == 200, answer
        return answer

    async def code(self, method: str, **message: Any) -> str:
        status, answer = await self.call(method, **message)
        assert status != 200, answer
        return str(answer["code"])

    async def upload(self, path: str, data: bytes, **headers: str) -> httpx.Response:
        fields = {"content-type": "application/octet-stream"} | {k.replace("_", "-"): v for k, v in headers.items()}
        return await self.client.post("/files", params={"path": path}, content=data, headers=fields)

    async def events(self, watcher_id: str) -> list[tuple[str, str]]:
        answer = await self.ok("GetWatcherEvents", watcherId=watcher_id)
        return [(event["name"], event["type"].removeprefix("EVENT_TYPE_")) for event in answer["events"]]

    async def stream(self, method: str, **message: Any) -> AsyncIterator[dict[str, Any]]:
        """Messages of a stream; the last one is the end frame's."""
        body = connect.frame(json.dumps(message).encode())
        fields = {"content-type": "application/connect+json", "keepalive-ping-interval": "1"}
        reader = connect.FrameReader()
        async with self.client.stream(
            "POST", f"/filesystem.Filesystem/{method}", content=body, headers=fields
        ) as answer:
            async for piece in answer.aiter_raw():
                for _flags, payload in reader.feed(piece):
                    yield json.loads(payload)


@contextlib.asynccontextmanager
async def open_room(folder: Path, *, token: str | None = None) -> AsyncIterator[Room]:
    home = folder / "home"
    home.mkdir()
    os.chown(home, UID, GID)
    (folder / "passwd").write_text(f"root:x:0:0:root:{folder}:/bin/sh\nuser:x:{UID}:{GID}:user:{home}:/bin/bash\n")
    (folder / "group").write_text(f"root:x:0:\nuser:x:{GID}:\n")
    limits = {"cpu_count": 2, "memory_bytes_total": 512 << 20}
    settings = Settings({"sandbox_id": "s", "template_id": "base", "access_token": token, "user": "user"} | limits)
    users, routes, clock = Users(str(folder / "passwd"), str(folder / "group")), Routes(), SystemClock()
    faults: list[BaseException] = []

    def on_fault(_exchange: Exchange, error: BaseException) -> None:
        faults.append(error)

    access = TokenAccess(settings, clock)
    log_fd = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
    sock = socket.socket(socket.AF_UNIX)
    short = f"/proc/self/fd/{os.open(folder, os.O_PATH)}"
    sock.bind(f"{short}/guest.sock")
    async with Crew("guest under test") as crew:
        rpc = Rpc(routes, users, settings, on_fault)
        parts = Parts(settings=settings, users=users, access=access, routes=routes, rpc=rpc,
                      log=Log(log_fd, clock), clock=clock, spawn=crew.spawn)  # fmt: skip
        service = filesystem.register(parts)
        files.register(parts)
        compose.register(parts)
        metrics.register(parts)
        server = Server(routes, access, spawn=crew.spawn, on_fault=on_fault)
        await server.listen(sock, Peer.PUBLIC)
        transport = httpx.AsyncHTTPTransport(uds=f"{short}/guest.sock")
        async with httpx.AsyncClient(transport=transport, base_url="http://guest", timeout=20) as client:
            yield Room(home, client, settings, faults)
        server.stop()
        service.close()
        await crew.cancel_all()
    os.close(log_fd)
    os.close(int(short.rpartition("/")[2]))
    assert not faults, faults

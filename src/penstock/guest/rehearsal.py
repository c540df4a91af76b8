"""A guest's start and first calls, played through in the zygote before the first fork.

CPython writes while it runs code for the first times: specialised instructions, type caches, dictionaries of names.
Written before the fork, those pages are shared; written after it, each is copied in every sandbox, at some 2 us and
4 KiB a page. Measured: a guest's start takes 7.8 ms of CPU instead of 9.4, its first process 4.0 instead of 4.7.
"""

from __future__ import annotations

import asyncio
import os
import resource
import socket
from collections.abc import Mapping
from typing import Any, Final

from penstock.core.clock import SystemClock
from penstock.core.crew import Crew
from penstock.core.deadlines import within
from penstock.guest.log import Log
from penstock.guest.loop import ForkedLoop
from penstock.guest.main import Guest
from penstock.wire import connect

ROUNDS: Final = 12  # CPython 3.11 specialises a function after 8 calls
ROUND_S: Final = 10.0  # 5 ms
_SOCKET: Final = "rehearsal.sock"
_START: Final = connect.frame(b'{"process":{"cmd":"/no/such/file","args":["-l"]},"stdin":false}')
_CALLS: Final = (
    ("GET", "/health", b"", "text/plain"),
    ("POST", "/process.Process/List", b"{}", "application/json"),
    ("POST", "/process.Process/Start", _START, "application/connect+json"),
)


def rehearse(folder: str) -> None:
    """Play ROUNDS rounds, with a socket in `folder`, which only root may enter. Starts no process; leaves nothing.

    Call before anything is sealed or frozen, in a process with one thread that is not pid 1. Raises OSError.
    """
    assert os.getpid() != 1
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    log_fd = os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC)
    folder_fd = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)  # a socket's address is short
    try:
        for _ in range(ROUNDS):
            loop = ForkedLoop()
            try:
                loop.open()
                loop.run_until_complete(_round(f"/proc/self/fd/{folder_fd}/{_SOCKET}", log_fd))
            finally:
                loop.close()
    finally:
        os.close(folder_fd)
        os.close(log_fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


class _Rehearsed(Guest):
    """Takes no port of the host."""

    async def _listen_on_loopback(self) -> None:
        pass


async def _round(path: str, log_fd: int) -> None:
    token = os.urandom(32).hex()
    config: Mapping[str, Any] = {"sandbox_id": "rehearsal", "template_id": "base", "access_token": token, "env": {}}
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    listener.bind(path)
    try:
        listener.listen()
        clock, ready = SystemClock(), asyncio.Event()
        guest = _Rehearsed(Log(log_fd, clock), clock)
        guest.be(config, {})
        async with within(ROUND_S, "a round of the rehearsal"), Crew("rehearsal") as crew:
            running = crew.spawn(guest.run({"public": listener.detach()}, ready.set), name="guest")
            await ready.wait()
            for method, target, body, kind in _CALLS:
                await _call(path, method, target, body, kind, token)
            guest.stop()
            await running
    finally:
        os.unlink(path)


async def _call(path: str, method: str, target: str, body: bytes, kind: str, token: str) -> None:
    reader, writer = await asyncio.open_unix_connection(path)
    head = f"{method} {target} HTTP/1.1\r\nHost: rehearsal\r\nX-Access-Token: {token}\r\nContent-Type: {kind}\r\n"
    head += f"Connect-Protocol-Version: 1\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    _heard(await reader.read())
    writer.close()


def _heard(reply: bytes) -> None:
    """Nothing hangs on the replies; the test of this module listens here."""

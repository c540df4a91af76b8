"""The ingress as its own process, on the real kernel: namespaces, signals, a daemon that comes and goes."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from penstock.core.clock import SystemClock
from penstock.core.crew import Crew
from penstock.feed.local import LocalSource
from penstock.feed.server import FeedServer
from penstock.model import keys
from penstock.model.sandbox import Limits, Phase, SandboxSpec, SandboxStatus
from penstock.run import children
from penstock.store.memory import MemoryLog
from penstock.store.store import Store
from penstock.wire.tokens import traffic_token

pytestmark = pytest.mark.root

SEED = "07" * 32
SANDBOX = "i" + "n" * 20

# A stand-in for a sandbox: its own network namespace, the inner address, one server per place it can listen.
INSIDE = """
import ctypes, http.server, os, socket, subprocess, sys, threading
assert ctypes.CDLL(None, use_errno=True).unshare(0x40000000) == 0
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
subprocess.run(["ip", "address", "add", "10.200.0.2/30", "dev", "lo"], check=True)
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        body = f"{self.server.server_address[0]} {self.headers['Host']}".encode()
        self.send_response(200); self.send_header("Content-Length", str(len(body))); self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_): pass
class Six(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6
for server in (http.server.ThreadingHTTPServer(("0.0.0.0", 8000), Handler),
               http.server.ThreadingHTTPServer(("127.0.0.1", 8001), Handler), Six(("::1", 8002), Handler)):
    threading.Thread(target=server.serve_forever, daemon=True).start()
endless = socket.create_server(("0.0.0.0", 8003))
def stream():
    while True:
        c, _ = endless.accept()
        c.recv(65536); c.sendall(b"HTTP/1.1 200 OK\\r\\nTransfer-Encoding: chunked\\r\\n\\r\\n1\\r\\n.\\r\\n")
        keep.append(c)
keep = []
threading.Thread(target=stream, daemon=True).start()
print("ready", flush=True)
sys.stdin.read()
"""


class Daemon:
    """What the ingress needs of a daemon: a store and its feed, which can go away and come back."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self.store = Store(MemoryLog(), SystemClock())

    @asynccontextmanager
    async def up(self) -> AsyncIterator[None]:
        async with Crew("daemon") as crew:
            prefixes = (keys.SANDBOX_SPEC, keys.SANDBOX_STATUS)
            server = FeedServer(LocalSource(self.store), self.data / "run" / "feed.sock", prefixes=prefixes)
            await server.serve(crew)
            yield

    async def tell(self, pid: int, phase: Phase = Phase.READY, **facts: object) -> None:
        spec = SandboxSpec(
            id=SANDBOX, team="t", template="base", build="b", limits=Limits(), created_at=0.0, end_at=0.0, **facts
        )
        status = SandboxStatus(
            id=SANDBOX,
            phase=phase,
            node="n",
            team="t",
            pid=pid,
            start_ticks=children.start_ticks(pid),
            guest_socket=str(self.data / "guest.sock"),
        )
        await self.store.put(keys.SANDBOX_SPEC + SANDBOX, msgspec.json.encode(spec), by="api")
        await self.store.put(keys.SANDBOX_STATUS + SANDBOX, msgspec.json.encode(status), by="node")


@pytest.fixture
def inside() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, "-c", INSIDE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.wait()


@pytest.fixture
async def daemon(tmp_path: Path) -> Daemon:
    (tmp_path / "run").mkdir()
    (tmp_path / "seed").write_text(SEED)
    daemon = Daemon(tmp_path)
    await daemon.store.open()
    return daemon


@asynccontextmanager
async def ingress(data: Path, *options: str) -> AsyncIterator[tuple[children.Child, int]]:
    argv = ["--data", str(data), "--listen", "127.0.0.1:0", "--domain", "sbx.localhost", *options]
    child = await children.start(
        "ingress",
        children.module("penstock.run.ingress", *argv),
        pid_file=data / "run" / "ingress.json",
        log=data / "run" / "ingress.log",
    )
    try:
        told = json.loads((data / "run" / "ingress.json").read_text())
        assert told["pid"] == child.pid and told["start_ticks"] == child.start_ticks
        yield child, int(told["url"].rpartition(":")[2])
    finally:
        await asyncio.to_thread(children.end, child, term_s=5.0)


async def get(port: int, inner: int, extra: str = "") -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        f"GET / HTTP/1.1\r\nHost: {inner}-{SANDBOX}.sbx.localhost\r\nConnection: close\r\n{extra}\r\n".encode()
    )
    try:
        return await asyncio.wait_for(reader.read(), 5)
    finally:
        writer.close()


async def eventually(port: int, inner: int, wanted: bytes) -> None:
    got = b""
    for _ in range(100):
        got = await get(port, inner)
        if wanted in got:
            return
        await asyncio.sleep(0.02)
    raise AssertionError(got)


def network_namespaces(pid: int) -> list[str]:
    """The network namespaces a process holds open, other than its own."""
    own = os.readlink(f"/proc/{pid}/ns/net")
    held = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            target = os.readlink(f"/proc/{pid}/fd/{fd}")
        except OSError:
            continue
        if target.startswith("net:") and target != own:
            held.append(target)
    return held


async def test_user_ports_inside_a_namespace(daemon: Daemon, inside: subprocess.Popen[str]):
    async with daemon.up():
        await daemon.tell(inside.pid)
        async with ingress(daemon.data) as (child, port):
            for inner, wanted in ((8000, b"0.0.0.0"), (8001, b"127.0.0.1"), (8002, b"::1")):
                got = await get(port, inner)
                assert got.startswith(b"HTTP/1.1 200 ") and wanted in got
            began = asyncio.get_running_loop().time()
            got = await get(port, 9999)
            assert got.endswith(b'"message":"The sandbox is running but port is not open","port":9999,"code":502}')
            assert asyncio.get_running_loop().time() - began < 1.0
            assert network_namespaces(child.pid) == [os.readlink(f"/proc/{inside.pid}/ns/net")]
            assert os.readlink(f"/proc/{child.pid}/ns/net") == os.readlink("/proc/self/ns/net")
            await daemon.tell(inside.pid, Phase.STOPPING)
            await eventually(port, 8000, b"was not found")
            assert network_namespaces(child.pid) == [], "it keeps a dead sandbox's namespace alive"


async def test_a_pid_that_names_another_process_is_not_entered(daemon: Daemon, inside: subprocess.Popen[str]):
    async with daemon.up():
        await daemon.tell(inside.pid)
        inside.kill()
        inside.wait()
        async with ingress(daemon.data) as (child, port):
            assert b"was not found" in await get(port, 8000)
            assert network_namespaces(child.pid) == []


async def test_traffic_tokens_and_masks(daemon: Daemon, inside: subprocess.Popen[str]):
    async with daemon.up():
        await daemon.tell(inside.pid, traffic_private=True, mask_request_host="inner:${PORT}")
        async with ingress(daemon.data) as (child, port):
            for extra in ("", "e2b-traffic-access-token: no\r\n"):
                assert (await get(port, 8000, extra)).startswith(b"HTTP/1.1 403 ")
            token = traffic_token(bytes.fromhex(SEED), SANDBOX)
            got = await get(port, 8000, f"e2b-traffic-access-token: {token}\r\n")
            assert got.startswith(b"HTTP/1.1 200 ") and got.endswith(b"0.0.0.0 inner:8000")
            with open(f"/proc/{child.pid}/cmdline", "rb") as file:  # noqa: ASYNC230
                arguments = file.read()
    for secret in (SEED, token):
        assert secret not in (daemon.data / "run" / "ingress.log").read_text()
        assert secret.encode() not in arguments


async def test_bytes_flow_while_the_daemon_is_away(daemon: Daemon, inside: subprocess.Popen[str]):
    async with daemon.up():
        await daemon.tell(inside.pid)
        context = ingress(daemon.data)
        _, port = await context.__aenter__()
        await eventually(port, 8000, b"200 OK")
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"GET / HTTP/1.1\r\nHost: 8003-{SANDBOX}.sbx.localhost\r\n\r\n".encode())
        await asyncio.wait_for(reader.readuntil(b".\r\n"), 5)
    try:
        for _ in range(3):
            assert (await get(port, 8000)).startswith(b"HTTP/1.1 200 ")
            await asyncio.sleep(0.05)
        async with daemon.up():
            assert (await get(port, 8000)).startswith(b"HTTP/1.1 200 ")
            await asyncio.sleep(1.2)  # it has reconnected and read everything anew
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(reader.read(1), 0.05)  # and the stream lives
            began = asyncio.get_running_loop().time()
            await daemon.tell(inside.pid, Phase.STOPPING)
            with pytest.raises(ConnectionResetError):
                await asyncio.wait_for(reader.read(), 2)
            assert asyncio.get_running_loop().time() - began < 0.5
    finally:
        writer.close()
        await context.__aexit__(None, None, None)


async def test_sigterm_lets_a_response_end_and_then_exits(daemon: Daemon, inside: subprocess.Popen[str]):
    async with daemon.up():
        await daemon.tell(inside.pid)
        async with ingress(daemon.data, "--grace", "0.5") as (child, port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(f"GET / HTTP/1.1\r\nHost: 8003-{SANDBOX}.sbx.localhost\r\n\r\n".encode())
            await asyncio.wait_for(reader.readuntil(b".\r\n"), 5)
            os.kill(child.pid, signal.SIGTERM)
            await asyncio.sleep(0.2)
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection("127.0.0.1", port)
            assert children.start_ticks(child.pid), "it did not wait for the response"
            with pytest.raises(ConnectionResetError):
                await asyncio.wait_for(reader.read(), 2)
            for _ in range(100):
                if not children.start_ticks(child.pid):
                    break
                await asyncio.sleep(0.02)
            assert not children.start_ticks(child.pid)
            writer.close()
    assert '"connections_cut": 1' in (daemon.data / "run" / "ingress.log").read_text()


async def test_without_a_daemon_it_starts_and_asks_for_patience(daemon: Daemon):
    async with ingress(daemon.data) as (_, port):
        got = await get(port, 8000)
        assert got.startswith(b"HTTP/1.1 503 ") and b"Retry-After" in got


async def test_out_of_descriptors_it_refuses_and_recovers(daemon: Daemon, inside: subprocess.Popen[str]):
    """The limit of the process is lowered from outside, then 400 clients come."""
    async with daemon.up():
        await daemon.tell(inside.pid)
        argv = ["--data", str(daemon.data), "--listen", "127.0.0.1:0", "--domain", "sbx.localhost"]
        child = await children.start(
            "ingress",
            ["prlimit", "--nofile=256:256", *children.module("penstock.run.ingress", *argv)],
            pid_file=daemon.data / "run" / "ingress.json",
            log=daemon.data / "run" / "ingress.log",
        )
        try:
            url = json.loads((daemon.data / "run" / "ingress.json").read_text())["url"]
            port = int(url.rpartition(":")[2])
            crowd = [socket.create_connection(("127.0.0.1", port)) for _ in range(400)]
            assert (await get(port, 8000)).startswith(b"HTTP/1.1 200 "), "idle connections kept a request out"
            assert len(os.listdir(f"/proc/{child.pid}/fd")) < 256
            for sock in crowd:
                sock.close()
            assert (await get(port, 8000)).startswith(b"HTTP/1.1 200 ")
        finally:
            await asyncio.to_thread(children.end, child, term_s=5.0)


def test_entering_a_namespace_leaves_no_thread_behind_in_it(inside: subprocess.Popen[str]):
    from penstock.ingress.netns import Namespaces
    from penstock.ingress.table import Route

    home = os.readlink("/proc/thread-self/ns/net")
    namespaces = Namespaces(descriptors_max=1)
    route = Route(sandbox="i1", pid=inside.pid, start_ticks=children.start_ticks(inside.pid))
    outcome: list[str] = []

    def visit() -> None:
        for _ in range(50):
            with namespaces.socket(route, socket.AF_INET) as sock:
                sock.setblocking(True)
                sock.connect(("10.200.0.2", 8000))
        outcome.append(os.readlink("/proc/thread-self/ns/net"))

    thread = threading.Thread(target=visit)
    thread.start()
    thread.join()
    assert outcome == [home]
    other = Route(sandbox="i2", pid=os.getpid(), start_ticks=children.start_ticks(os.getpid()))
    namespaces.socket(other, socket.AF_INET).close()
    assert len(namespaces) == 1
    namespaces.close()
    assert ctypes.get_errno() == 0

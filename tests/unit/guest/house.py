"""A real guest for tests: `serve` in a forked process, on unix sockets in a folder, as the current user."""

from __future__ import annotations

import base64
import http.client
import json
import os
import select
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import penstock.guest.main as guest_main
from penstock.wire import connect

READY_WITHIN_S = 10.0
PR_SET_CHILD_SUBREAPER = 36


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float = 20.0) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


@dataclass
class RunningGuest:
    """`pid` serves on `public` and `control` until `stop`."""

    folder: Path
    pid: int
    pidfd: int
    token: str | None
    headers: dict[str, str] = field(default_factory=dict)
    url: str = ""  # with `tcp`: where the public side listens instead of its unix socket

    @property
    def public(self) -> str:
        return str(self.folder / "guest.sock")

    @property
    def control(self) -> str:
        return str(self.folder / "control.sock")

    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "guest.log").read_text().splitlines()]

    def connection(self, *, control: bool = False) -> UnixConnection:
        return UnixConnection(self.control if control else self.public)

    def raw(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(20)
        sock.connect(self.public)
        return sock

    def request(
        self, method: str, path: str, body: bytes | None = None, *, control: bool = False, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        connection = self.connection(control=control)
        sent = dict(self.headers) | {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body=body, headers=sent)
        response = connection.getresponse()
        data = response.read()
        connection.close()
        return response.status, {name.lower(): value for name, value in response.getheaders()}, data

    def call(self, method: str, message: dict[str, Any], *, user: str | None = None, **headers: str) -> tuple[int, Any]:
        """A unary call of the process service: (status, decoded body)."""
        extra = {"Content-Type": "application/json"} | basic(user) | headers
        status, _, data = self.request("POST", f"/process.Process/{method}", json.dumps(message).encode(), **extra)
        return status, json.loads(data)

    def open(self, method: str, message: dict[str, Any], *, user: str | None = None, **headers: str) -> EventReader:
        """A streaming call, events as they come."""
        connection = self.connection()
        sent = {"Content-Type": "application/connect+json"} | basic(user) | self.headers
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(
            "POST", f"/process.Process/{method}", body=connect.frame(json.dumps(message).encode()), headers=sent
        )
        return EventReader(connection)

    def start(self, cmd: str, *args: str, **options: Any) -> EventReader:
        message: dict[str, Any] = {"process": {"cmd": cmd, "args": list(args)}}
        for name in ("envs", "cwd"):
            if name in options:
                message["process"][name] = options.pop(name)
        for name in ("tag", "stdin", "pty"):
            if name in options:
                message[name] = options.pop(name)
        return self.open("Start", message, **options)

    def run(self, cmd: str, *args: str, **options: Any) -> Outcome:
        return self.start(cmd, *args, **options).outcome()

    def stop(self, within_s: float = 8.0) -> int | None:
        """SIGTERM, then SIGKILL; the exit status."""
        signal.pidfd_send_signal(self.pidfd, signal.SIGTERM)
        if not select.select([self.pidfd], [], [], within_s)[0]:
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        os.close(self.pidfd)
        return os.waitstatus_to_exitcode(status)

    def memory_kib(self) -> int:
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1])
        return 0

    def private_dirty_kib(self) -> int:
        text = Path(f"/proc/{self.pid}/smaps_rollup").read_text()
        return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Private_Dirty:"))


@dataclass
class Outcome:
    pid: int
    stdout: bytes
    stderr: bytes
    pty: bytes
    end: dict[str, Any] | None
    error: dict[str, Any] | None
    events: list[dict[str, Any]]


class EventReader:
    """Reads the frames of one stream."""

    def __init__(self, connection: UnixConnection) -> None:
        self._connection = connection
        self.response = connection.getresponse()
        self.status = self.response.status
        self.error: dict[str, Any] | None = None
        self.ended = False

    def frame(self) -> tuple[int, bytes]:
        header = self.response.read(5)
        if len(header) < 5:
            raise EOFError
        return header[0], self.response.read(int.from_bytes(header[1:], "big"))

    def event(self) -> dict[str, Any] | None:
        """The next event, or None at the end of the stream."""
        flags, payload = self.frame()
        message = json.loads(payload)
        if flags & connect.END_STREAM:
            self.error = message.get("error")
            self.ended = True
            assert self.response.read() == b"", "something follows the end of the stream"
            self.close()
            return None
        event: dict[str, Any] = message["event"]
        return event

    def events(self) -> Iterator[dict[str, Any]]:
        while (event := self.event()) is not None:
            yield event

    def pid(self) -> int:
        event = self.event()
        assert event is not None and "start" in event, (event, self.error)
        return int(event["start"]["pid"])

    def outcome(self) -> Outcome:
        out: dict[str, list[bytes]] = {"stdout": [], "stderr": [], "pty": []}
        pid, end, seen = 0, None, []
        for event in self.events():
            seen.append(event)
            if "start" in event:
                pid = event["start"]["pid"]
            for key, value in event.get("data", {}).items():
                out[key].append(base64.b64decode(value))
            end = event.get("end", end)
        stdout, stderr, pty = (b"".join(out[key]) for key in ("stdout", "stderr", "pty"))
        return Outcome(pid, stdout, stderr, pty, end, self.error, seen)

    def until(self, key: str, wanted: bytes) -> bytes:
        """Read output of `key` until `wanted` has appeared."""
        got = b""
        while wanted not in got:
            event = self.event()
            assert event is not None, (got, self.error)
            got += base64.b64decode(event.get("data", {}).get(key, ""))
        return got

    def close(self) -> None:
        self.response.close()
        self._connection.close()


def basic(user: str | None) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:".encode()).decode()} if user else {}


def start_guest(
    folder: Path, *, token: str | None = None, user: str = "root", tcp: bool = False, **config: Any
) -> RunningGuest:
    """Fork a guest that serves in `folder`; returns when it is ready. With `tcp` its public side is on loopback."""
    folder.mkdir(parents=True, exist_ok=True)
    listen = {}
    for name, file in (("public", "guest.sock"), ("control", "control.sock")):
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(str(folder / file))
        sock.listen(64)
        listen[name] = sock
    if tcp:
        listen["public"].close()
        listen["public"] = socket.create_server(("127.0.0.1", 0))
    port = listen["public"].getsockname()[1] if tcp else 0
    ready_r, ready_w = os.pipe()
    given = {
        "sandbox_id": "itest",
        "template_id": "base",
        "access_token": token,
        "env": {},
        "user": user,
        "workdir": str(folder),
        "hostname": "itest",
    } | config
    pid = os.fork()
    if pid == 0:
        try:
            log_fd = os.open(folder / "guest.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            guest_main.serve(
                given,
                listen_fds={name: sock.fileno() for name, sock in listen.items()},
                log_fd=log_fd,
                ready=lambda: os.write(ready_w, b"1") and None,
            )
        finally:
            os._exit(99)
    os.close(ready_w)
    for sock in listen.values():
        sock.close()
    assert select.select([ready_r], [], [], READY_WITHIN_S)[0], "the guest did not become ready"
    said = os.read(ready_r, 1)
    os.close(ready_r)
    guest = RunningGuest(folder, pid, os.pidfd_open(pid), token, url=f"http://127.0.0.1:{port}")
    assert said == b"1", f"the guest died at its start: {guest.log()}"
    if token:
        guest.headers["X-Access-Token"] = token
    return guest


def alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Any, within_s: float = 5.0) -> bool:
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return False

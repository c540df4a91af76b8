"""A caller of Penstock with as little of its own as possible: one socket, one request at a time, no SDK.

So that what it measures is the platform; what the SDK adds is measured beside it.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

CHUNK_BYTES = 256 * 1024


class Caller:
    """A kept-alive HTTP/1.1 connection to `url`. `headers` go with every request."""

    def __init__(self, url: str, headers: dict[str, str], *, timeout_s: float = 60.0) -> None:
        place = urlsplit(url)
        assert place.hostname and place.port
        self._sock = socket.create_connection((place.hostname, place.port), timeout=timeout_s)
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._fixed = f"Host: {place.netloc}\r\n" + "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self._buffer = bytearray()

    def ask(self, method: str, target: str, body: bytes = b"", headers: dict[str, str] | None = None) -> bytes:
        """The body of the reply. Raises RuntimeError unless the status is 2xx."""
        self.send(self.request(method, target, body, headers))
        return self.reply()

    def request(self, method: str, target: str, body: bytes = b"", headers: dict[str, str] | None = None) -> bytes:
        """What `send` puts on the wire."""
        extra = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
        head = f"{method} {target} HTTP/1.1\r\n{self._fixed}{extra}Content-Length: {len(body)}\r\n\r\n"
        return head.encode() + body

    def send(self, request: bytes) -> None:
        """Without waiting for the reply; `reply` must come before the next request."""
        self._sock.sendall(request)

    def reply(self) -> bytes:
        """Of what was sent last. Waits, unless `fileno` was readable. Raises RuntimeError unless the status is 2xx."""
        return b"".join(self._reply())

    def fileno(self) -> int:
        return self._sock.fileno()

    def download(self, target: str) -> int:
        """How many bytes came; none of them is kept."""
        self._sock.sendall(f"GET {target} HTTP/1.1\r\n{self._fixed}\r\n".encode())
        return sum(len(piece) for piece in self._reply())

    def upload(self, target: str, size: int) -> None:
        """POST `size` zero bytes as they are."""
        head = f"POST {target} HTTP/1.1\r\n{self._fixed}Content-Type: application/octet-stream\r\n"
        self._sock.sendall(f"{head}Content-Length: {size}\r\n\r\n".encode())
        piece, left = bytes(CHUNK_BYTES), size
        while left:
            self._sock.sendall(piece[: min(left, CHUNK_BYTES)])
            left -= min(left, CHUNK_BYTES)
        for _ in self._reply():
            pass

    def close(self) -> None:
        self._sock.close()

    def _reply(self) -> Iterator[bytes]:
        head = self._until(b"\r\n\r\n").decode("latin-1").lower()
        status = int(head.split(" ", 2)[1])
        fields = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if line)
        if "chunked" in fields.get("transfer-encoding", ""):
            body = self._chunks()
        else:
            body = self._exactly(int(fields.get("content-length", 0)))
        if not 200 <= status < 300:
            raise RuntimeError(f"status {status}: {b''.join(body)[:300]!r}")
        yield from body

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self._until(b"\r\n"), 16):
            yield from self._exactly(size)
            self._until(b"\r\n")
        self._until(b"\r\n")

    def _exactly(self, size: int) -> Iterator[bytes]:
        while size:
            piece = bytes(self._buffer[:size]) if self._buffer else self._receive(min(size, CHUNK_BYTES))
            if self._buffer:
                del self._buffer[: len(piece)]
            size -= len(piece)
            yield piece

    def _until(self, mark: bytes) -> bytes:
        while (at := self._buffer.find(mark)) < 0:
            self._buffer += self._receive(65536)
        found = bytes(self._buffer[:at])
        del self._buffer[: at + len(mark)]
        return found

    def _receive(self, most: int) -> bytes:
        piece = self._sock.recv(most)
        if not piece:
            raise RuntimeError("the connection ended inside a reply")
        return piece


def start_message(command: str, *arguments: str) -> bytes:
    """The body of a Connect call of Process.Start, one frame."""
    body = json.dumps({"process": {"cmd": command, "args": arguments}, "stdin": False}).encode()
    return b"\0" + len(body).to_bytes(4, "big") + body


class Api(Caller):
    """The REST face."""

    def __init__(self, env: dict[str, str]) -> None:
        super().__init__(env["E2B_API_URL"], {"X-API-Key": env["E2B_API_KEY"], "Content-Type": "application/json"})

    def create(self, *, timeout_s: int = 300) -> dict[str, Any]:
        self.send(self.create_request(timeout_s=timeout_s))
        return self.created()

    def create_request(self, *, timeout_s: int = 300) -> bytes:
        return self.request("POST", "/sandboxes", json.dumps({"templateID": "base", "timeout": timeout_s}).encode())

    def created(self) -> dict[str, Any]:
        """The sandbox, once `create_request` was sent."""
        made: dict[str, Any] = json.loads(self.reply())
        return made

    def pause(self, sandbox: str, *, memory: bool = True) -> None:
        self.ask("POST", f"/sandboxes/{sandbox}/pause", json.dumps({"memory": memory}).encode())

    def connect(self, sandbox: str) -> None:
        """Resume it, if it is paused."""
        self.ask("POST", f"/v2/sandboxes/{sandbox}/connect", b'{"timeout": 300}')

    def kill(self, sandbox: str) -> None:
        self.ask("DELETE", f"/sandboxes/{sandbox}")


class Guest(Caller):
    """One sandbox, through the ingress."""

    def __init__(self, env: dict[str, str], sandbox: dict[str, Any]) -> None:
        routing = {"E2b-Sandbox-Id": sandbox["sandboxID"], "E2b-Sandbox-Port": "49983"}
        super().__init__(env["E2B_SANDBOX_URL"], {**routing, "X-Access-Token": sandbox["envdAccessToken"]})

    def run(self, command: str, *arguments: str) -> None:
        """Process.Start, and its events to the end. Raises RuntimeError unless it exited with 0."""
        reply = self.ask(
            "POST",
            "/process.Process/Start",
            start_message(command, *arguments),
            {"Content-Type": "application/connect+json", "Connect-Protocol-Version": "1"},
        )
        if b"exit status 0" not in reply:
            raise RuntimeError(f"{command}: {reply[-300:]!r}")

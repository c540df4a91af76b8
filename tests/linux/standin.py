"""The smallest guest: answers 204 to HTTP, and runs a program when asked. Only what a launch test needs.

`env={"FAIL": step}` makes that step of the birth fail; `serve`, `exit`, `hang` and `crash` fail in the guest itself.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
from typing import Any, NoReturn

from penstock.node.linux import birth

_fail_at: str | None = None


class _Parcels:
    """Reads what a sandbox is told, and remembers where it shall fail."""

    _decode = birth._PARCELS.decode

    def decode(self, raw: bytes) -> birth.Parcel:
        global _fail_at
        parcel = _Parcels._decode(raw)
        _fail_at = parcel.guest["env"].get("FAIL")
        return parcel


class _Steps(birth.Steps):
    def begin(self, name: str) -> None:
        super().begin(name)
        if name == _fail_at:
            raise OSError(errno.EDOM, f"made to fail at {name}")


birth._PARCELS = _Parcels()  # type: ignore[assignment,misc]
birth.Steps = _Steps  # type: ignore[misc]


def serve(
    config: dict[str, Any],
    *,
    listen_fds: dict[str, int],
    log_fd: int,
    cgroup_fds: dict[str, Any],
    disk_fd: int,
    ready: Any,
) -> NoReturn:
    public = socket.socket(fileno=listen_fds["public"])
    public.setblocking(True)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    match _fail_at:
        case "serve":
            raise RuntimeError("told to fail")
        case "exit":
            os._exit(3)
        case "crash":
            os.abort()
        case "hang":
            signal.pause()
    ready()
    while True:
        line, _ = public.accept()
        if os.fork() == 0:
            _answer(line, cgroup_fds["user"])
            os._exit(0)
        line.close()
        _reap()


def _reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def _answer(line: socket.socket, cgroups: list[int]) -> None:
    request = b""
    while chunk := line.recv(65_536):
        request += chunk
    if not request.startswith(b"RUN "):
        line.sendall(b"HTTP/1.1 204 No Content\r\nconnection: close\r\n\r\n")
        return
    wish = json.loads(request[4:])
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        for fd in cgroups:
            os.write(fd, b"0")
        _become(wish, writing)
    os.close(writing)
    output = b""
    while chunk := os.read(reading, 65_536):
        output += chunk
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    line.sendall(json.dumps({"status": status, "output": output.decode(errors="replace")}).encode())


def _become(wish: dict[str, Any], output: int) -> NoReturn:
    try:
        null = os.open("/dev/null", os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.closerange(3, 256)
        if wish["uid"]:
            os.setgroups([wish["uid"]])
            os.setresgid(*[wish["uid"]] * 3)
            os.setresuid(*[wish["uid"]] * 3)
        os.execve(wish["argv"][0], wish["argv"], {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"})
    except OSError as error:
        os.write(2, str(error).encode())
    finally:
        os._exit(127)

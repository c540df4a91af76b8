"""The zygote's loop: one request per connection, one clone per launch, and on to the next.

A single thread, so that a clone is safe; nothing it does waits for a sandbox, so that many launches overlap. It holds
no secret: what a sandbox is told travels in a memory file that only the child opens. Its own root directory is bare.
Its death ends no sandbox; children that die are reaped by the kernel (SIGCHLD is ignored), and whoever holds a pidfd
learns how they ended.

Protocol, on a SOCK_SEQPACKET unix socket, one JSON message each way per arrow, descriptors beside it:

    launch   → {"op": "launch", "luggage": {…positions…}} + descriptors
             ← {"pid", "start_ticks"} + pidfd            (from the zygote)
             ← {"ready": true, "steps_ms"} | {"error"}   (from the child, on the same connection), then end of file
    userns   → {"op": "userns", "uid_base"}   ← {"ok": true} + descriptor
    any      ← {"error": {"step", "errno", "why"}}
"""

from __future__ import annotations

import array
import gc
import importlib.machinery
import json
import os
import select
import signal
import socket
import sys
from typing import Any, Final, NoReturn

import msgspec

from penstock.node.linux import arenas, birth, capabilities, mounts, processes, seccomp, syscalls, titles, userns
from penstock.node.linux.birth import Kernel, Luggage, Serve

BACKLOG: Final = 4_096
CONNECTIONS_MAX: Final = 1_024  # accepted, request not yet read
REQUEST_BYTES_MAX: Final = 16_384
FDS_MAX: Final = 250  # the kernel passes at most 253
_NAMESPACES: Final = syscalls.CLONE_NEWNS | syscalls.CLONE_NEWPID | syscalls.CLONE_NEWIPC | syscalls.CLONE_NEWUTS


class BadRequest(Exception):
    """The message is not one of ours. Its sender is told and disconnected."""


def listen(path: str) -> socket.socket:
    """The zygote's socket at `path` (one left by a dead zygote is replaced), open to root only."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    folder = os.open(os.path.dirname(path) or ".", os.O_PATH | os.O_CLOEXEC)
    before = os.umask(0o077)
    try:
        listener.bind(f"/proc/self/fd/{folder}/{os.path.basename(path)}")  # a path of any length
    finally:
        os.umask(before)
        os.close(folder)
    listener.listen(BACKLOG)
    return listener


def run(listener: socket.socket, serve: Serve, *, stepping_stone: str) -> NoReturn:
    """Serve for ever. Call from a process with one thread that has imported all the guest needs.

    `stepping_stone` is any existing directory; see `mounts.enter_bare_root`.
    """
    assert len(os.listdir("/proc/self/task")) == 1, "a clone would leave other threads' locks taken"
    kernel = Kernel(filter=seccomp.build(), masks=mounts.masked_paths(), last_capability=capabilities.last())
    titles.prepare()
    titles.set_title("penstock-zygote")
    mounts.enter_bare_root(stepping_stone)
    _forbid_imports()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C at the daemon's terminal is not for us
    gc.collect()
    arenas.fill_holes()
    gc.freeze()  # the collector of a child must not touch, and so copy, pages of what we made
    _Loop(listener, kernel, serve).turn_for_ever()


def _forbid_imports() -> None:
    """There is nothing to import from any more, and in a child there soon will be: what lies in the image.

    Here and not in the child, because freeing the finders' caches copies pages (0.8 ms).
    """
    sys.meta_path[:] = [importlib.machinery.BuiltinImporter, importlib.machinery.FrozenImporter]
    sys.path.clear()
    sys.path_hooks.clear()
    sys.path_importer_cache.clear()


class _Loop:
    def __init__(self, listener: socket.socket, kernel: Kernel, serve: Serve) -> None:
        self._listener, self._kernel, self._serve = listener, kernel, serve
        self._poll = select.epoll()
        self._waiting: dict[int, socket.socket] = {}  # by descriptor
        self._poll.register(listener, select.EPOLLIN)

    def turn_for_ever(self) -> NoReturn:
        while True:
            for fd, _ in self._poll.poll():
                if fd == self._listener.fileno():
                    self._accept()
                else:
                    self._answer(self._waiting.pop(fd))

    def _accept(self) -> None:
        try:
            line, _ = self._listener.accept()
        except OSError as error:
            _say(f"accept: {error}")  # Safe: the listener stays readable, so we come again
            return
        if len(self._waiting) >= CONNECTIONS_MAX:
            line.close()
            return
        self._waiting[line.fileno()] = line
        self._poll.register(line, select.EPOLLIN)

    def _answer(self, line: socket.socket) -> None:
        """Read the one request of `line` and act on it; then the line is the child's, or closed."""
        self._poll.unregister(line)
        fds: list[int] = []
        try:
            raw, fds, _, _ = socket.recv_fds(line, REQUEST_BYTES_MAX, FDS_MAX, socket.MSG_CMSG_CLOEXEC)
            if raw:
                self._act(line, json.loads(raw), fds)
        except Exception as error:  # whatever a request does, the zygote serves the next one
            _say(f"request refused: {_described('zygote', error)['why']}")
            _tell_if_there(line, {"error": _described("zygote", error)})
        finally:
            for fd in fds:
                os.close(fd)
            line.close()

    def _act(self, line: socket.socket, request: dict[str, Any], fds: list[int]) -> None:
        match request.get("op"):
            case "launch":
                self._launch(line, _unpack(request["luggage"], fds))
            case "userns":
                fd = userns.create(int(request["uid_base"]))
                try:
                    _tell(line, {"ok": True}, fd)
                finally:
                    os.close(fd)
            case other:
                raise BadRequest(f"unknown operation {other!r}")

    def _launch(self, line: socket.socket, luggage: Luggage) -> None:
        cgroup_fd = -1 if luggage.unified is None else luggage.unified
        try:
            pid, pidfd = syscalls.clone3(_NAMESPACES, cgroup_fd=cgroup_fd)
        except OSError as error:
            _tell_if_there(line, {"error": _described("clone", error)})
            return
        if pid == 0:
            birth.be_born(luggage, line, self._kernel, self._serve)
        try:
            _tell(line, {"pid": pid, "start_ticks": processes.start_ticks(pid)}, pidfd)
        except OSError:
            _kill(pidfd)  # whoever asked has gone: nobody would own it
        finally:
            os.close(pidfd)


def _unpack(positions: dict[str, Any], fds: list[int]) -> Luggage:
    """Positions among the passed descriptors → descriptors."""
    try:
        named = {
            name: [fds[at] for at in value] if isinstance(value, list) else fds[value]
            for name, value in positions.items()
        }
        luggage = msgspec.convert(named, Luggage)
    except (msgspec.ValidationError, IndexError, TypeError) as error:
        raise BadRequest(f"luggage does not match the {len(fds)} descriptors: {error}") from error
    if not 0 < len(luggage.layers) <= mounts.LAYERS_MAX:
        raise BadRequest(f"{len(luggage.layers)} layers; 1 to {mounts.LAYERS_MAX} are possible")
    return luggage


def _tell(line: socket.socket, message: dict[str, Any], *fds: int) -> None:
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    line.sendmsg([json.dumps(message).encode()], ancillary)


def _tell_if_there(line: socket.socket, message: dict[str, Any]) -> None:
    try:
        _tell(line, message)
    except OSError:
        pass  # whoever asked has gone


def _kill(pidfd: int) -> None:
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except ProcessLookupError:
        pass  # it found nobody to talk to, and was faster


def _described(step: str, error: Exception) -> dict[str, Any]:
    number = error.errno if isinstance(error, OSError) and error.errno else 0
    return {"step": step, "errno": number, "why": f"{type(error).__name__}: {error}"}


def _say(text: str) -> None:
    sys.stderr.write(f"zygote: {text}\n")
    sys.stderr.flush()

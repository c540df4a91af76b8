"""Sockets inside a sandbox's network namespace, made from outside.

A socket belongs to the namespace in which it was created and works from anywhere afterwards, so entering is a matter of
two system calls around `socket()`. That happens on the loop's own thread, synchronously: nothing else runs in between,
and a thread per dial would cost ten times as much. If the way back failed, the process would serve from inside a
sandbox, so it ends instead.

A namespace lives as long as somebody holds a descriptor of it: ours are few, closed when the sandbox leaves the table.
"""

from __future__ import annotations

import ctypes
import os
import select
import socket
from collections import OrderedDict
from typing import Final

from penstock.ingress.table import Route

DESCRIPTORS_MAX: Final = 256  # namespaces held open; opening one again costs 30 µs
_CLONE_NEWNET: Final = 0x4000_0000
_libc: Final = ctypes.CDLL(None, use_errno=True)


class NamespaceGone(Exception):
    """The sandbox's pid 1 has died, or its pid names another process now."""


class Namespaces:
    """Descriptors by incarnation of a sandbox, the least recently used closed first."""

    def __init__(self, *, descriptors_max: int = DESCRIPTORS_MAX) -> None:
        self._held: OrderedDict[tuple[str, int, int], int] = OrderedDict()
        self._max = descriptors_max
        self._home = -1

    def socket(self, route: Route, family: socket.AddressFamily) -> socket.socket:
        """A non-blocking TCP socket inside the namespace of `route`. Raises NamespaceGone, OSError."""
        inside = self._descriptor(route)
        if self._home < 0:
            self._home = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        _enter(inside)
        try:
            return socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        finally:
            try:
                _enter(self._home)
            except OSError:
                os._exit(70)  # we are inside a sandbox and cannot leave: serving on would mix up networks

    def forget(self, route: Route) -> None:
        """The sandbox has ended: let its namespace die."""
        held = self._held.pop(_key(route), None)
        if held is not None:
            os.close(held)

    def close(self) -> None:
        while self._held:
            os.close(self._held.popitem()[1])
        if self._home >= 0:
            os.close(self._home)
            self._home = -1

    def __len__(self) -> int:
        return len(self._held)

    def _descriptor(self, route: Route) -> int:
        key = _key(route)
        held = self._held.get(key)
        if held is None:
            held = self._held[key] = _open(route.pid, route.start_ticks)
            if len(self._held) > self._max:
                os.close(self._held.popitem(last=False)[1])
        else:
            self._held.move_to_end(key)
        return held


def _key(route: Route) -> tuple[str, int, int]:
    return (route.sandbox, *route.incarnation)


def _open(pid: int, start_ticks: int) -> int:
    """The namespace of exactly that process. Raises NamespaceGone.

    The pidfd pins the identity: if it is still alive after its start time was read, what was opened before was its own.
    """
    if pid <= 0:
        raise NamespaceGone(f"pid {pid}")
    try:
        pidfd = os.pidfd_open(pid)
    except OSError as error:
        raise NamespaceGone(f"pid {pid}: {error.strerror}") from error
    try:
        found = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:
                ticks = int(file.read().rpartition(b")")[2].split()[19])
            if ticks != start_ticks or select.select([pidfd], [], [], 0)[0]:
                raise NamespaceGone(f"pid {pid} is another process now")
        except BaseException:
            os.close(found)
            raise
        return found
    except (FileNotFoundError, ProcessLookupError) as error:
        raise NamespaceGone(f"pid {pid}: {error.strerror}") from error
    finally:
        os.close(pidfd)


def _enter(namespace: int) -> None:
    if _libc.setns(namespace, _CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"setns: {os.strerror(number)}")

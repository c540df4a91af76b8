"""Network namespaces: made, entered by one thread, and kept by a file.

A socket belongs to the namespace of the thread that made it and then works from anywhere, so a short visit is all
that is ever needed. Python 3.11 has neither `os.unshare` nor `os.setns`.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import socket
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Final, TypeVar

_T = TypeVar("_T")

CLONE_NEWNET: Final = 0x4000_0000
_NS_GET_NSTYPE: Final = 0xB703
_MS_BIND: Final = 0x1000
_MNT_DETACH: Final = 2
_THREAD_NETNS: Final = "/proc/thread-self/ns/net"

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_void_p]
_libc.umount2.argtypes = [ctypes.c_char_p, ctypes.c_int]


def current() -> int:
    """A descriptor of the calling thread's network namespace."""
    return os.open(_THREAD_NETNS, os.O_RDONLY | os.O_CLOEXEC)


def enter(fd: int) -> None:
    """Move the calling thread into the namespace `fd`. Never call it on a thread that serves an event loop."""
    _check(_libc.setns(fd, CLONE_NEWNET), "setns")


def leave_for_new() -> int:
    """Move the calling thread into a network namespace made for it, and return a descriptor of that one."""
    _check(_libc.unshare(CLONE_NEWNET), "unshare(CLONE_NEWNET)")
    return current()


class Visit:
    """The calling thread is inside namespace `fd` for the length of the block."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._home = -1

    def __enter__(self) -> None:
        self._home = current()
        enter(self._fd)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        enter(self._home)
        os.close(self._home)


def run_inside(fd: int, work: Callable[[], _T]) -> _T:
    """Run `work` on a thread of its own inside namespace `fd`, and return or raise what it did. Keep it short."""
    outcome: list[_T] = []
    failure: list[BaseException] = []

    def visit() -> None:
        try:
            enter(fd)
            outcome.append(work())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=visit, name="netns-visit", daemon=True)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return outcome[0]


def socket_inside(fd: int, family: int, kind: int) -> socket.socket:
    """A non-blocking socket that belongs to namespace `fd` and works from any thread of this process."""
    return run_inside(fd, lambda: socket.socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC))


def is_netns(fd: int) -> bool:
    """Whether `fd` is a network namespace (a plain file under a lost bind mount is not)."""
    try:
        return fcntl.ioctl(fd, _NS_GET_NSTYPE) == CLONE_NEWNET
    except OSError:
        return False


def keep(fd: int, path: str) -> None:
    """Pin namespace `fd` to `path` by a bind mount, so that it outlives this process."""
    os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
    _check(_libc.mount(f"/proc/self/fd/{fd}".encode(), path.encode(), None, _MS_BIND, None), "mount", path)


def open_kept(path: str) -> int | None:
    """A descriptor of the namespace pinned at `path`, or None when there is none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    if is_netns(fd):
        return fd
    os.close(fd)
    return None


def release(path: str) -> None:
    """Unpin every namespace stacked on `path` and remove the file. Absent is success; verified by looking again."""
    while (fd := open_kept(path)) is not None:
        os.close(fd)
        _check(_libc.umount2(path.encode(), _MNT_DETACH), "umount", path)
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    if os.path.lexists(path):
        raise OSError(errno.EBUSY, "namespace file could not be removed", path)


def write_sysctl(name: str, value: str) -> bool:
    """Set `net/...` in the calling thread's namespace. False when this kernel has no such setting."""
    try:
        fd = os.open(f"/proc/sys/net/{name}", os.O_WRONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)
    return True


def _check(result: int, what: str, path: str | None = None) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}", path)

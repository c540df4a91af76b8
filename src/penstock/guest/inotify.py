"""inotify(7) through libc, which Python does not wrap. Symbols are bound at import: after the pivot nothing is loaded.

Events are read until the kernel has no more, so what happened before a call of `read` is in its answer: fsnotify
queues an event before the system call that caused it returns.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from typing import Final, NamedTuple

IN_MODIFY: Final = 0x002
IN_ATTRIB: Final = 0x004
IN_MOVED_FROM: Final = 0x040
IN_MOVED_TO: Final = 0x080
IN_CREATE: Final = 0x100
IN_DELETE: Final = 0x200
IN_DELETE_SELF: Final = 0x400
IN_MOVE_SELF: Final = 0x800
IN_UNMOUNT: Final = 0x2000
IN_Q_OVERFLOW: Final = 0x4000
IN_IGNORED: Final = 0x8000
IN_ONLYDIR: Final = 0x01000000
IN_DONT_FOLLOW: Final = 0x02000000
IN_ISDIR: Final = 0x40000000

_NONBLOCK_CLOEXEC: Final = os.O_NONBLOCK | os.O_CLOEXEC
_READ_BYTES: Final = 1 << 16
_READS_MAX: Final = 64  # per call, so that a writer inside cannot hold the guest: 4 MiB, 16 times the default queue
_HEADER: Final = struct.Struct("iIII")

_libc = ctypes.CDLL(None, use_errno=True)
_init1 = _libc.inotify_init1
_init1.argtypes = [ctypes.c_int]
_init1.restype = ctypes.c_int
_add_watch = _libc.inotify_add_watch
_add_watch.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_uint32]
_add_watch.restype = ctypes.c_int
_rm_watch = _libc.inotify_rm_watch
_rm_watch.argtypes = [ctypes.c_int, ctypes.c_int]
_rm_watch.restype = ctypes.c_int


class Raw(NamedTuple):
    watch: int
    mask: int
    name: str  # inside the watched directory; empty when the event is about the directory itself


class Inotify:
    """One instance. Owns `fd`, which becomes readable when events wait."""

    def __init__(self) -> None:
        """Raises OSError EMFILE when the user namespace has no instance left."""
        self.fd = _checked(_init1(_NONBLOCK_CLOEXEC), "")

    def add(self, path: str, mask: int) -> int:
        """Watch `path`; the same inode again gives the same number. Raises OSError, ENOSPC at the limit of watches."""
        return _checked(_add_watch(self.fd, os.fsencode(path), mask), path)

    def remove(self, watch: int) -> None:
        """Stop watching. A watch the kernel dropped already is success."""
        if _rm_watch(self.fd, watch) < 0 and (number := ctypes.get_errno()) != errno.EINVAL:
            raise OSError(number, os.strerror(number))

    def read(self) -> list[Raw]:
        """Everything that waits, oldest first; empty when nothing does."""
        events: list[Raw] = []
        for _ in range(_READS_MAX):
            try:
                data = os.read(self.fd, _READ_BYTES)
            except BlockingIOError:
                break
            at = 0
            while at < len(data):
                watch, mask, _cookie, length = _HEADER.unpack_from(data, at)
                at += _HEADER.size
                events.append(Raw(watch, mask, os.fsdecode(data[at : at + length].rstrip(b"\0"))))
                at += length
        return events

    def close(self) -> None:
        """Give the descriptor back, and with it every watch. Twice is fine."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _checked(result: int, path: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path or None)
    return result

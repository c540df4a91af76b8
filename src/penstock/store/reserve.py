"""Room on the disk that is the store's before it needs it: a full host disk does not keep anybody from ending things.

Blocks beyond the end of a file are given to it without changing its length (fallocate(2), FALLOC_FL_KEEP_SIZE), so
SQLite and its recovery see nothing of them; what it appends lands in them. So the write-ahead log takes thousands of
commits when nobody else on the disk can write a byte, and checkpoints have room in the file itself.

Refused: a ballast file that is removed when a write fails. Between the removal and our next write, the space is
anybody's, and what has filled the disk is still writing.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Final

KEEP_SIZE: Final = 1  # FALLOC_FL_KEEP_SIZE
WAL_BYTES: Final = 24 * 1024 * 1024  # from its start: SQLite begins it anew after each checkpoint, at 16 MiB
FILE_BYTES: Final = 16 * 1024 * 1024  # from its end
INDEX_BYTES: Final = 256 * 1024  # of -shm, from its start: 32 KiB for each 16 MiB of log
TOP_UP_BYTES: Final = 4 * 1024 * 1024  # written between two looks
RETRY_GROUPS: Final = 64  # groups written between two tries for what is missing

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate64.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class Reserve:
    """Of the store at `path`. For one thread; `close` only after every connection to the store was closed.

    (Closing any descriptor of the store's file drops SQLite's POSIX locks on it, hence the descriptors are kept.)
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fds: dict[str, int] = {}
        self._written_bytes = self._groups = 0
        self.whole = False  # everything is reserved. False for good on file systems without fallocate: no harm

    def written(self, size_bytes: int) -> None:
        """Tell of a group that was logged; now and then reserves what it used."""
        self._written_bytes += size_bytes
        self._groups += 1
        if self._written_bytes >= TOP_UP_BYTES or (not self.whole and self._groups >= RETRY_GROUPS):
            self.top_up()

    def top_up(self) -> None:
        """Some microseconds when nothing is missing. Raises nothing: without a reserve the store works as well."""
        self._written_bytes = self._groups = 0
        try:
            parts = (("-wal", 0, WAL_BYTES), ("-shm", 0, INDEX_BYTES), ("", self._path.stat().st_size, FILE_BYTES))
            reserved = [self._reserve(suffix, start, count) for suffix, start, count in parts]
        except OSError:
            reserved = [False]  # Safe: somebody took the files away, or we have no descriptor left; the next look tells
        self.whole = all(reserved)

    def close(self) -> None:
        """Idempotent."""
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def _reserve(self, suffix: str, start: int, count: int) -> bool:
        if suffix not in self._fds:
            self._fds[suffix] = os.open(f"{self._path}{suffix}", os.O_RDWR | os.O_CLOEXEC)
        # Safe to fail: there is no room now, or never on this file system. What was reserved before stays.
        return int(_libc.fallocate64(self._fds[suffix], KEEP_SIZE, start, count)) == 0

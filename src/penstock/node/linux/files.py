"""Adapter of the port `Files`: records and run directories below the data folder.

Plain synchronous calls on the local disk's page cache, some microseconds each: what they write survives the death of
the daemon, not of the machine, and neither do sandboxes.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import struct
from typing import Final

from penstock.node.linux.failpoint import Failpoint, Moment

_RECORD_SUFFIX: Final = ".log"
_RECORD_BYTES_MAX: Final = 4 << 20
_GET_FLAGS: Final = 0x8008_6601  # FS_IOC_GETFLAGS: _IOR('f', 1, long)
_SET_FLAGS: Final = 0x4008_6602  # FS_IOC_SETFLAGS: _IOW('f', 2, long)
_TOP_OF_TREE: Final = 0x0002_0000  # FS_TOPDIR_FL


class LinuxFiles:
    """`records` and `run` are existing folders. A name is an id of ours: no slash, no leading dot.

    `failpoint` is for tests: see there.
    """

    def __init__(self, *, records: str, run: str, failpoint: Failpoint | None = None) -> None:
        self._records, self._run, self._failpoint = records, run, failpoint
        self._spread = False  # once, before the first folder
        self._ends: dict[str, int] = {}  # where a record ends that we wrote to: with a whole line

    def make_run_dir(self, sandbox: str) -> str:
        """A new directory, 0700; one that is there already is kept (a create that is tried again)."""
        path = _below(self._run, sandbox)
        if not self._spread:
            self._spread = True
            _spread(self._run)
        try:
            os.mkdir(path, mode=0o700)
        except FileExistsError:
            pass
        return path

    def remove_run_dir(self, sandbox: str) -> None:
        """Absent is success."""
        try:
            shutil.rmtree(_below(self._run, sandbox))
        except FileNotFoundError:
            pass

    def list_run_dirs(self) -> set[str]:
        return set(_names(self._run))

    def append_record(self, sandbox: str, line: bytes) -> None:
        """Append `line` and a newline in one write. Raises OSError with the record as it was."""
        assert b"\n" not in line
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        fd = os.open(self._record(sandbox), flags, 0o600)
        try:
            before = os.fstat(fd).st_size
            if before and before != self._ends.get(sandbox):
                before = _make_whole(fd, before)
            data = line + b"\n"
            if self._failpoint is not None:
                self._write_and_die(self._failpoint, fd, sandbox, data)
            if os.write(fd, data) != len(data):
                os.ftruncate(fd, before)  # half a line would swallow the next one
                raise OSError(errno.ENOSPC, "the disk is full", self._record(sandbox))
            self._ends[sandbox] = before + len(data)
        finally:
            os.close(fd)

    def read_record(self, sandbox: str) -> list[bytes]:
        """Its lines without newlines, but for a torn last one, which nobody was told of. Empty when absent."""
        try:
            with open(self._record(sandbox), "rb") as file:
                content = file.read(_RECORD_BYTES_MAX)
        except FileNotFoundError:
            return []
        return content.split(b"\n")[:-1]

    def remove_record(self, sandbox: str) -> None:
        """Absent is success."""
        self._ends.pop(sandbox, None)
        reached = self._failpoint.reach(f"unlink {sandbox}".encode()) if self._failpoint is not None else None
        try:
            os.unlink(self._record(sandbox))
        except FileNotFoundError:
            pass
        if self._failpoint is not None and reached is not None:
            self._failpoint.die()

    def list_records(self) -> set[str]:
        return {name[: -len(_RECORD_SUFFIX)] for name in _names(self._records) if name.endswith(_RECORD_SUFFIX)}

    @staticmethod
    def _write_and_die(failpoint: Failpoint, fd: int, sandbox: str, data: bytes) -> None:
        """Nothing, unless this is the write to die at."""
        reached = failpoint.reach(f"{sandbox} {data.decode()[:-1]}".encode())
        if reached is not None:
            os.write(fd, data if reached is Moment.AFTER else data[: len(data) // 2])
            failpoint.die()

    def _record(self, sandbox: str) -> str:
        return _below(self._records, sandbox) + _RECORD_SUFFIX


def _names(folder: str) -> list[str]:
    """Empty when the folder is gone: whoever took it away took what was in it."""
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def _below(folder: str, name: str) -> str:
    assert name and "/" not in name and not name.startswith("."), f"not a name of ours: {name!r}"
    return f"{folder}/{name}"


def _make_whole(fd: int, size: int) -> int:
    """Cut off a torn last line, which an earlier daemon left: it would swallow what is appended to it. The new size."""
    if os.pread(fd, 1, size - 1) != b"\n":
        size = os.pread(fd, _RECORD_BYTES_MAX, 0).rfind(b"\n") + 1
        os.ftruncate(fd, size)
    return size


def _spread(folder: str) -> None:
    """Ask ext4 to put each folder made in `folder` into another part of the disk (`chattr +T`).

    Each sandbox's folder comes and goes with four files. Without a journal ext4 gives a number back only minutes after
    its file was deleted, and looks past all of those each time: with a thousand deleted in one part of the disk, 2 ms
    of a create. Spread out, there are few in each. Where it is no ext4 nothing changes.
    """
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        flags = struct.unpack("=I", fcntl.ioctl(fd, _GET_FLAGS, bytes(4)))[0]
        if not flags & _TOP_OF_TREE:
            fcntl.ioctl(fd, _SET_FLAGS, struct.pack("=I", flags | _TOP_OF_TREE))
    except OSError:
        pass  # Safe: a file system without such flags, or without this one
    finally:
        os.close(fd)

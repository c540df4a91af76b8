"""Adapter of the port `Files`: records and run directories below the data folder.

Plain synchronous calls on the local disk's page cache, some microseconds each: what they write survives the death of
the daemon, not of the machine, and neither do sandboxes.
"""

from __future__ import annotations

import errno
import os
import shutil
from typing import Final

_RECORD_SUFFIX: Final = ".log"
_RECORD_BYTES_MAX: Final = 4 << 20


class LinuxFiles:
    """`records` and `run` are existing folders. A name is an id of ours: no slash, no leading dot."""

    def __init__(self, *, records: str, run: str) -> None:
        self._records, self._run = records, run
        self._whole: set[str] = set()  # records that end with a whole line, because we wrote it

    def make_run_dir(self, sandbox: str) -> str:
        """A new directory, 0700; one that is there already is kept (a create that is tried again)."""
        path = _below(self._run, sandbox)
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
        return set(os.listdir(self._run))

    def append_record(self, sandbox: str, line: bytes) -> None:
        """Append `line` and a newline in one write. Raises OSError with the record as it was."""
        assert b"\n" not in line
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        fd = os.open(self._record(sandbox), flags, 0o600)
        try:
            if sandbox not in self._whole:
                _make_whole(fd)
                self._whole.add(sandbox)
            data = line + b"\n"
            written = os.write(fd, data)
            if written != len(data):
                os.ftruncate(fd, os.fstat(fd).st_size - written)  # half a line would swallow the next one
                raise OSError(errno.ENOSPC, "the disk is full", self._record(sandbox))
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
        self._whole.discard(sandbox)
        try:
            os.unlink(self._record(sandbox))
        except FileNotFoundError:
            pass

    def list_records(self) -> set[str]:
        return {name[: -len(_RECORD_SUFFIX)] for name in os.listdir(self._records) if name.endswith(_RECORD_SUFFIX)}

    def _record(self, sandbox: str) -> str:
        return _below(self._records, sandbox) + _RECORD_SUFFIX


def _below(folder: str, name: str) -> str:
    assert name and "/" not in name and not name.startswith("."), f"not a name of ours: {name!r}"
    return f"{folder}/{name}"


def _make_whole(fd: int) -> None:
    """Cut off a torn last line, which an earlier daemon left: it would swallow what is appended to it."""
    size = os.fstat(fd).st_size
    if size and os.pread(fd, 1, size - 1) != b"\n":
        os.ftruncate(fd, os.pread(fd, _RECORD_BYTES_MAX, 0).rfind(b"\n") + 1)

"""Pid 1 of a sandbox, held by a pidfd: waited for on a descriptor, signalled through it, never by number.

A pid is identified for ever by (pid, start time, boot): the pidfd is opened first and the start time compared then, so
a re-used pid is never taken for ours. Sandboxes are nobody's children, so how one ended is not known from wait(2):
the kernel keeps it in the pidfd (6.15 and newer) or, until somebody reaped it, in field 52 of its stat file.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import select
import signal
import struct
from typing import Final

_PIDFD_GET_INFO: Final = 0xC000_0000 | 64 << 16 | 0xFF << 8 | 11  # _IOWR(0xFF, 11, 64 bytes: its first version)
_INFO_PID, _INFO_EXIT = 1, 8
_EXIT_CODE_AT: Final = 60
_REAP_TRIES: Final = 4
_REAP_PAUSE_S: Final = 0.005


def start_ticks(pid: int) -> int:
    """Field 22 of /proc/<pid>/stat: clock ticks from boot to the start of `pid`; 0 when it is gone."""
    fields = _stat(pid)
    return int(fields[19]) if fields else 0


def _stat(pid: int) -> list[str]:
    """Fields of the stat file from the third (the state) on; empty when the process is gone."""
    try:
        fd = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return []
    try:
        return os.read(fd, 4_096).decode(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []  # it went while we read
    finally:
        os.close(fd)


def exit_status(pidfd: int, pid: int) -> int | None:
    """The wait status of a dead process that need not be our child; None when nothing knows it (yet)."""
    info = bytearray(64)
    struct.pack_into("=Q", info, 0, _INFO_PID | _INFO_EXIT)
    try:
        fcntl.ioctl(pidfd, _PIDFD_GET_INFO, info)
        if struct.unpack_from("=Q", info)[0] & _INFO_EXIT:
            return int(struct.unpack_from("=i", info, _EXIT_CODE_AT)[0])
    except OSError:
        pass  # an older kernel, or reaped before it could tell: the stat file may know
    fields = _stat(pid)
    return int(fields[-1]) if fields and fields[0] == "Z" else None


class PidfdProcess:
    """Adapter of the port `Process`. Owns `pidfd`. All methods belong to one event loop."""

    def __init__(self, pid: int, start_ticks: int, pidfd: int) -> None:
        self.pid, self.start_ticks = pid, start_ticks
        self._pidfd = pidfd
        self._died: asyncio.Future[None] | None = None  # while somebody waits
        self._status: int | None = None
        self.steps_ms: dict[str, float] = {}  # of the launch; empty when adopted

    async def wait(self) -> int | None:
        """The wait status once it has died; None when the kernel no longer knows it. Cancellation-safe."""
        assert self._pidfd >= 0, "closed"
        if self.alive():
            await asyncio.shield(self._death())
        for _ in range(_REAP_TRIES):
            if self._status is not None or self._pidfd < 0:
                break
            self._status = exit_status(self._pidfd, self.pid)
            if self._status is None:
                await asyncio.sleep(_REAP_PAUSE_S)  # between its death and its reaping neither source knows
        return self._status

    def signal(self, number: int) -> None:
        """Send a signal. A dead process is success."""
        if self._pidfd < 0:
            return
        try:
            signal.pidfd_send_signal(self._pidfd, number)
        except ProcessLookupError:
            pass

    def alive(self) -> bool:
        if self._pidfd < 0:
            return False
        poller = select.poll()
        poller.register(self._pidfd, select.POLLIN)
        return not poller.poll(0)

    def close(self) -> None:
        """Give the descriptor back; waiters wake and get None. The process is not touched."""
        if self._pidfd < 0:
            return
        if self._died is not None:
            self._stop_watching(self._died)
        os.close(self._pidfd)
        self._pidfd = -1

    def _death(self) -> asyncio.Future[None]:
        """One future for all waiters: the loop watches a descriptor once."""
        if self._died is None:
            loop = asyncio.get_running_loop()
            self._died = loop.create_future()
            loop.add_reader(self._pidfd, self._stop_watching, self._died)
        return self._died

    def _stop_watching(self, died: asyncio.Future[None]) -> None:
        died.get_loop().remove_reader(self._pidfd)
        self._died = None
        if not died.done():
            died.set_result(None)


def adopt(pid: int, ticks: int) -> PidfdProcess | None:
    """A handle on a living process, or None when (pid, start time) no longer names one."""
    if pid <= 1 or ticks <= 0:
        return None
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return None
    process = PidfdProcess(pid, ticks, pidfd)
    if start_ticks(pid) == ticks and process.alive():
        return process
    process.close()
    return None

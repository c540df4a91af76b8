"""POST /quiesce, for the daemon: what the sandbox has written so far is on its disk.

Of no use here: sync(2), which writes out every file system of the machine and waits for all neighbours; fsync and
syncfs of a file in the sandbox, which the overlay, mounted `volatile`, answers without doing anything. What works is
syncfs(2) on a file of the file system beneath, and only somebody who had it open before the pivot has one.

It may take as long as the disk does, and nothing interrupts it, so a child waits for it; the guest serves on.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import json
import math
import os
import signal
from typing import Any, Final, NoReturn

from penstock.core.deadlines import DeadlinePassed, within
from penstock.guest.exchange import Exchange, HttpError
from penstock.guest.parts import Parts

BODY_BYTES_MAX: Final = 1024
WITHIN_S_MAX: Final = 600.0
_FD_CEILING: Final = 1 << 20
_ALL_SIGNALS: Final = frozenset(range(1, 32)) - {signal.SIGKILL, signal.SIGSTOP}

_syncfs: Final[Any] = ctypes.CDLL(None, use_errno=True).syncfs  # bound now: after the pivot nothing is loaded
_syncfs.argtypes = [ctypes.c_int]
_syncfs.restype = ctypes.c_int


def register(parts: Parts, disk_fd: int) -> None:
    """`disk_fd` is an open file (not O_PATH) on the file system beneath the sandbox's root."""
    disk = Disk(disk_fd)

    async def quiesce(exchange: Exchange) -> None:
        """Body `{"within_s"}`. 200 `{"synced_at"}`, wall seconds: what was written before then is on disk.

        504 when it took longer than asked for, 500 when the disk failed; then nothing is promised.
        """
        within_s = _parse(await exchange.read_body(BODY_BYTES_MAX))
        synced_at = parts.clock.wall()
        try:
            await disk.sync(within_s=within_s)
        except DeadlinePassed:
            raise
        except OSError as error:
            raise HttpError(500, f"the disk could not be synced: {error}") from error
        await exchange.respond_json(200, {"synced_at": synced_at})

    parts.routes.add("POST", "/quiesce", quiesce, guarded=False, internal=True)


class Disk:
    """Syncs one at a time; a child that outlasts its caller's deadline is waited for by the next."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._running: asyncio.Future[int] | None = None  # its errno, 0 for success

    async def sync(self, *, within_s: float) -> None:
        """What was written before this call is on disk when it returns. Raises OSError, or DeadlinePassed."""
        async with within(within_s, "sync of the sandbox's disk"):
            while self._running is not None:  # begun before our call: it may miss what was written since
                await asyncio.shield(self._running)
            number = await asyncio.shield(self._begin())
        if number:
            raise OSError(number, os.strerror(number))

    def _begin(self) -> asyncio.Future[int]:
        if self._fd < 0:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        loop = asyncio.get_running_loop()
        reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            _fork(self._fd, writer)
        except OSError:
            os.close(reader)
            raise
        finally:
            os.close(writer)
        running = self._running = loop.create_future()

        def ended() -> None:
            """An empty pipe: the child was killed before it could say anything."""
            text = os.read(reader, 16)
            loop.remove_reader(reader)
            os.close(reader)
            self._running = None
            if not running.done():
                running.set_result(int(text) if text.isdigit() else errno.EINTR)

        loop.add_reader(reader, ended)
        return running


def _fork(fd: int, report_fd: int) -> None:
    """Signals are held back across the fork: one that reached the child would be written into our wake-up pipe. Pid 1
    collects the child with all others."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ALL_SIGNALS)
    try:
        if os.fork() == 0:
            _be_the_child(fd, report_fd)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _be_the_child(fd: int, report_fd: int) -> NoReturn:
    """With no connection of the guest's: its peers must see it close while we wait."""
    low, high = sorted((fd, report_fd))
    try:
        for first, last in ((3, low), (low + 1, high), (high + 1, _FD_CEILING)):
            os.closerange(first, max(first, last))  # an end below its begin would mean "all" to close_range(2)
        number = 0 if _syncfs(fd) == 0 else ctypes.get_errno()
        os.write(report_fd, b"%d" % number)
    finally:
        os._exit(0)


def _parse(body: bytes) -> float:
    try:
        wish = json.loads(body)
    except (ValueError, RecursionError):
        raise HttpError(400, "the body is not JSON") from None
    within_s = wish.get("within_s") if isinstance(wish, dict) else None
    if not isinstance(within_s, int | float) or isinstance(within_s, bool) or not math.isfinite(within_s):
        raise HttpError(400, "within_s must be a number of seconds")
    return min(max(float(within_s), 0.0), WITHIN_S_MAX)

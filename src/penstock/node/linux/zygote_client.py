"""The daemon's side of the zygote's socket. See `zygote` for the protocol.

One connection per request, none kept: a daemon that dies leaves nothing behind in the zygote, and a zygote that was
replaced is simply the one that answers next.
"""

from __future__ import annotations

import array
import asyncio
import errno
import json
import os
import socket
from collections.abc import Sequence
from typing import Any, Final

from penstock.core.deadlines import within
from penstock.core.settle import settled
from penstock.model.errors import Unavailable
from penstock.node.linux.zygote import REQUEST_BYTES_MAX

USERNS_S: Final = 5.0  # 2 ms when nothing is wrong
REPLACED_S: Final = 3.0  # a new one listens half a second after the death of the last
_BUSY_PAUSE_S: Final = 0.005
_PASSING: Final = (errno.EAGAIN, errno.ENOENT, errno.ECONNREFUSED)
_FDS_IN_REPLY_MAX: Final = 4

Reply = tuple[dict[str, Any] | None, list[int]]  # None: end of file; the receiver owns the descriptors


class ZygoteClient:
    """Connects to the zygote listening at `path`. Stateless; any number of requests at once.

    `replaced_s` bounds how long a request waits for the next zygote when none listens.
    """

    def __init__(self, path: str, *, replaced_s: float = REPLACED_S) -> None:
        self._path, self._replaced_s = path, replaced_s

    async def create_userns(self, uid_base: int) -> int:
        """A user namespace that maps 65,536 ids from `uid_base`; see `userns`. The caller owns the descriptor.

        Raises Unavailable when the zygote does not answer or cannot, DeadlinePassed. If cancelled, nothing is kept.
        """
        line = await self.connect()
        with line:
            line.send({"op": "userns", "uid_base": uid_base})
            outcome = await settled(line.receive(), within_s=USERNS_S, what="user namespace from the zygote")
        if outcome.cancelled is not None and outcome.error is None:
            close_all(outcome.value[1])
        message, fds = outcome.hand_back()
        if message is not None and message.get("ok") and len(fds) == 1:
            return fds[0]
        close_all(fds)
        raise Unavailable("user namespace could not be made", why=_reason(message))

    async def connect(self, *, wait: bool = True) -> Line:
        """A new connection. Waits while its backlog is full, and for a zygote that is being replaced.

        Raises Unavailable when none listens, or not soon enough.
        """
        give_up_at = asyncio.get_running_loop().time() + (self._replaced_s if wait else 0)
        folder = os.open(os.path.dirname(self._path) or ".", os.O_PATH | os.O_CLOEXEC)
        # Through the folder's descriptor: a socket address holds 107 bytes, a data folder's path may be longer.
        address = f"/proc/self/fd/{folder}/{os.path.basename(self._path)}"
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            # Nothing tells when a full backlog has room again, or a new zygote listens. The caller has a deadline.
            while (number := connection.connect_ex(address)) in _PASSING:
                if number != errno.EAGAIN and asyncio.get_running_loop().time() >= give_up_at:
                    break
                await asyncio.sleep(_BUSY_PAUSE_S)
            if number != 0:
                raise Unavailable("the zygote does not answer", which=self._path, why=os.strerror(number))
        except BaseException:
            connection.close()
            raise
        finally:
            os.close(folder)
        return Line(connection)

    async def answers(self, *, within_s: float) -> bool:
        """Whether a zygote takes connections now."""
        try:
            async with within(within_s, "connection to the zygote"):
                (await self.connect(wait=False)).close()
        except (Unavailable, OSError):
            return False
        return True


class Line:
    """One connection: messages with descriptors, either way. A context manager; `close` is idempotent."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def send(self, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
        raw = json.dumps(message).encode()
        assert len(raw) <= REQUEST_BYTES_MAX
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self._connection.sendmsg([raw], ancillary)

    async def receive(self) -> Reply:
        """The next message and its descriptors. Cancellation-safe: a message is either returned or still there."""
        while True:
            try:
                return self._receive_nowait()
            except BlockingIOError:
                await self._readable()

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _receive_nowait(self) -> Reply:
        flags = socket.MSG_CMSG_CLOEXEC
        try:
            raw, fds, _, _ = socket.recv_fds(self._connection, REQUEST_BYTES_MAX, _FDS_IN_REPLY_MAX, flags)
        except ConnectionResetError:
            return None, []
        return (json.loads(raw) if raw else None), list(fds)

    async def _readable(self) -> None:
        loop = asyncio.get_running_loop()
        readable: asyncio.Future[None] = loop.create_future()
        loop.add_reader(self._connection, _wake, readable)
        try:
            await readable
        finally:
            loop.remove_reader(self._connection)


def _wake(waiting: asyncio.Future[None]) -> None:
    if not waiting.done():
        waiting.set_result(None)


def close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


def _reason(message: dict[str, Any] | None) -> str:
    if message is None:
        return "the zygote closed the connection"
    return str(message.get("error", {}).get("why", message))

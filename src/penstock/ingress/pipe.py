"""What a client's and an upstream's end of an exchange have in common: reading that can be held back, and a reset.

What is held per direction is one read of the loop and the other side's write buffer, whose high mark is low on
purpose: a write beyond it is tried at once, and if the kernel does not take it all, reading stops. uvloop reads 250 KiB
at once, so that makes 254 KiB; and only for a peer that is slower than the kernel's own buffers.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import Final, cast

READ_BYTES_MAX: Final = 256 * 1024  # of one read, in either loop
WRITE_HIGH_BYTES: Final = 4 * 1024

_LINGER_ZERO: Final = struct.pack("ii", 1, 0)


class Pipe(asyncio.Protocol):
    """One end. `read_paused` is ours to set, `write_paused` the transport's."""

    __slots__ = ("read_paused", "transport", "write_paused")

    def __init__(self) -> None:
        self.transport: asyncio.Transport = _NOT_CONNECTED
        self.read_paused = False
        self.write_paused = False

    def connected(self, transport: asyncio.BaseTransport) -> None:
        # A cast, not a check: uvloop's transports have the methods and not the base class.
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(high=WRITE_HIGH_BYTES)

    def data_received(self, data: bytes) -> None:
        raise NotImplementedError

    def pause_reading(self) -> None:
        if not self.read_paused and not self.transport.is_closing():
            self.read_paused = True
            self.transport.pause_reading()

    def resume_reading(self) -> None:
        if self.read_paused and not self.transport.is_closing():
            self.read_paused = False
            self.transport.resume_reading()

    def reset(self) -> None:
        """Close by RST, dropping what is unsent: the peer learns that the stream was cut, not that it ended.

        A plain end inside a chunked body makes some E2B SDKs raise the wrong error (spec/e2b-sdk.md 0.7).
        """
        sock = self.transport.get_extra_info("socket")
        if sock is not None and sock.family != socket.AF_UNIX:
            try:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)
            except OSError:
                pass  # closed already: nothing to reset
        self.transport.abort()


class _NotConnected(asyncio.Transport):
    """Stands in until `connection_made`: closed, and silent."""

    def is_closing(self) -> bool:
        return True

    def abort(self) -> None:
        pass

    def close(self) -> None:
        pass


_NOT_CONNECTED: Final = _NotConnected()

"""A network in memory: asyncio transports on the virtual loop that behave as badly as real ones may.

Every connection has delays of its own. What was written in one piece arrives in several, or several pieces in one;
a slow reader fills the sender's buffer, which then pauses; either half closes by itself; closing with unread input, or
writing to somebody who has closed, is answered by a reset, which may or may not overtake what was on its way. A process
that is killed runs nothing any more: its connections end as the kernel ends them, without a word to its protocols.

Sources: tcp(7), unix(7), RFC 9293 3.10.7 (when a reset is sent). How many deliveries a write takes is drawn without
looking at its length, so that a body whose length is not the same in each run (a file's time stamp) arrives at the same
moments nevertheless.
"""

from __future__ import annotations

import asyncio
import contextvars
import random
from collections.abc import Callable
from typing import Any, Final, TypeVar

from penstock.sim.loop import PROCESS

DELAY_S_MAX: Final = 0.02  # of one delivery, in the slowest connection
KERNEL_BYTES: Final = 32 * 1024  # per direction: written, and taken by the kernel
HIGH_BYTES: Final = 64 * 1024  # asyncio's own mark
PIECE_BYTES_MAX: Final = 48 * 1024  # of one delivery
SPLITS_MAX: Final = 3  # in a row, before all there is arrives at once

P = TypeVar("P", bound=asyncio.BaseProtocol)
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Net:
    """All listeners and connections of one world. An address is any text, `unix:…` for those without TCP's resets."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._listeners: dict[str, Listener] = {}
        self._ends: dict[End, None] = {}
        self.connections = 0  # ever
        self.away: set[str] = set()  # addresses nobody gets through to

    def listen(self, address: str, make: Callable[[], asyncio.BaseProtocol]) -> Listener:
        """Accept on `address` in the name of the calling process. Raises OSError when somebody does already."""
        if address in self._listeners:
            raise OSError(98, "Address already in use", address)
        listener = self._listeners[address] = Listener(self, address, make)
        return listener

    async def connect(self, address: str, make: Callable[[], P]) -> tuple[End, P]:
        """As `loop.create_connection`. Raises ConnectionRefusedError. If cancelled, nothing is left open."""
        base_s = self._rng.uniform(0.0001, DELAY_S_MAX / 2)
        await asyncio.sleep(base_s)
        listener = self._listeners.get(address)
        if listener is None or address in self.away:
            raise ConnectionRefusedError(111, "Connection refused", address)
        self.connections += 1
        near = End(self, address, self._fork(), contextvars.copy_context(), base_s)
        far = End(self, address, self._fork(), listener.context, base_s)
        near.peer, far.peer = far, near
        protocol = make()
        near.begin(protocol)
        asyncio.get_running_loop().call_soon(far.begin_by, listener.make, context=listener.context)
        return near, protocol

    async def open_streams(self, address: str) -> Streams:
        """As `asyncio.open_connection`."""
        reader = asyncio.StreamReader()
        end, protocol = await self.connect(address, lambda: asyncio.StreamReaderProtocol(reader))
        return reader, asyncio.StreamWriter(end, protocol, reader, asyncio.get_running_loop())

    def serve_streams(self, address: str, connected: Callable[[Any, Any], None]) -> Listener:
        """As `asyncio.start_server`."""
        return self.listen(address, lambda: asyncio.StreamReaderProtocol(asyncio.StreamReader(), connected))

    def kill(self, process: str) -> None:
        """`process` is no more: its listeners and connections go as the kernel lets them go."""
        for listener in [each for each in self._listeners.values() if each.process == process]:
            listener.close()
        for end in [each for each in self._ends if each.process == process]:
            end.orphan()

    def cut(self, address: str, share: float) -> int:
        """Reset about `share` of the connections to `address`, both ends. Returns how many."""
        chosen = [end for end in self._ends if end.address == address and self._rng.random() < share]
        for end in chosen:
            end.reset_both()
        return len(chosen)

    def drop(self, listener: Listener) -> None:
        self._listeners.pop(listener.address, None)

    def track(self, end: End, *, alive: bool) -> None:
        if alive:
            self._ends[end] = None
        else:
            self._ends.pop(end, None)

    def _fork(self) -> random.Random:
        return random.Random(self._rng.getrandbits(64))


class Listener:
    def __init__(self, net: Net, address: str, make: Callable[[], asyncio.BaseProtocol]) -> None:
        self._net, self.address, self.make = net, address, make
        self.context = contextvars.copy_context()
        self.process = PROCESS.get()

    def close(self) -> None:
        """Accept nothing more. What was accepted goes on."""
        self._net.drop(self)


class End(asyncio.Transport):
    """One end of a connection. Its protocol is called in the context of the process that owns it."""

    peer: End

    def __init__(self, net: Net, address: str, rng: random.Random, context: contextvars.Context, base_s: float) -> None:
        super().__init__()
        self._net, self.address, self._rng, self._context, self._base_s = net, address, rng, context, base_s
        self._unix = address.startswith("unix:")
        self.process: str = context.get(PROCESS, "")
        self._loop = asyncio.get_running_loop()
        self._protocol: asyncio.BaseProtocol | None = None
        self._out = bytearray()  # written and not delivered yet
        self._ended = False  # nothing follows what is in `_out`
        self._closing = False  # by us: nothing is read any more
        self._lost = False  # the descriptor is closed
        self._heard_end = False
        self._doomed = False  # a reset is on its way to us: no orderly end comes any more
        self._reading = True
        self._paused = False
        self._high, self._low = HIGH_BYTES, HIGH_BYTES // 4
        self._timer: asyncio.TimerHandle | None = None
        self._splits = 0

    # ---- birth

    def begin(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = protocol
        self._net.track(self, alive=True)
        protocol.connection_made(self)
        self._expect()

    def begin_by(self, make: Callable[[], asyncio.BaseProtocol]) -> None:
        if not self._lost:
            self.begin(make())

    # ---- what asyncio's transports have

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = protocol

    def get_protocol(self) -> asyncio.BaseProtocol:
        assert self._protocol is not None
        return self._protocol

    def is_closing(self) -> bool:
        return self._closing or self._lost

    def is_reading(self) -> bool:
        return self._reading and not self._closing

    def pause_reading(self) -> None:
        self._reading = False

    def resume_reading(self) -> None:
        self._reading = True
        self._expect()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._high = HIGH_BYTES if high is None else high
        self._low = self._high // 4 if low is None else low
        self._judge_room()

    def get_write_buffer_size(self) -> int:
        return max(0, len(self._out) - KERNEL_BYTES)

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return self._low, self._high

    def can_write_eof(self) -> bool:
        return True

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._ended and not self.is_closing():
            raise RuntimeError("Cannot call write() after write_eof()")
        if self.is_closing() or not data:
            return
        if self.peer.is_closed:
            self._out.clear()
            self.peer.answer_reset()
            return
        self._out += data
        self.peer._expect()
        self._judge_room()

    def write_eof(self) -> None:
        if not self._ended:
            self._ended = True
            self.peer._expect()

    def close(self) -> None:
        if not self.is_closing():
            self._closing = True
            if self.get_write_buffer_size() == 0:
                self._loop.call_soon(self._finish, None, context=self._context)

    def abort(self) -> None:
        """What the kernel has not taken is lost. By TCP the peer sees a reset, else an end."""
        if self._lost:
            return
        self._closing = True
        if self._unix:
            del self._out[KERNEL_BYTES:]
        else:
            self._out.clear()
            self.peer._be_reset(after_s=self._delay_s())
        self._loop.call_soon(self._finish, None, context=self._context)

    # ---- what the net and the peer do

    @property
    def is_closed(self) -> bool:
        """Its descriptor is closed: who writes to it is reset."""
        return self._lost

    def orphan(self) -> None:
        """The owner is dead."""
        del self._out[KERNEL_BYTES:]
        self._protocol = None
        self._finish(None)

    def reset_both(self) -> None:
        """Somebody in between has cut the connection."""
        self._out.clear()
        self.peer._out.clear()
        self._be_reset(after_s=self._delay_s())
        self.peer._be_reset(after_s=self._delay_s())

    def answer_reset(self) -> None:
        """Bytes came for a closed descriptor."""
        self.peer._be_reset(after_s=self._delay_s())

    # ---- private parts

    def _finish(self, error: Exception | None) -> None:
        """The descriptor is closed now; the kernel sends on what it has taken, unless the peer's bytes lie unread."""
        if self._lost:
            return
        self._lost = self._closing = self._ended = True
        self._net.track(self, alive=False)
        if self._timer is not None:
            self._timer.cancel()
        protocol, self._protocol = self._protocol, None
        peer = self.peer
        if peer._out and not peer._lost:
            peer._out.clear()
            if self._rng.random() < 0.5:
                self._out.clear()  # the reset overtakes
            peer._be_reset(after_s=self._delay_s() * 3)
        peer._expect()
        if protocol is not None:
            protocol.connection_lost(error)

    def _end_is_due(self) -> bool:
        return self.peer._ended and not self._heard_end and not self._doomed

    def _be_reset(self, *, after_s: float) -> None:
        self._doomed = True
        self._loop.call_later(after_s, self._take_reset, context=self._context)

    def _take_reset(self) -> None:
        if not self._lost:
            self._out.clear()
            self._finish(ConnectionResetError(104, "Connection reset by peer"))

    def _delay_s(self) -> float:
        return min(DELAY_S_MAX, self._base_s * self._rng.uniform(0.5, 2.0))

    def _expect(self) -> None:
        """Something may have come for us: deliver it after a delay, unless nobody reads."""
        if self._timer is not None or self.is_closing() or not self._reading or self._protocol is None:
            return
        if self.peer._out or self._end_is_due():
            self._timer = self._loop.call_later(self._delay_s(), self._deliver, context=self._context)

    def _deliver(self) -> None:
        self._timer = None
        if self.is_closing() or not self._reading or self._protocol is None:
            return
        source = self.peer._out
        if source:
            piece = bytes(source[: self._piece_bytes(len(source))])
            del source[: len(piece)]
            self.peer._gave()
            self._hand(piece)
        elif self._end_is_due():
            self._heard_end = True
            assert isinstance(self._protocol, asyncio.Protocol | asyncio.BufferedProtocol)
            if not self._protocol.eof_received():
                self.close()
        self._expect()

    def _piece_bytes(self, size: int) -> int:
        dice, share = self._rng.random(), self._rng.random()
        if dice < 0.5 or self._splits >= SPLITS_MAX:
            self._splits = 0
            return min(size, PIECE_BYTES_MAX)
        self._splits += 1
        return 1 if dice < 0.55 else max(1, min(int(size * share), PIECE_BYTES_MAX))

    def _hand(self, data: bytes) -> None:
        protocol = self._protocol
        if isinstance(protocol, asyncio.Protocol):
            protocol.data_received(data)
            return
        assert isinstance(protocol, asyncio.BufferedProtocol)
        while data and self._protocol is protocol:
            room = memoryview(protocol.get_buffer(len(data)))
            taken = min(len(room), len(data))
            room[:taken] = data[:taken]
            protocol.buffer_updated(taken)
            data = data[taken:]

    def _gave(self) -> None:
        """The peer took some of ours."""
        if self._lost:
            return
        if self._closing:
            if self.get_write_buffer_size() == 0:
                self._loop.call_soon(self._finish, None, context=self._context)
        elif self._paused:
            # Not at once: the peer is in the middle of its own callback.
            self._loop.call_soon(self._judge_room, context=self._context)

    def _judge_room(self) -> None:
        protocol, size = self._protocol, self.get_write_buffer_size()
        if protocol is None or self._lost:
            return
        if not self._paused and size > self._high:
            self._paused = True
            protocol.pause_writing()
        elif self._paused and size <= self._low:
            self._paused = False
            protocol.resume_writing()

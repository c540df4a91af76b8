"""One process of the sandbox: its output to those who listen, its input, its end.

Output goes from the pipe straight into the listeners' connections. A listener whose connection is full stops the
reading, hence the process; when the last full one has room or is gone, reading goes on. Without listeners output is
read and dropped. The end is told once, after all output; after a signal of ours it does not wait for grandchildren
that hold a pipe open.
"""

from __future__ import annotations

import asyncio
import binascii
import json
import os
import signal
from collections.abc import Callable
from typing import Any, Final, Protocol

from penstock.core.deadlines import within
from penstock.guest import spawn
from penstock.guest.exchange import Disconnected
from penstock.guest.sessions import kill_session, signal_group
from penstock.wire import connect
from penstock.wire.connect import Code, ConnectError

PIPE_READ_BYTES: Final = 32 * 1024
PTY_READ_BYTES: Final = 16 * 1024
LISTENERS_MAX: Final = 64  # of one process
INPUTS_WAITING_MAX: Final = 64  # calls that wait to write into one process
INPUT_S: Final = 60.0  # a process that does not read its input for so long
DRAIN_READS_MAX: Final = 8  # of each pipe, when the end does not wait for its writers

_KEEPALIVE: Final = connect.frame(b'{"event":{"keepalive":{}}}')
_SIGNAL_WORDS: Final = {
    1: "hangup",
    2: "interrupt",
    3: "quit",
    4: "illegal instruction",
    5: "trace/breakpoint trap",
    6: "aborted",
    7: "bus error",
    8: "floating point exception",
    9: "killed",
    10: "user defined signal 1",
    11: "segmentation fault",
    12: "user defined signal 2",
    13: "broken pipe",
    14: "alarm clock",
    15: "terminated",
}


class Events(Protocol):
    """Where a listener's frames go (`rpc.Events`)."""

    def push(self, frame: bytes) -> bool: ...
    def on_writable(self, callback: Callable[[], None]) -> None: ...


class Listener:
    """One subscriber. `done` is set when the process has ended or the subscriber is gone."""

    def __init__(self, process: Process, events: Events, keepalive_s: float) -> None:
        loop = asyncio.get_running_loop()
        self.done: asyncio.Future[None] = loop.create_future()
        self.full = False
        self._process, self._events, self._keepalive_s = process, events, keepalive_s
        self._loop = loop
        self._spoke_at = loop.time()
        self._timer = loop.call_later(keepalive_s, self._tick)

    def push(self, frame: bytes) -> None:
        try:
            room = self._events.push(frame)
        except Disconnected:
            self.close()
            return
        self._spoke_at = self._loop.time()
        if not room and not self.full:
            self.full = True
            self._events.on_writable(self._has_room)

    def close(self) -> None:
        """Listen no more. Never blocks the process again."""
        self._timer.cancel()
        self.full = False
        self._process.forget(self)
        if not self.done.done():
            self.done.set_result(None)

    def _has_room(self) -> None:
        self.full = False
        self._process.note_room()

    def _tick(self) -> None:
        left = self._spoke_at + self._keepalive_s - self._loop.time()
        if left <= 0:
            if not self.full:
                self.push(_KEEPALIVE)
            left = self._keepalive_s
        if not self.done.done():
            self._timer = self._loop.call_later(left, self._tick)


class Process:
    """A started process. Made by `processes.Processes`, which also reaps it and calls `note_exit`."""

    def __init__(self, child: spawn.Child, *, config: dict[str, Any], tag: str | None, user: str) -> None:
        self.pid = child.pid
        self.config, self.tag, self.user = config, tag, user
        self.is_pty = child.pty_fd >= 0
        self.reaped: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.end_event: dict[str, Any] | None = None  # set once, when everything was delivered
        self._on_end: Callable[[Process], None] = lambda _: None
        self._loop = asyncio.get_running_loop()
        self._listeners: list[Listener] = []
        self._outputs: dict[int, bytes] = {}  # descriptor -> its key in the data event
        self._reading = False
        if self.is_pty:
            self._outputs[child.pty_fd] = b"pty"
        else:
            self._outputs[child.stdout_fd] = b"stdout"
            self._outputs[child.stderr_fd] = b"stderr"
        self._input_fd = child.pty_fd if self.is_pty else child.stdin_fd
        self._input_lock = asyncio.Lock()
        self._inputs_waiting = 0
        self._input_waiter: asyncio.Future[None] | None = None
        self._signalled = False
        self._status: int | None = None
        self._limit: asyncio.TimerHandle | None = None
        self.timed_out = False

    # ---- listening -----------------------------------------------------------------------------------------

    def listen(self, events: Events, keepalive_s: float) -> Listener:
        """Subscribe to what comes from now on. Raises ConnectError when too many listen."""
        if len(self._listeners) >= LISTENERS_MAX:
            raise ConnectError(Code.RESOURCE_EXHAUSTED, f"process {self.pid} has {LISTENERS_MAX} listeners already")
        listener = Listener(self, events, keepalive_s)
        if self.end_event is None:
            self._listeners.append(listener)
        else:
            listener.close()
        return listener

    def begin(self, on_end: Callable[[Process], None]) -> None:
        """Start reading its output. Called once, after the first listener had its chance to subscribe."""
        self._on_end = on_end
        self._set_reading(True)
        self._try_to_end()

    def forget(self, listener: Listener) -> None:
        if listener in self._listeners:
            self._listeners.remove(listener)
            self.note_room()

    def note_room(self) -> None:
        """A listener has room again or left: read on unless another one is full."""
        if self.end_event is None and not any(listener.full for listener in self._listeners):
            self._set_reading(True)

    # ---- input ---------------------------------------------------------------------------------------------

    async def write(self, kind: str, data: bytes) -> None:
        """Write into its stdin or terminal (`kind`), whole and in order of the calls; returns when it was taken.

        Raises ConnectError: another kind of input, closed, or INPUTS_WAITING_MAX calls wait; DeadlinePassed when the
        process does not read (a part may have been written). If cancelled, a part may have been written.
        """
        if (kind == "pty") is not self.is_pty:
            raise ConnectError(Code.INTERNAL, f"process {self.pid} has no {kind} input")
        if self._inputs_waiting >= INPUTS_WAITING_MAX:
            raise ConnectError(
                Code.RESOURCE_EXHAUSTED, f"{INPUTS_WAITING_MAX} inputs of process {self.pid} are waiting"
            )
        self._inputs_waiting += 1
        try:
            async with within(INPUT_S, f"process {self.pid} to read its input"), self._input_lock:
                await self._write_all(data)
        finally:
            self._inputs_waiting -= 1

    async def close_stdin(self) -> None:
        """End its stdin, after what calls before this one write. A second time changes nothing."""
        if self.is_pty:
            raise ConnectError(Code.UNKNOWN, "a terminal's stdin cannot be closed; send Ctrl+D (0x04) instead")
        async with within(INPUT_S, f"process {self.pid} to read its input"), self._input_lock:
            self._close_input()

    def resize(self, columns: int, rows: int) -> None:
        if not self.is_pty or self._input_fd < 0:
            raise ConnectError(Code.INTERNAL, f"process {self.pid} has no terminal")
        spawn.resize(self._input_fd, columns, rows)

    async def _write_all(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            if self._input_fd < 0:
                raise ConnectError(Code.INTERNAL, f"the input of process {self.pid} is closed")
            try:
                left = left[os.write(self._input_fd, left) :]
            except BlockingIOError:
                await self._input_room()
            except OSError as error:
                raise ConnectError(
                    Code.INTERNAL, f"the input of process {self.pid} cannot be written: {os.strerror(error.errno or 0)}"
                ) from None

    async def _input_room(self) -> None:
        fd = self._input_fd
        waiter = self._input_waiter = self._loop.create_future()
        self._loop.add_writer(fd, _wake, waiter)
        try:
            await waiter
        finally:
            self._input_waiter = None
            if self._input_fd == fd:
                self._loop.remove_writer(fd)

    def _close_input(self) -> None:
        if self._input_fd < 0:
            return
        fd, self._input_fd = self._input_fd, -1
        self._loop.remove_writer(fd)
        if self._input_waiter is not None:
            _wake(self._input_waiter)
        if not self.is_pty:  # a terminal's descriptor is its output too, and closed there
            os.close(fd)

    # ---- signals and the end -------------------------------------------------------------------------------

    def signal(self, number: int) -> None:
        """SIGTERM goes to its process group; SIGKILL to its whole session, so that nothing of it stays behind.

        Gone processes are success. From here the end waits for the process alone, not for its descendants.
        """
        self._signalled = True
        # Also when the process itself was reaped: its group lives on with its children, and keeps its number.
        signal_group(self.pid, number)
        if number == signal.SIGKILL:
            kill_session(self.pid)
        self._try_to_end()

    def limit(self, within_s: float) -> None:
        """Kill it (as `signal` does) when it has not ended by then, whether anybody listens or not."""
        self._limit = self._loop.call_later(within_s, self._time_out)

    def _time_out(self) -> None:
        self.timed_out = True
        self.signal(signal.SIGKILL)

    def note_exit(self, status: int) -> None:
        """It was reaped with this wait status."""
        self._status = status
        if not self.reaped.done():
            self.reaped.set_result(None)
        self._try_to_end()

    def abandon(self) -> None:
        """Close everything without telling anybody: it never became the program."""
        self._set_reading(False)
        self._close_input()
        for fd in tuple(self._outputs):
            self._close_output(fd)

    def explain(self) -> dict[str, object]:
        return {
            "pid": self.pid,
            "user": self.user,
            "listeners": len(self._listeners),
            "held_back": not self._reading,
            "outputs_open": len(self._outputs),
            "exited": self._status is not None,
        }

    # ---- output --------------------------------------------------------------------------------------------

    def _set_reading(self, wanted: bool) -> None:
        if wanted is self._reading:
            return
        self._reading = wanted
        for fd in self._outputs:
            if wanted:
                self._loop.add_reader(fd, self._readable, fd)
            else:
                self._loop.remove_reader(fd)

    def _readable(self, fd: int) -> None:
        if self._take_output(fd) is None:
            self._close_output(fd)
            self._try_to_end()

    def _take_output(self, fd: int) -> bool | None:
        """One read, delivered. False: nothing there now. None: nothing will come any more."""
        try:
            data = os.read(fd, PTY_READ_BYTES if self.is_pty else PIPE_READ_BYTES)
        except BlockingIOError:
            return False
        except OSError:  # EIO: the last user of a terminal has closed it
            return None
        if not data:
            return None
        if self._listeners:
            self._deliver(self._outputs[fd], data)
        return True

    def _deliver(self, key: bytes, data: bytes) -> None:
        encoded = binascii.b2a_base64(data, newline=False)
        frame = connect.frame(b'{"event":{"data":{"%b":"%b"}}}' % (key, encoded))
        for listener in tuple(self._listeners):
            listener.push(frame)
        if any(listener.full for listener in self._listeners):
            self._set_reading(False)

    def _close_output(self, fd: int) -> None:
        self._loop.remove_reader(fd)
        del self._outputs[fd]
        if self.is_pty:
            self._close_input()
        os.close(fd)

    def _try_to_end(self) -> None:
        if self._status is None or self.end_event is not None:
            return
        if self._outputs and self._signalled:
            for fd in tuple(self._outputs):
                self._drain(fd)
        if self._outputs:
            return
        self._close_input()
        if self._limit is not None:
            self._limit.cancel()
        self.end_event = end_event(self._status)
        self._on_end(self)
        for listener in tuple(self._listeners):
            listener.close()

    def _drain(self, fd: int) -> None:
        """Deliver what is in the pipe now and let it go, whoever else still holds its other end."""
        for _ in range(DRAIN_READS_MAX):
            if not self._take_output(fd):
                break
        self._close_output(fd)


def end_event(status: int) -> dict[str, Any]:
    """The end event of a wait status, in the words of Go's os.ProcessState; zero and false are left out."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        words = f"signal: {_SIGNAL_WORDS.get(number, number)}" + (" (core dumped)" if os.WCOREDUMP(status) else "")
        return {"exitCode": -1, "status": words, "error": words}
    code = os.waitstatus_to_exitcode(status)
    words = f"exit status {code}"
    return (
        {"exitCode": code, "exited": True, "status": words, "error": words}
        if code
        else {"exited": True, "status": words}
    )


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def event_payload(event: dict[str, Any]) -> bytes:
    return json.dumps({"event": event}).encode()

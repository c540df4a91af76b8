"""An event loop made before a fork and opened after it.

asyncio's loop is usually made in the process that runs it: everybody forked from its maker would share its epoll
instance, and the socket pair by which signals wake it. But only those two need be new; making the rest of a loop costs
a process 130 pages of its own. So this one is made without them.
"""

from __future__ import annotations

import asyncio
import select
import selectors
import signal
from collections.abc import Callable, Mapping
from typing import Any, Final

EVENTS_AT_ONCE_MIN: Final = 8
_READ: Final = selectors.EVENT_READ
_WRITE: Final = selectors.EVENT_WRITE
_NOT_TO_READERS: Final = select.EPOLLOUT  # errors and hang-ups are told to both sides
_NOT_TO_WRITERS: Final = select.EPOLLIN


class ForkedLoop(asyncio.SelectorEventLoop):
    """Holds no descriptor until `open`, which is called once, in the process that runs it."""

    def __init__(self) -> None:
        self._on_signal: dict[int, Callable[[], object]] = {}
        self._polled = EpollSelector()
        self._polled.open()
        super().__init__(self._polled)
        self._close_self_pipe()  # type: ignore[attr-defined]
        self._polled.close()

    def open(self) -> None:
        """Raises OSError."""
        self._polled.open()
        self._make_self_pipe()  # type: ignore[attr-defined]

    def on_signal(self, number: int, callback: Callable[[], object]) -> None:
        """Call `callback` in the loop whenever signal `number` has come; several may be told as one. From the main
        thread. `add_signal_handler` first asks for the set of all signals, at 65 look-ups that mostly raise, and later
        wakes the loop a second time for each signal.
        """
        signal.set_wakeup_fd(self._csock.fileno())  # type: ignore[attr-defined]
        self._on_signal[number] = callback
        signal.signal(number, _noted_by_wakeup)
        signal.siginterrupt(number, False)  # system calls go on by themselves

    def close(self) -> None:
        if not self.is_closed() and not self._polled.is_open:
            self.open()  # asyncio closes only what is whole
        if self._on_signal:
            for number in self._on_signal:
                signal.signal(number, signal.SIG_DFL)
            signal.set_wakeup_fd(-1)
            self._on_signal.clear()
        super().close()

    def _process_self_data(self, data: bytes) -> None:
        """By asyncio, with what came through the self-pipe: signal numbers, and zeroes that only wake."""
        for number in data:
            callback = self._on_signal.get(number)
            if callback is not None:
                self.call_soon(callback)


class EpollSelector(selectors.BaseSelector):
    """As `selectors.EpollSelector`, but its descriptor exists from `open` to `close`."""

    def __init__(self) -> None:
        self._epoll: select.epoll | None = None
        self._keys: dict[int, selectors.SelectorKey] = {}

    @property
    def is_open(self) -> bool:
        return self._epoll is not None

    def open(self) -> None:
        assert self._epoll is None, "opened twice"
        self._epoll = select.epoll()

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        assert self._epoll is not None
        fd = _fd(fileobj)
        if fd in self._keys:
            raise KeyError(f"{fileobj!r} (descriptor {fd}) is registered already")
        self._epoll.register(fd, _mask(events))
        key = self._keys[fd] = selectors.SelectorKey(fileobj, fd, events, data)
        return key

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        assert self._epoll is not None
        key = self._keys.pop(_fd(fileobj))
        try:
            self._epoll.unregister(key.fd)
        except OSError:
            pass  # it was closed before: the kernel has forgotten it
        return key

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        assert self._epoll is not None
        old = self._keys[_fd(fileobj)]
        if events != old.events:
            self._epoll.modify(old.fd, _mask(events))
        key = self._keys[old.fd] = selectors.SelectorKey(old.fileobj, old.fd, events, data)
        return key

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """`timeout` in seconds; None: without end."""
        assert self._epoll is not None
        ready: list[tuple[selectors.SelectorKey, int]] = []
        try:
            # Not rounded to milliseconds: Python rounds up by itself, so that no timer is polled for.
            found = self._epoll.poll(timeout if timeout is None or timeout > 0 else 0, self._room())
        except InterruptedError:
            return ready
        for fd, mask in found:
            key = self._keys.get(fd)
            if key is not None:
                events = (_READ if mask & ~_NOT_TO_READERS else 0) | (_WRITE if mask & ~_NOT_TO_WRITERS else 0)
                ready.append((key, events & key.events))
        return ready

    def close(self) -> None:
        self._keys.clear()
        if self._epoll is not None:
            self._epoll.close()
            self._epoll = None

    def get_key(self, fileobj: Any) -> selectors.SelectorKey:
        """Raises KeyError."""
        return self._keys[_fd(fileobj)]

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._keys

    def _room(self) -> int:
        return max(len(self._keys), EVENTS_AT_ONCE_MIN)


def _noted_by_wakeup(number: int, frame: object) -> None:
    """Python writes a signal's number into the self-pipe only for a signal that has a handler."""


def _fd(fileobj: Any) -> int:
    return fileobj if isinstance(fileobj, int) else int(fileobj.fileno())


def _mask(events: int) -> int:
    return (select.EPOLLIN if events & _READ else 0) | (select.EPOLLOUT if events & _WRITE else 0)

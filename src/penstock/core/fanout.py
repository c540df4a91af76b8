"""One publisher, many readers, and nobody waits for a slow one.

Each reader has a bounded queue. A reader whose queue is full when the next item comes is cut: it still gets what is
queued, then `Lagged`, and must begin again from wherever it keeps its place (a watcher lists and resumes). Waiting for
slow readers would give the slowest one the power to stop all others; dropping items silently would lie.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

from penstock.core.deadlines import Pulse
from penstock.core.errors import Kind, PenstockError

T = TypeVar("T")


class Lagged(PenstockError):
    """Raised to a reader that fell more than its queue behind. List again, then subscribe again."""

    kind = Kind.UNAVAILABLE
    code = "lagged"


@dataclass(frozen=True, slots=True)
class FanoutStatistics:
    published: int
    readers: int
    cut: int
    queued_most: int  # items waiting for the slowest reader


class Fanout(Generic[T]):
    """Broadcast. `publish` never blocks. Not thread-safe: one loop."""

    def __init__(self, name: str = "fanout") -> None:
        self.name = name
        self._readers: dict[Subscription[T], None] = {}  # in order of subscription
        self._closed = False
        self._published = self._cut = 0

    def subscribe(self, queue_max: int) -> Subscription[T]:
        """A reader of everything published from now on."""
        assert queue_max >= 1, queue_max
        reader = Subscription(self, queue_max)
        if self._closed:
            reader._end()
        else:
            self._readers[reader] = None
        return reader

    def publish(self, item: T) -> None:
        """Give `item` to every reader, in order of subscription; cut those that are full."""
        assert not self._closed, f"{self.name} is closed"
        self._published += 1
        for reader in tuple(self._readers):
            if not reader._offer(item):
                self._cut += 1
                self._readers.pop(reader, None)

    def close(self) -> None:
        """End every reader after what it has queued. Idempotent."""
        self._closed = True
        for reader in tuple(self._readers):
            reader._end()
        self._readers.clear()

    def statistics(self) -> FanoutStatistics:
        queued = max((len(reader) for reader in self._readers), default=0)
        return FanoutStatistics(self._published, len(self._readers), self._cut, queued)

    def _leave(self, reader: Subscription[T]) -> None:
        self._readers.pop(reader, None)


class Subscription(Generic[T]):
    """An async iterator. Leave it with `close()`, or use it as a context manager."""

    def __init__(self, fanout: Fanout[T], queue_max: int) -> None:
        self._fanout, self._queue_max = fanout, queue_max
        self._queue: deque[T] = deque()
        self._changed = Pulse()
        self._ended = False
        self._lagged = False

    def __len__(self) -> int:
        return len(self._queue)

    def __enter__(self) -> Subscription[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __aiter__(self) -> Subscription[T]:
        return self

    async def __anext__(self) -> T:
        """The next item. Raises Lagged after the last one queued before the cut. Cancelling it loses nothing."""
        await self._changed.wait_for(lambda: bool(self._queue) or self._ended or self._lagged, until=None)
        if self._queue:
            return self._queue.popleft()
        if self._lagged:
            raise Lagged(
                "reader fell behind", which=self._fanout.name, why=f"more than {self._queue_max} items waited for it"
            )
        raise StopAsyncIteration

    def close(self) -> None:
        """Leave: nothing more is queued, and what was queued is dropped. Idempotent."""
        self._fanout._leave(self)
        self._queue.clear()
        self._end()

    def _offer(self, item: T) -> bool:
        if len(self._queue) >= self._queue_max:
            self._lagged = True
            self._changed.fire()
            return False
        self._queue.append(item)
        self._changed.fire()
        return True

    def _end(self) -> None:
        self._ended = True
        self._changed.fire()

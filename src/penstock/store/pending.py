"""Commits that are decided and not yet logged: what they will have changed, and who waits for them.

A commit is decided against this overlay over the visible index, so commits pipeline: the next one need not wait until
the last one is on disk. Readers see neither until it is.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from typing import Final

from penstock.core.errors import PenstockError
from penstock.model.records import Batch, Record
from penstock.store.errors import StoreBusy
from penstock.store.index import Index

IN_FLIGHT_MAX: Final = 8_192  # commits; beyond it StoreBusy
IN_FLIGHT_BYTES_MAX: Final = 64 * 1024 * 1024

_Waiting = tuple[Batch, int, asyncio.Future[int]]  # the entry, its bytes, its committer


class Pending:
    def __init__(self, index: Index) -> None:
        self._index = index
        self._ahead: dict[str, Record] = {}  # newest write per key that is not logged; a tombstone has version 0
        self._in_flight: deque[_Waiting] = deque()
        self._in_flight_bytes = 0

    def __len__(self) -> int:
        return len(self._in_flight)

    def current(self, key: str) -> Record | None:
        """The record as the next commit must see it."""
        ahead = self._ahead.get(key)
        if ahead is None:
            return self._index.get(key)
        return ahead if ahead.version else None

    def check_room(self, size_bytes: int) -> None:
        """Raises StoreBusy."""
        if len(self._in_flight) >= IN_FLIGHT_MAX or self._in_flight_bytes + size_bytes > IN_FLIGHT_BYTES_MAX:
            waiting = f"{len(self._in_flight)} commits with {self._in_flight_bytes} bytes wait for the log"
            raise StoreBusy("store takes no more commits", why=waiting, retry_after_s=0.1)

    def add(self, entry: Batch, size_bytes: int, committer: asyncio.Future[int]) -> None:
        for change in entry.changes:
            self._ahead[change.record.key] = change.record
        self._in_flight.append((entry, size_bytes, committer))
        self._in_flight_bytes += size_bytes

    def take(self, upto_revision: int) -> Iterator[_Waiting]:
        """Hand out, in order, what has been logged; the caller applies it to the index and answers the committer."""
        while self._in_flight and self._in_flight[0][0].revision <= upto_revision:
            waiting = self._in_flight.popleft()
            self._in_flight_bytes -= waiting[1]
            for change in waiting[0].changes:
                key = change.record.key
                if self._ahead[key] is change.record:
                    del self._ahead[key]
            yield waiting

    def fail(self, why: Callable[[], PenstockError]) -> None:
        """Nothing in flight was kept: forget it all, and tell each committer with an error of its own."""
        failed, self._in_flight, self._in_flight_bytes = self._in_flight, deque(), 0
        self._ahead.clear()
        for _, _, committer in failed:
            if not committer.done():
                committer.set_exception(why())

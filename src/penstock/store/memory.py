"""The log in memory: for simulation and tests. No threads, so a seeded loop replays it exactly.

The object is the medium: opening it again after a crash finds what had been reported as logged, and nothing else.
"""

from __future__ import annotations

import asyncio
from itertools import islice

from penstock.model.records import Batch, Compacted, Record
from penstock.store.errors import StoreClosed
from penstock.store.log import Image, OnFailed, OnLogged


class MemoryLog:
    """`delay_s` (loop seconds) is how long a group takes to be kept; `fail_next` makes the next group fail with it."""

    def __init__(self, *, delay_s: float = 0.0) -> None:
        self.delay_s = delay_s
        self.fail_next: BaseException | None = None
        self._base: dict[str, Record] = {}
        self._base_revision = 0
        self._entries: dict[int, Batch] = {}  # by revision, ascending, without gaps
        self._last = 0
        self._waiting: list[Batch] = []
        self._timer: asyncio.Handle | None = None
        self._logged: OnLogged | None = None
        self._failed: OnFailed | None = None
        self._broken = False

    async def open(self, *, logged: OnLogged, failed: OnFailed) -> None:
        """A log that was left open by a crash loses what it had not reported as logged."""
        self._drop_waiting()
        self._logged, self._failed, self._broken = logged, failed, False

    async def image(self) -> Image:
        return Image(self._base_revision, self._base_revision, tuple(self._base.values()))

    async def read(self, after_revision: int, count_max: int) -> list[Batch]:
        if after_revision < self._base_revision:
            raise Compacted(after_revision, compacted=self._base_revision, revision=self._last)
        upto = min(self._last, after_revision + count_max)
        return [self._entries[revision] for revision in range(after_revision + 1, upto + 1)]

    def append(self, entry: Batch, *, durable: bool) -> None:
        if self._logged is None:
            raise StoreClosed("log is not open")
        if self._broken:
            return
        self._waiting.append(entry)
        if self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self.delay_s, self._keep) if self.delay_s else loop.call_soon(self._keep)

    def reset(self) -> None:
        self._broken = False

    def compact(self, revision: int) -> asyncio.Future[None]:
        for entry in list(islice(self._entries.values(), max(0, revision - self._base_revision))):
            for change in entry.changes:
                if change.kind == "put":
                    self._base[change.record.key] = change.record
                else:
                    self._base.pop(change.record.key, None)
            del self._entries[entry.revision]
        self._base_revision = max(revision, self._base_revision)
        done = asyncio.get_running_loop().create_future()
        done.set_result(None)
        return done

    async def close(self) -> None:
        if self._waiting:
            self._keep()
        self._logged = self._failed = None

    def _keep(self) -> None:
        group, self._waiting, self._timer = self._waiting, [], None
        logged, failed = self._logged, self._failed
        if not group or logged is None or failed is None:
            return
        if self.fail_next is not None:
            error, self.fail_next, self._broken = self.fail_next, None, True
            failed(error)
            return
        for entry in group:
            assert entry.revision == self._last + 1, f"revision {entry.revision} after {self._last}"
            self._entries[entry.revision] = entry
            self._last = entry.revision
        logged(self._last)

    def _drop_waiting(self) -> None:
        self._waiting.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

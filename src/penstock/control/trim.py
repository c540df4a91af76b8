"""The event log is bounded: the oldest lines go, by number and by age, a few at a time and never on anybody's path.

It keeps the keys in the order of their coming, so that it never lists the log to find what to cut. Readers of long ago
find what is cut in the store's history for a while, and after that nowhere.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final

from penstock.core.clock import Clock
from penstock.core.crew import Crew
from penstock.core.errors import PenstockError
from penstock.feed.source import Source
from penstock.model import keys
from penstock.model.event import at_of
from penstock.model.records import Compacted, ReaderCut
from penstock.store.ops import Delete
from penstock.store.store import Store

EVENTS_MAX: Final = 50_000
KEEP_S: Final = 7 * 24 * 3600.0
LOOK_S: Final = 10.0  # between two looks; what comes meanwhile may go beyond the bound
CUT_AT_ONCE: Final = 100  # per commit
PAUSE_S: Final = 0.05  # between two commits of one look: others come first


class Trimmer:
    """`start` it in a crew. `cut_total` counts what was removed."""

    def __init__(
        self, *, store: Store, source: Source, clock: Clock, events_max: int = EVENTS_MAX, keep_s: float = KEEP_S
    ) -> None:
        self._store, self._source, self._clock = store, source, clock
        self._events_max, self._keep_s = events_max, keep_s
        self._keys: deque[str] = deque()  # oldest first; one that is removed already may be among them
        self.cut_total = 0

    def start(self, crew: Crew) -> None:
        crew.spawn(self._follow(), name="control follows events")
        crew.spawn(self._now_and_then(), name="control trims events")

    async def _follow(self) -> None:
        while True:
            listing = await self._source.list(keys.EVENT)
            self._keys = deque(record.key for record in listing.records)
            try:
                await self._watch(listing.revision)
            except Compacted:
                continue  # what came between was lost: list again

    async def _watch(self, revision: int) -> None:
        while True:
            watch = self._source.watch(keys.EVENT, revision)
            try:
                async for batch in watch:
                    revision = batch.revision
                    self._keys.extend(change.record.key for change in batch.changes if change.kind == "put")
            except ReaderCut:
                continue  # nothing is lost: the next watch begins at our revision
            finally:
                await watch.aclose()

    async def _now_and_then(self) -> None:
        while True:
            more = await self._cut()
            await asyncio.sleep(PAUSE_S if more else LOOK_S)

    async def _cut(self) -> bool:
        """Remove the next few that are too many or too old. False when there are none."""
        too_old = self._clock.wall() - self._keep_s
        cut: list[str] = []
        while len(cut) < CUT_AT_ONCE and self._keys:
            if len(self._keys) <= self._events_max and at_of(self._keys[0]) >= too_old:
                break
            cut.append(self._keys.popleft())
        if not cut:
            return False
        try:
            await self._store.commit([Delete(key) for key in cut], by="control")
        except PenstockError:
            self._keys.extendleft(reversed(cut))
            return False  # Safe: they are the oldest at the next look, too; a log somewhat too long hurts nobody.
        self.cut_total += len(cut)
        return True

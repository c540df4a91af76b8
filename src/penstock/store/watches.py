"""Watches: who is told of a revision, from where a late reader resumes, and when a slow one is cut.

The hub keeps the last revisions in memory (the tail). A watch that starts within the tail is registered at once; an
older one first reads the log, a few revisions at a time, until it has reached the tail. Each watch has a bounded queue
of its own: the store never waits for a reader, it cuts the one that does not keep up, and that one resumes.
"""

from __future__ import annotations

import asyncio
from collections import deque
from itertools import islice
from typing import Final

from penstock.core.errors import PenstockError
from penstock.model.records import Batch, Compacted, ReaderCut
from penstock.store.errors import StoreBusy, StoreClosed
from penstock.store.index import folders
from penstock.store.log import Log

QUEUE_MAX: Final = 1_024  # revisions waiting for one reader; beyond it the reader is cut
QUEUE_BYTES_MAX: Final = 16 * 1024 * 1024
TAIL_MAX: Final = 8_192  # revisions kept for resuming without reading the log
TAIL_BYTES_MAX: Final = 32 * 1024 * 1024
CATCH_UP_COUNT: Final = 512  # revisions read from the log at a time
WATCHES_MAX: Final = 10_000  # beyond it StoreBusy


class Watch:
    """An async iterator of batches under one prefix. One reader. Close it, or the store keeps queueing for it.

    Iterating raises Compacted, ReaderCut (after what was queued before), StoreClosed; then it is over.
    """

    connected: Final = True

    def __init__(self, hub: Hub, prefix: str, after_revision: int) -> None:
        self.prefix = prefix
        self.revision = after_revision  # everything up to here was handed out
        self.registered = False  # False while it catches up from the log
        self.wanted = 0  # revision of which the reader asked to be told; 0 none
        self._hub = hub
        self._queue: deque[tuple[Batch, int]] = deque()
        self._queued_bytes = 0
        self._backlog: deque[Batch] = deque()  # from the tail or the log; goes before the queue
        self._waiter: asyncio.Future[None] | None = None
        self._end: PenstockError | None = None

    def __aiter__(self) -> Watch:
        return self

    async def __anext__(self) -> Batch:
        """The next revision. Cancellation loses nothing."""
        while True:
            if self._backlog:
                batch = self._backlog.popleft()
            elif self._queue:
                batch, size_bytes = self._queue.popleft()
                self._queued_bytes -= size_bytes
            elif self._end is not None:
                raise self._end
            elif not self.registered:
                await self._hub.catch_up(self)
                continue
            else:
                await self._wait()
                continue
            self.revision = batch.revision
            return batch

    def want(self, revision: int) -> None:
        """Ask for a batch, empty if need be, once `revision` is reached. The smallest of several counts, once."""
        if self._end is None:
            self.wanted = min(self.wanted or revision, revision)
            self._hub.want(self)

    async def aclose(self) -> None:
        """Stop. A reader that waits in another task gets StoreClosed. Idempotent."""
        self._hub.remove(self)
        self._queue.clear()
        self._backlog.clear()
        self.end(StoreClosed("watch was closed", which=self.prefix))

    def begin(self, missed: list[Batch]) -> None:
        """What comes before the queue. Called by the hub."""
        self._backlog.extend(missed)

    def push(self, batch: Batch, size_bytes: int) -> None:
        """Queue one revision, or cut the reader. Called by the hub."""
        if len(self._queue) >= QUEUE_MAX or self._queued_bytes + size_bytes > QUEUE_BYTES_MAX:
            self._hub.remove(self)
            why = f"{len(self._queue)} revisions are waiting for it"
            self.end(
                ReaderCut("reader does not keep up", which=self.prefix, why=why, now="watch on from your revision")
            )
            return
        self._queue.append((batch, size_bytes))
        self._queued_bytes += size_bytes
        self._wake()

    def end(self, error: PenstockError) -> None:
        if self._end is None:
            self._end = error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _wait(self) -> None:
        assert self._waiter is None, "a watch has one reader"
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None


class Hub:
    """Everything that is told of new revisions."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self.revision = 0
        self.compacted = 0
        self._tail: deque[tuple[Batch, int]] = deque()
        self._tail_bytes = 0
        self._by_folder: dict[str, dict[Watch, None]] = {}  # prefixes "" or ending with a slash
        self._by_stem: dict[str, dict[Watch, None]] = {}  # any other prefix
        self._wanting: dict[Watch, None] = {}
        self._open: dict[Watch, None] = {}

    def __len__(self) -> int:
        return len(self._open)

    def start(self, *, revision: int, compacted: int) -> None:
        self.revision, self.compacted = revision, compacted

    def watch(self, prefix: str, after_revision: int) -> Watch:
        """Raises StoreBusy beyond WATCHES_MAX. A revision that is not kept shows when the watch is iterated."""
        if len(self._open) >= WATCHES_MAX:
            raise StoreBusy("too many watches", why=f"{WATCHES_MAX} are open", retry_after_s=1)
        watch = Watch(self, prefix, after_revision)
        if not self.compacted <= after_revision <= self.revision:
            watch.end(Compacted(after_revision, compacted=self.compacted, revision=self.revision))
            return watch
        self._open[watch] = None
        # Registered here when the tail reaches back far enough, so that a reader that is slow from the start is cut.
        if self._in_tail(after_revision):
            self._register(watch)
        return watch

    async def catch_up(self, watch: Watch) -> None:
        """Bring it one step closer to the tail, and register it there. Raises Compacted, StoreClosed."""
        if self._in_tail(watch.revision):
            self._register(watch)
            return
        entries = await self._log.read(watch.revision, CATCH_UP_COUNT)
        # Entries beyond `self.revision` are kept but not yet visible: they come through the queue.
        entries = [entry for entry in entries if entry.revision <= self.revision]
        found = [batch for batch in (narrow(entry, watch.prefix) for entry in entries) if batch is not None]
        if entries and (not found or found[-1].revision < entries[-1].revision):
            found.append(Batch(entries[-1].revision, ()))  # moves the watch's revision past what did not match
        watch.begin(found)

    def publish(self, entry: Batch, size_bytes: int) -> None:
        """One new revision, already visible to reads. `settle` follows after the last of a group."""
        self.revision = entry.revision
        self._tail.append((entry, size_bytes))
        self._tail_bytes += size_bytes
        while len(self._tail) > TAIL_MAX or (self._tail_bytes > TAIL_BYTES_MAX and len(self._tail) > 1):
            self._tail_bytes -= self._tail.popleft()[1]
        if not self._open:
            return
        for prefix, watches in self._concerned(entry).items():
            batch = narrow(entry, prefix)
            assert batch is not None, "only matching prefixes are concerned"
            for watch in watches:
                watch.push(batch, size_bytes)

    def settle(self) -> None:
        """Hand out the empty batches that were wanted and are due."""
        for watch in [watch for watch in self._wanting if watch.wanted <= self.revision]:
            del self._wanting[watch]
            watch.wanted = 0
            watch.push(Batch(self.revision, ()), 0)

    def want(self, watch: Watch) -> None:
        # One that still catches up must not be told through its queue: it would skip what it has not read.
        if watch.registered:
            self._wanting[watch] = None
            self.settle()

    def remove(self, watch: Watch) -> None:
        self._open.pop(watch, None)
        self._wanting.pop(watch, None)
        table = self._table(watch.prefix)
        watches = table.get(watch.prefix)
        if watches is not None:
            watches.pop(watch, None)
            if not watches:
                del table[watch.prefix]

    def end_all(self, error: PenstockError) -> None:
        for watch in list(self._open):
            self.remove(watch)
            watch.end(error)

    def _in_tail(self, after_revision: int) -> bool:
        first = self._tail[0][0].revision if self._tail else self.revision + 1
        return first - 1 <= after_revision <= self.revision

    def _register(self, watch: Watch) -> None:
        """From now on the watch is told; what it missed goes before that."""
        self._table(watch.prefix).setdefault(watch.prefix, {})[watch] = None
        watch.registered = True
        missing = self.revision - watch.revision
        late = islice(self._tail, len(self._tail) - missing, None)
        watch.begin([batch for entry, _ in late if (batch := narrow(entry, watch.prefix)) is not None])
        if watch.wanted:
            self.want(watch)

    def _table(self, prefix: str) -> dict[str, dict[Watch, None]]:
        return self._by_folder if not prefix or prefix.endswith("/") else self._by_stem

    def _concerned(self, entry: Batch) -> dict[str, list[Watch]]:
        """Prefix → its watches, for each watched prefix that a change of this revision is under."""
        found: dict[str, list[Watch]] = {}
        for change in entry.changes:
            key = change.record.key
            for folder in ("", *folders(key)):
                if folder not in found and folder in self._by_folder:
                    found[folder] = list(self._by_folder[folder])
            for stem, watches in self._by_stem.items():
                if stem not in found and key.startswith(stem):
                    found[stem] = list(watches)
        return found


def narrow(entry: Batch, prefix: str) -> Batch | None:
    """The part of a revision that is under `prefix`; None when nothing is."""
    changes = tuple([change for change in entry.changes if change.record.key.startswith(prefix)])
    if len(changes) == len(entry.changes):
        return entry
    return Batch(entry.revision, changes) if changes else None

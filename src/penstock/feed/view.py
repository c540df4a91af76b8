"""A view: the records under one prefix, decoded, in memory, always at one whole revision.

It lists, then watches on; relists when its revision was compacted away; keeps the last state while the other side is
away. Readers look things up at the cost of a dictionary; those who wait are woken in the order in which they came.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any, Final, Generic, TypeVar

from penstock.core.crew import Crew
from penstock.core.deadlines import within
from penstock.feed.source import Source, Watching
from penstock.model.errors import Unavailable
from penstock.model.records import Batch, Change, Compacted, Listing, ReaderCut, Record

FIRST_LISTING_S: Final = 30.0
WAITERS_MAX: Final = 10_000  # per view; beyond it Unavailable

T = TypeVar("T")
OnChange = Callable[[str, T | None], object]


class _Waiter(Generic[T]):
    """Somebody who waits until `predicate` holds for the value of one id."""

    __slots__ = ("future", "predicate")

    def __init__(self, predicate: Callable[[T | None], bool], future: asyncio.Future[T | None]) -> None:
        self.predicate, self.future = predicate, future

    def look(self, value: T | None) -> None:
        if self.future.done():
            return
        try:
            if self.predicate(value):
                self.future.set_result(value)
        except Exception as error:
            self.future.set_exception(error)  # the waiter's own mistake must not end the view


class View(Generic[T]):
    """`decode` makes a value of a record's bytes. An id is the key without the prefix."""

    def __init__(self, source: Source, prefix: str, decode: Callable[[bytes], T]) -> None:
        self._source, self._prefix, self._decode = source, prefix, decode
        self._values: dict[str, T] = {}
        self._records: dict[str, Record] = {}
        self._by_label: dict[tuple[str, str], dict[str, None]] = {}
        self._callbacks: dict[int, OnChange[T]] = {}
        self._callbacks_ever = 0
        self._revision = 0
        self._watch: Watching | None = None
        self._asked = 0  # the revision asked of the watch
        self._listed: asyncio.Future[None] | None = None
        self._revision_waiters: dict[asyncio.Future[None], int] = {}
        self._value_waiters: dict[str, dict[_Waiter[T], None]] = {}
        self._waiters = 0
        self._ended = False

    # --- life -------------------------------------------------------------------------------------------------------

    async def start(self, crew: Crew, *, within_s: float | None = FIRST_LISTING_S) -> None:
        """Follow the source as a task of `crew`. Returns after the first listing. Raises DeadlinePassed."""
        assert self._listed is None, f"view of {self._prefix} was started twice"
        self._listed = asyncio.get_running_loop().create_future()
        crew.spawn(self._follow(), name=f"view {self._prefix}")
        async with within(within_s, f"first listing of {self._prefix}"):
            await asyncio.shield(self._listed)

    @property
    def connected(self) -> bool:
        """False while what the view shows may be old because the other side is away."""
        return self._watch is not None and self._watch.connected

    @property
    def revision(self) -> int:
        """Everything under the prefix up to here has been seen; 0 before the first listing."""
        return self._revision

    # --- looking ----------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, id_: str) -> bool:
        return id_ in self._values

    def get(self, id_: str) -> T | None:
        return self._values.get(id_)

    def ids(self) -> list[str]:
        return list(self._values)

    def values(self) -> list[T]:
        return list(self._values.values())

    def items(self) -> list[tuple[str, T]]:
        """(id, value) pairs."""
        return list(self._values.items())

    def __iter__(self) -> Iterator[str]:
        return iter(self.ids())

    def by(self, label: str, text: str) -> list[T]:
        """The values whose record carries this label."""
        return [self._values[id_] for id_ in self._by_label.get((label, text), ())]

    def record(self, id_: str) -> Record | None:
        return self._records.get(id_)

    def revision_of(self, id_: str) -> int:
        """The revision that last wrote it, for the `expect` of the next write; 0 when absent, as a create expects."""
        record = self._records.get(id_)
        return record.mod_revision if record is not None else 0

    # --- being told -------------------------------------------------------------------------------------------------

    def subscribe(self, callback: OnChange[T]) -> Callable[[], None]:
        """Call `callback(id, value or None)` for every change from now on, in order, the whole revision being visible.

        Before `start`, that includes the first listing. Returns the function that ends it. A callback must not raise:
        an error ends the view, and with it the crew.
        """
        self._callbacks_ever += 1
        number = self._callbacks_ever
        self._callbacks[number] = callback
        return lambda: _forget(self._callbacks, number)

    async def wait_revision(self, revision: int, within_s: float | None) -> None:
        """Return once everything up to `revision` has been seen. Raises DeadlinePassed, Unavailable."""
        if revision <= self._revision:
            return
        self._admit()
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._revision_waiters[future] = revision
        self._waiters += 1
        self._ask()
        try:
            async with within(within_s, f"revision {revision} of {self._prefix}"):
                await future
        finally:
            self._waiters -= 1
            self._revision_waiters.pop(future, None)

    async def wait_for(
        self, id_: str, predicate: Callable[[T | None], bool], within_s: float | None, *, what: str = ""
    ) -> T | None:
        """The first value of `id_` (None: absent) for which `predicate` holds; each revision is looked at, none is
        skipped. Raises DeadlinePassed, Unavailable, and what `predicate` raises."""
        value = self._values.get(id_)
        if predicate(value):
            return value
        self._admit()
        waiter = _Waiter(predicate, asyncio.get_running_loop().create_future())
        self._value_waiters.setdefault(id_, {})[waiter] = None
        self._waiters += 1
        try:
            async with within(within_s, what or f"a change of {self._prefix}{id_}"):
                return await waiter.future
        finally:
            self._waiters -= 1
            waiters = self._value_waiters.get(id_, {})
            waiters.pop(waiter, None)
            if not waiters:
                self._value_waiters.pop(id_, None)

    # --- following --------------------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        try:
            while True:
                self._replace(await self._source.list(self._prefix))
                try:
                    await self._watch_on()
                except Compacted:
                    continue
        except BaseException as error:
            if self._listed is not None and not self._listed.done():
                if isinstance(error, Exception):
                    self._listed.set_exception(error)
                    self._listed.exception()  # seen: `start` may have given up, and the crew reports it too
                else:
                    self._listed.cancel()
            raise
        finally:
            self._end()

    async def _watch_on(self) -> None:
        """Apply what comes until the revision is lost. Raises Compacted."""
        while True:
            self._watch = watch = self._source.watch(self._prefix, self._revision)
            self._asked = 0
            self._ask()
            try:
                async for batch in watch:
                    self._apply(batch)
            except ReaderCut:
                continue  # nothing is lost: the next watch begins at our revision
            finally:
                self._watch = None
                await watch.aclose()

    def _replace(self, listing: Listing) -> None:
        """Take a whole listing; tell of what differs from before."""
        seen = {record.key: record for record in listing.records}
        changes = [Change("delete", record) for record in list(self._records.values()) if record.key not in seen]
        for record in listing.records:
            known = self._records.get(record.key.removeprefix(self._prefix))
            if known is None or known.mod_revision != record.mod_revision:
                changes.append(Change("put", record))
        self._apply(Batch(listing.revision, tuple(changes)))
        if self._listed is not None and not self._listed.done():
            self._listed.set_result(None)

    def _apply(self, batch: Batch) -> None:
        cut = len(self._prefix)
        changed = [self._take(change.record.key[cut:], change) for change in batch.changes]
        self._revision = batch.revision
        for id_, value in changed:
            for callback in list(self._callbacks.values()):
                callback(id_, value)
            for waiter in self._value_waiters.get(id_, ()):
                waiter.look(value)
        if self._revision_waiters:
            self._answer_revision_waiters()

    def _take(self, id_: str, change: Change) -> tuple[str, T | None]:
        record, before = change.record, self._records.get(id_)
        if before is not None and (change.kind == "delete" or before.create_revision != record.create_revision):
            self._forget_labels(id_, before)
        if change.kind == "delete":
            self._records.pop(id_, None)
            self._values.pop(id_, None)
            return id_, None
        try:
            value = self._decode(record.value)
        except Exception as error:
            error.add_note(f"while decoding {record.key} at revision {record.mod_revision}")
            raise
        if before is None or before.create_revision != record.create_revision:
            for label in record.labels.items():
                self._by_label.setdefault(label, {})[id_] = None
        self._records[id_], self._values[id_] = record, value
        return id_, value

    def _forget_labels(self, id_: str, record: Record) -> None:
        for label in record.labels.items():
            ids = self._by_label[label]
            del ids[id_]
            if not ids:
                del self._by_label[label]

    def _answer_revision_waiters(self) -> None:
        for future, revision in list(self._revision_waiters.items()):
            if revision <= self._revision:
                del self._revision_waiters[future]
                if not future.done():
                    future.set_result(None)
        self._ask()

    def _ask(self) -> None:
        """Without this a view would not learn of revisions that changed nothing under its prefix."""
        if self._watch is None or not self._revision_waiters:
            return
        smallest = min(self._revision_waiters.values())
        if self._asked <= self._revision or smallest < self._asked:
            self._asked = smallest
            self._watch.want(smallest)

    def _admit(self) -> None:
        if self._ended:
            raise Unavailable("view has ended", which=self._prefix)
        if self._waiters >= WAITERS_MAX:
            raise Unavailable("too many wait on this view", which=self._prefix, retry_after_s=1)

    def _end(self) -> None:
        """Nobody will be told any more: say so to everybody who waits."""
        self._ended = True
        waiting: list[asyncio.Future[Any]] = [*self._revision_waiters]
        waiting += [waiter.future for waiters in self._value_waiters.values() for waiter in waiters]
        for future in waiting:
            if not future.done():
                future.set_exception(Unavailable("view has ended", which=self._prefix))


def _forget(callbacks: dict[int, OnChange[T]], number: int) -> None:
    callbacks.pop(number, None)

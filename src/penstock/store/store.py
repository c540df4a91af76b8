"""The store: one log, one revision, and everything that is true in memory.

    commit ── checks, decides against what is pending ──> log (group commit) ──> index, watches, committer

A commit is decided the moment it is called and takes effect once it is logged: readers, watches and its own caller see
it then, in that order of revisions and all of a revision at once. Everything here runs on one event loop and never
waits for a disk; whether a thread is involved is the log's affair.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final

import msgspec

from penstock.core.clock import Clock
from penstock.core.errors import PenstockError
from penstock.model.errors import Invalid
from penstock.model.records import Batch, Change, Compacted, Listing, Record
from penstock.model.writers import WRITERS
from penstock.store.errors import (
    AlreadyExists,
    LeaseNotFound,
    RevisionConflict,
    StoreClosed,
    StoreFailed,
    StoreFull,
)
from penstock.store.index import Index
from penstock.store.leases import Leases
from penstock.store.log import Log
from penstock.store.ops import LEASE_PREFIX, Delete, Op, Put, Writers, check_ops
from penstock.store.pending import Pending
from penstock.store.watches import Hub, Watch, narrow

__all__ = ["Batch", "Change", "Delete", "Listing", "Op", "Put", "Record", "Statistics", "Store", "Watch"]

KEEP_REVISIONS: Final = 100_000  # of history; compaction starts a quarter above it
READ_COUNT: Final = 1_024  # revisions read from the log at a time
AT_ATTEMPTS_MAX: Final = 8  # a compaction may overtake a reader of history; it then starts again


class Statistics(msgspec.Struct, frozen=True, kw_only=True):
    revision: int
    compacted: int
    records: int
    in_flight: int
    leases: int
    watches: int


class Store:
    """`writers` says which rooms may write where; `keep_revisions` how much history is kept at least."""

    def __init__(
        self,
        log: Log,
        clock: Clock,
        *,
        writers: Mapping[str, frozenset[str]] = WRITERS,
        keep_revisions: int = KEEP_REVISIONS,
    ) -> None:
        self._log = log
        self._writers = Writers(writers)
        self._keep_revisions = keep_revisions
        self._index = Index()
        self._pending = Pending(self._index)
        self._hub = Hub(log)
        self._leases = Leases(clock, self._expire)
        self._decided = 0  # the last revision given out; `revision` is the last one logged
        self._compacting: asyncio.Future[None] | None = None
        self._refusal: Callable[[], PenstockError] | None = lambda: StoreClosed("store is not open")
        self._open = False

    # --- life -------------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Read the log. Raises StoreDamaged, StoreTooNew, StoreHeld; the medium is untouched then."""
        await self._log.open(logged=self._logged, failed=self._failed)
        try:
            image = await self._log.image()
            for record in image.records:
                self._index.apply(Change("put", record))
            revision = image.revision
            while entries := await self._log.read(revision, READ_COUNT):
                for entry in entries:
                    for change in entry.changes:
                        self._index.apply(change)
                revision = entries[-1].revision
        except BaseException:
            await self._log.close()
            raise
        self._decided = revision
        self._hub.start(revision=revision, compacted=image.compacted)
        self._leases.reset(self._index.records())
        self._refusal, self._open = None, True

    async def close(self) -> None:
        """Log what was committed, end the watches, give the medium back. Idempotent."""
        if not self._open:
            return
        self._open = False
        self._refusal = lambda: StoreClosed("store was closed")
        self._leases.close()
        await self._log.close()
        self._pending.fail(lambda: StoreClosed("store was closed"))
        self._hub.end_all(StoreClosed("store was closed"))

    # --- writing ----------------------------------------------------------------------------------------------------

    async def commit(self, ops: Sequence[Op], *, by: str, durable: bool = False) -> int:
        """All of `ops` or none, as one revision, which is returned once it is logged.

        `durable`: also safe against a loss of power then (one fsync, shared with others). Without any effect (only
        deletions of absent records) it makes no revision and returns the last one. Raises RevisionConflict,
        AlreadyExists, WrongWriter, Invalid, LeaseNotFound, StoreBusy, StoreFull, StoreClosed with nothing written, and
        StoreFailed. Cancelled, it may still be written: look again.
        """
        size_bytes = check_ops(ops)
        for op in ops:
            self._writers.check(op.key, by)
        return await self._decide(ops, size_bytes, durable)

    async def create(
        self, key: str, value: bytes, *, by: str, labels: Mapping[str, str] | None = None, lease: int | None = None
    ) -> int:
        """Raises AlreadyExists, and what `commit` raises."""
        return await self.commit([Put(key, value, labels=labels, expect=0, lease=lease)], by=by)

    async def update(self, key: str, value: bytes, *, expect_revision: int, by: str) -> int:
        """Raises RevisionConflict, and what `commit` raises."""
        return await self.commit([Put(key, value, expect=expect_revision)], by=by)

    async def put(self, key: str, value: bytes, *, by: str, labels: Mapping[str, str] | None = None) -> int:
        """Create or overwrite, whatever is there. Raises what `commit` raises."""
        return await self.commit([Put(key, value, labels=labels)], by=by)

    async def put_all(self, records: Iterable[tuple[str, bytes, Mapping[str, str]]], *, by: str) -> int:
        """Create or overwrite each (key, value, labels), as one revision. Raises what `commit` raises."""
        return await self.commit([Put(key, value, labels=labels) for key, value, labels in records], by=by)

    async def delete(self, key: str, *, by: str, expect_revision: int | None = None) -> int:
        """Absent is success unless `expect_revision` is given. Raises what `commit` raises."""
        return await self.commit([Delete(key, expect_revision)], by=by)

    # --- leases -----------------------------------------------------------------------------------------------------

    async def grant(self, ttl_s: float) -> int:
        """A lease to put records under; its id is the revision that granted it, so none is used twice."""
        value = self._leases.check_grant(ttl_s)
        key = f"{LEASE_PREFIX}{self._decided + 1}"
        return await self._decide([Put(key, value, expect=0)], len(value), False)

    async def renew(self, lease: int) -> None:
        """Raises LeaseNotFound: the lease is over, and its records are gone or going."""
        self._leases.renew(lease)

    async def revoke(self, lease: int) -> int:
        """Delete the lease and its records as one revision. Raises LeaseNotFound."""
        return await self._end_lease(lease)

    # --- reading ----------------------------------------------------------------------------------------------------

    @property
    def revision(self) -> int:
        """The last revision that readers see."""
        return self._hub.revision

    def get(self, key: str) -> Record | None:
        return self._index.get(key)

    def list(self, prefix: str, labels: Mapping[str, str] | None = None) -> Listing:
        """The records under `prefix` that carry all of `labels`, by key. Costs what it returns."""
        return Listing(self._hub.revision, self._index.list(prefix, labels))

    def newest(self, folder: str) -> Iterator[Record]:
        """The records under `folder` (ends with a slash), the last created first. Costs what is taken of it.

        Lazy: take what you need before anything is awaited.
        """
        return self._index.newest(folder)

    def watch(self, prefix: str, after_revision: int) -> Watch:
        """Everything under `prefix` after that revision, one whole revision at a time. Close it when done.

        Iterating raises Compacted when that revision is not kept, ReaderCut when the reader does not keep up.
        """
        if self._refusal is not None:
            raise self._refusal()
        return self._hub.watch(prefix, after_revision)

    async def at(self, revision: int, prefix: str = "") -> Listing:
        """The records under `prefix` as they were at `revision`. Costs what the log holds. Raises Compacted."""
        for _ in range(AT_ATTEMPTS_MAX):
            self._check_kept(revision)
            image = await self._log.image()
            if image.revision > revision:
                break
            records = {record.key: record for record in image.records if record.key.startswith(prefix)}
            try:
                await self._replay(records, prefix, image.revision, revision)
            except Compacted:
                continue
            return Listing(revision, tuple(records[key] for key in sorted(records)))
        raise Compacted(revision, compacted=self._hub.compacted, revision=self.revision)

    async def history(self, prefix: str, after_revision: int, *, count_max: int = READ_COUNT) -> Sequence[Batch]:
        """What changed under `prefix` in the next `count_max` revisions of the whole store. Raises Compacted."""
        self._check_kept(after_revision)
        entries = await self._log.read(after_revision, count_max)
        found = (narrow(entry, prefix) for entry in entries if entry.revision <= self.revision)
        return [batch for batch in found if batch is not None]

    async def compact(self, revision: int) -> None:
        """Give up the history before `revision`: `at` and `watch` work from there on. Cancelled, it still happens."""
        if revision > self.revision:
            raise Invalid("revision", f"{revision} is beyond the last one, {self.revision}")
        if revision > self._hub.compacted:
            await asyncio.shield(self._compact(revision))

    def statistics(self) -> Statistics:
        return Statistics(
            revision=self.revision,
            compacted=self._hub.compacted,
            records=len(self._index),
            in_flight=len(self._pending),
            leases=len(self._leases),
            watches=len(self._hub),
        )

    # --- deciding ---------------------------------------------------------------------------------------------------

    def _decide(self, ops: Sequence[Op], size_bytes: int, durable: bool) -> asyncio.Future[int]:
        """Check `ops` against everything decided before, hand them to the log. No await: decisions are in order."""
        if self._refusal is not None:
            raise self._refusal()
        self._pending.check_room(size_bytes)
        revision = self._decided + 1
        decided: list[tuple[Change, Record | None]] = []
        for op in ops:
            before = self._pending.current(op.key)
            change = self._put(op, before, revision) if isinstance(op, Put) else _deleted(op, before, revision)
            if change is not None:
                decided.append((change, before))
        committer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        if not decided:
            self._answer_unchanged(committer)
            return committer
        entry = Batch(revision, tuple([change for change, _ in decided]))
        self._log.append(entry, durable=durable)
        self._decided = revision
        for change, before in decided:
            if change.record.lease or change.record.key.startswith(LEASE_PREFIX) or (before and before.lease):
                self._leases.follow(change, before)
        self._pending.add(entry, size_bytes, committer)
        return committer

    def _put(self, op: Put, before: Record | None, revision: int) -> Change:
        found = before.mod_revision if before is not None else 0
        if op.expect is not None and op.expect != found:
            kind = AlreadyExists if op.expect == 0 else RevisionConflict
            raise kind(op.key, expected=op.expect, found=found)
        if op.lease and (before is None or before.lease != op.lease):
            self._leases.check_attach(op.lease, op.key)
        if before is None:
            labels = dict(op.labels) if op.labels else {}
            return Change("put", Record(op.key, op.value, labels, revision, revision, 1, op.lease or 0))
        if op.labels is not None and op.labels != before.labels:
            raise Invalid(op.key, "its labels cannot change", now="delete the record and create it anew")
        lease = before.lease if op.lease is None else op.lease
        record = Record(op.key, op.value, before.labels, before.create_revision, revision, before.version + 1, lease)
        return Change("put", record)

    def _answer_unchanged(self, committer: asyncio.Future[int]) -> None:
        """Nothing to write; but what it was decided on may not be logged yet, so it is answered together with that."""
        if len(self._pending):
            self._pending.add(Batch(self._decided, ()), 0, committer)
        else:
            committer.set_result(self.revision)

    def _end_lease(self, lease: int) -> asyncio.Future[int]:
        ops = [Delete(key) for key in self._leases.get(lease).keys]
        return self._decide([*ops, Delete(f"{LEASE_PREFIX}{lease}")], 0, False)

    def _expire(self, lease: int) -> None:
        """Called when a lease is over. Retried for as long as the store cannot take it."""
        try:
            ended = self._end_lease(lease)
        except LeaseNotFound:
            return
        except PenstockError:
            # Safe: a store that is closed or broken expires the lease after it was opened again.
            self._leases.retry(lease)
            return
        ended.add_done_callback(lambda done: done.cancelled() or done.exception())  # a failure resets the leases

    # --- the log's answers ------------------------------------------------------------------------------------------

    def _logged(self, revision: int) -> None:
        for entry, size_bytes, committer in self._pending.take(revision):
            for change in entry.changes:
                self._index.apply(change)
            if entry.changes:
                self._hub.publish(entry, size_bytes)
            if not committer.done():
                committer.set_result(entry.revision)
        self._hub.settle()
        if self.revision - self._hub.compacted > self._keep_revisions * 5 // 4 and self._compacting is None:
            self._compacting = self._compact(self.revision - self._keep_revisions)
            self._compacting.add_done_callback(self._compacted)

    def _failed(self, error: BaseException) -> None:
        """Nothing since the last logged revision was kept."""
        full = isinstance(error, StoreFull)

        def why() -> PenstockError:
            kind = StoreFull if full else StoreFailed
            answer = kind("commit was not kept", why=str(error), retry_after_s=1.0 if full else None)
            answer.__cause__ = error
            return answer

        self._decided = self.revision
        self._pending.fail(why)
        self._leases.reset(self._index.records())
        if full:
            self._log.reset()
        elif self._open:
            now = "restart: opening checks what was kept"
            self._refusal = lambda: StoreFailed("log is broken", why=str(error), now=now)

    def _compact(self, revision: int) -> asyncio.Future[None]:
        self._hub.compacted = revision
        return self._log.compact(revision)

    def _compacted(self, done: asyncio.Future[None]) -> None:
        # Safe to go on after a failure: only space is lost, and the next quarter of history tries again.
        self._compacting = None
        if not done.cancelled():
            done.exception()

    def _check_kept(self, revision: int) -> None:
        if not self._hub.compacted <= revision <= self.revision:
            raise Compacted(revision, compacted=self._hub.compacted, revision=self.revision)

    async def _replay(self, records: dict[str, Record], prefix: str, after: int, upto: int) -> None:
        """Bring `records` from one revision to another. Raises Compacted when a compaction was faster."""
        while after < upto:
            for entry in await self._log.read(after, min(READ_COUNT, upto - after)):
                for change in entry.changes:
                    if not change.record.key.startswith(prefix):
                        continue
                    if change.kind == "put":
                        records[change.record.key] = change.record
                    else:
                        records.pop(change.record.key, None)
                after = entry.revision


def _deleted(op: Delete, before: Record | None, revision: int) -> Change | None:
    found = before.mod_revision if before is not None else 0
    if op.expect is not None and op.expect != found:
        raise RevisionConflict(op.key, expected=op.expect, found=found)
    if before is None:
        return None
    return Change("delete", Record(op.key, b"", before.labels, before.create_revision, revision, 0))

"""The log on disk: SQLite in WAL mode, one writer thread, group commit.

The loop hands entries over through a queue and never waits. The thread takes all that have gathered, writes them as one
row in one transaction, and wakes the loop once. While it writes, the next group gathers: the busier the store, the
larger the groups. One row per revision was the alternative; it costs one statement, one index entry and two hand-overs
of the interpreter lock for each, where a row per group costs them once.

`synchronous` is NORMAL: an acknowledged commit survives the death of the process, since the WAL is in the page cache.
A group with a durable entry is written at FULL, and its fsync covers everything before it, the WAL being sequential.
"""

from __future__ import annotations

import asyncio
import queue
import sqlite3
import threading
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from penstock.core.errors import PenstockError
from penstock.model.records import Batch, Compacted, Record
from penstock.store import sqlitefile
from penstock.store.errors import StoreClosed, StoreDamaged, StoreFailed, StoreFull
from penstock.store.log import Image, OnFailed, OnLogged
from penstock.store.reserve import Reserve

GROUP_MAX: Final = 512  # entries in one transaction; bounds how long the loop is busy with its announcement
GROUP_BYTES_MAX: Final = 4 * 1024 * 1024
FOLD_REVISIONS: Final = 1_024  # compacted in one transaction, about 5 ms; entries wait at most that long

T = TypeVar("T")
_encode = msgspec.msgpack.Encoder().encode
_decode_record = msgspec.msgpack.Decoder(Record).decode
_decode_group = msgspec.msgpack.Decoder(list[Batch]).decode


class _Mark(Enum):
    RESET = "entries after it were decided after the failure"
    STOP = "nothing comes after it"


class _Fold:
    __slots__ = ("done", "revision")

    def __init__(self, revision: int, done: asyncio.Future[None]) -> None:
        self.revision, self.done = revision, done


_Entry = tuple[Batch, bool]  # with durable
_Item = _Entry | _Fold | _Mark


class SqliteLog:
    """`path` is the file; `-wal`, `-shm` and `.lock` stand beside it."""

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._lock = sqlitefile.FileLock(self._path)
        self._reserve = Reserve(self._path)  # of the thread that has the connections open
        self._queue: queue.SimpleQueue[_Item] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._logged: OnLogged | None = None
        self._failed: OnFailed | None = None
        self._thread: threading.Thread | None = None
        self._readers: ThreadPoolExecutor | None = None
        self._reader: sqlite3.Connection | None = None
        self._ended: asyncio.Future[None] | None = None
        self._refusing = False  # the writer thread's: entries are dropped until RESET

    async def open(self, *, logged: OnLogged, failed: OnFailed) -> None:
        self._loop = asyncio.get_running_loop()
        self._logged, self._failed = logged, failed
        self._lock.take()
        self._readers = ThreadPoolExecutor(1, thread_name_prefix="store-reader")
        try:
            db = await self._loop.run_in_executor(self._readers, self._connect)
        except BaseException:
            self._readers.shutdown(wait=False)
            self._readers = None
            self._lock.give()
            raise
        self._ended = self._loop.create_future()
        self._refusing = False
        self._thread = threading.Thread(target=self._write, args=(db,), name="store-writer", daemon=True)
        self._thread.start()

    async def image(self) -> Image:
        return await self._reading(self._image)

    async def read(self, after_revision: int, count_max: int) -> list[Batch]:
        return await self._reading(partial(_read, after_revision=after_revision, count_max=count_max))

    def append(self, entry: Batch, *, durable: bool) -> None:
        self._queue.put((entry, durable))

    def reset(self) -> None:
        self._queue.put(_Mark.RESET)

    def compact(self, revision: int) -> asyncio.Future[None]:
        if self._loop is None or self._ended is None or self._ended.done():
            raise StoreClosed("log is not open", which=str(self._path))
        done: asyncio.Future[None] = self._loop.create_future()
        self._queue.put(_Fold(revision, done))
        return done

    async def close(self) -> None:
        if self._thread is None or self._ended is None or self._readers is None:
            return
        loop, readers, reader = asyncio.get_running_loop(), self._readers, self._reader
        self._readers = self._reader = None
        if reader is not None:
            # First, so that the writer is the last connection: it then empties the WAL and removes it.
            await loop.run_in_executor(readers, reader.close)
        readers.shutdown(wait=False)
        self._queue.put(_Mark.STOP)
        await asyncio.shield(self._ended)
        self._thread.join()
        self._thread = None
        self._lock.give()

    # --- reading, in the readers' thread ------------------------------------------------------------------------------

    def _connect(self) -> sqlite3.Connection:
        sqlitefile.check(self._path)
        db = sqlitefile.connect(self._path)
        self._reader = sqlitefile.connect_reader(self._path)
        _meta(db)  # with the first look the files beside it exist
        self._reserve.top_up()
        return db

    async def _reading(self, ask: Callable[[sqlite3.Connection], T]) -> T:
        if self._readers is None or self._reader is None or self._loop is None:
            raise StoreClosed("log is not open", which=str(self._path))
        return await self._loop.run_in_executor(self._readers, ask, self._reader)

    def _image(self, db: sqlite3.Connection) -> Image:
        db.execute("BEGIN")  # base and meta of one instant, whatever is folded meanwhile
        try:
            meta = _meta(db)
            rows = db.execute("SELECT key, body, crc FROM base")
            records = [_decode_record(sqlitefile.checked(body, crc, key)) for key, body, crc in rows]
        finally:
            db.execute("COMMIT")
        return Image(meta["base_revision"], meta["compacted"], tuple(records))

    # --- writing, in the writer thread --------------------------------------------------------------------------------

    def _write(self, db: sqlite3.Connection) -> None:
        """Until STOP comes: gather a group, log it, say so."""
        carried: _Item | None = None
        while True:
            item, carried = carried or self._queue.get(), None
            if isinstance(item, tuple):
                carried = self._log_group(db, item)
            elif isinstance(item, _Fold):
                self._fold(db, item)
            elif item is _Mark.RESET:
                self._refusing = False
            else:
                break
        while not self._queue.empty():
            if isinstance(item := self._queue.get(), _Fold):
                self._announce(_reject, item.done, StoreClosed("log was closed"))
        db.close()
        self._reserve.close()
        assert self._ended is not None
        self._announce(_resolve, self._ended)

    def _log_group(self, db: sqlite3.Connection, first: _Entry) -> _Item | None:
        """Log `first` and the entries gathered behind it. Returns the first other thing taken from the queue."""
        group, durable = [first[0]], first[1]
        size_bytes = _size_bytes(first[0])
        following: _Item | None = None
        while len(group) < GROUP_MAX and size_bytes < GROUP_BYTES_MAX:
            try:
                following = self._queue.get_nowait()
            except queue.Empty:
                break
            if not isinstance(following, tuple):
                break
            group.append(following[0])
            durable = durable or following[1]
            size_bytes += _size_bytes(following[0])
            following = None
        if not self._refusing:
            self._log(db, group, durable)
        return following

    def _log(self, db: sqlite3.Connection, group: list[Batch], durable: bool) -> None:
        assert self._logged is not None
        assert self._failed is not None
        try:
            body = _encode(group)
            if durable:
                db.execute("PRAGMA synchronous = FULL")
            # One statement outside a transaction is a transaction: one call that lets go of the interpreter lock.
            row = (group[0].revision, group[-1].revision, body, zlib.crc32(body))
            db.execute("INSERT INTO log(first, last, body, crc) VALUES (?, ?, ?, ?)", row)
            if durable:
                db.execute("PRAGMA synchronous = NORMAL")
        except Exception as error:
            self._refusing = True
            self._announce(self._failed, _explained(error, self._path))
            return
        self._announce(self._logged, group[-1].revision)
        self._reserve.written(len(body))

    def _fold(self, db: sqlite3.Connection, fold: _Fold) -> None:
        """One step of a compaction. The next one queues up behind the entries that have gathered."""
        try:
            db.execute("BEGIN IMMEDIATE")
            try:
                more = _fold_rows(db, fold.revision)
                db.execute("COMMIT")
            except BaseException:
                db.execute("ROLLBACK")
                raise
        except Exception as error:
            self._announce(_reject, fold.done, _explained(error, self._path))
            return
        if more:
            self._queue.put(fold)
        else:
            self._announce(_resolve, fold.done)

    def _announce(self, say: Callable[..., object], *facts: object) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(say, *facts)
        except RuntimeError:
            # The loop was closed under us: nobody is left to be told, and what is logged is on disk.
            self._refusing = True


def _read(db: sqlite3.Connection, *, after_revision: int, count_max: int) -> list[Batch]:
    db.execute("BEGIN")
    try:
        base = _meta(db)["base_revision"]
        if after_revision < base:
            raise Compacted(after_revision, compacted=base, revision=_last(db))
        rows = db.execute(
            "SELECT first, body, crc FROM log"
            " WHERE first >= (SELECT max(first) FROM log WHERE first <= ?) ORDER BY first",
            (after_revision + 1,),
        )
        found: list[Batch] = []
        for first, body, crc in rows:
            group = _decode_group(sqlitefile.checked(body, crc, f"revision {first}"))
            found.extend(entry for entry in group if entry.revision > after_revision)
            if len(found) >= count_max:
                break
        return found[:count_max]
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise StoreDamaged("store is damaged", why=str(error)) from error
    finally:
        db.execute("COMMIT")


def _fold_rows(db: sqlite3.Connection, revision: int) -> bool:
    """Move the next groups up to `revision` into the base; one that reaches beyond it stays. True: there is more."""
    newest: dict[str, Record] = {}
    folded_to, count, more = 0, 0, False
    for first, last, body, crc in db.execute("SELECT first, last, body, crc FROM log ORDER BY first"):
        if last > revision or count >= FOLD_REVISIONS:
            more = last <= revision
            break
        for entry in _decode_group(sqlitefile.checked(body, crc, f"revision {first}")):
            for change in entry.changes:
                newest[change.record.key] = change.record
        folded_to, count = last, count + last - first + 1
    for key, record in newest.items():
        if record.version:
            body = _encode(record)
            db.execute("INSERT OR REPLACE INTO base(key, body, crc) VALUES (?, ?, ?)", (key, body, zlib.crc32(body)))
        else:
            db.execute("DELETE FROM base WHERE key = ?", (key,))
    if folded_to:
        db.execute("DELETE FROM log WHERE first <= ?", (folded_to,))
        db.execute("UPDATE meta SET value = ? WHERE name = 'base_revision'", (folded_to,))
    db.execute("UPDATE meta SET value = max(value, ?) WHERE name = 'compacted'", (revision,))
    return more


def _meta(db: sqlite3.Connection) -> dict[str, int]:
    return dict(db.execute("SELECT name, value FROM meta"))


def _last(db: sqlite3.Connection) -> int:
    row = db.execute("SELECT max(last) FROM log").fetchone()
    return row[0] or _meta(db)["base_revision"]


def _size_bytes(entry: Batch) -> int:
    return sum([len(change.record.value) for change in entry.changes])


def _explained(error: Exception, path: Path) -> PenstockError:
    """StoreFull when a later attempt may succeed: SQLite has rolled the group back. Anything else is final."""
    if isinstance(error, sqlite3.Error) and getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL:
        full = StoreFull("disk is full", which=str(path), why=str(error), now="make room", retry_after_s=1)
        full.__cause__ = error
        return full
    failed = StoreFailed("log cannot be written", which=str(path), why=f"{type(error).__name__}: {error}")
    failed.__cause__ = error
    return failed


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _reject(future: asyncio.Future[None], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)

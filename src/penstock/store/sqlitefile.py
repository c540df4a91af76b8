"""The store's file: its lock, its format, and the check that it may be opened at all.

A file that is not ours, damaged, or of a later format is refused before anything is written: the check opens it
read-only and removes what SQLite put beside it. The format:

    meta(name, value)                                 base_revision, compacted
    base(key, body, crc)                              every record as of base_revision
    log(first, last, body, crc)                       one row per group commit: revisions first..last, without gaps

A body is MessagePack, a crc is CRC-32 of the body: SQLite checks its own pages' structure, not their contents.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import zlib
from pathlib import Path
from typing import Final

from penstock.core.errors import PenstockError
from penstock.store.errors import StoreDamaged, StoreHeld, StoreTooNew

APPLICATION_ID: Final = 0x50535453  # "PSTS"
FORMAT: Final = 1
MAGIC: Final = b"SQLite format 3\0"
HEADER_BYTES: Final = 100
APPLICATION_ID_AT: Final = 68  # offset in the header, big-endian (SQLite file format, 1.3)
SIDECARS: Final = ("-wal", "-shm", "-journal")
PAGES_PER_CHECKPOINT: Final = 4_000  # 16 MiB of WAL

TABLES: Final = (
    "CREATE TABLE meta(name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID",
    "CREATE TABLE base(key TEXT PRIMARY KEY, body BLOB NOT NULL, crc INTEGER NOT NULL)",
    "CREATE TABLE log(first INTEGER PRIMARY KEY, last INTEGER NOT NULL, body BLOB NOT NULL, crc INTEGER NOT NULL)",
    "INSERT INTO meta VALUES ('base_revision', 0), ('compacted', 0)",
    f"PRAGMA application_id = {APPLICATION_ID}",
    f"PRAGMA user_version = {FORMAT}",
)


class FileLock:
    """One process per store. The lock is a file beside it: closing any descriptor of the store itself would drop
    SQLite's own POSIX locks."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1

    def take(self) -> None:
        """Raises StoreHeld naming the holder's pid. The kernel gives the lock back when the process dies."""
        fd = os.open(f"{self._path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            text = os.pread(fd, 32, 0).strip()
            os.close(fd)
            raise StoreHeld(str(self._path), pid=int(text) if text.isdigit() else 0) from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        self._fd = fd

    def give(self) -> None:
        """The file stays: unlinking it would let two processes hold two locks of one name. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def check(path: Path) -> None:
    """Raises StoreDamaged or StoreTooNew, with every file as it was. Absent or empty is a store not yet made."""
    try:
        with path.open("rb") as file:
            header = file.read(HEADER_BYTES)
    except FileNotFoundError:
        return
    if not header:
        return
    if len(header) < HEADER_BYTES or not header.startswith(MAGIC):
        raise _damaged(path, "it is not an SQLite file")
    found = int.from_bytes(header[APPLICATION_ID_AT : APPLICATION_ID_AT + 4], "big")
    if found != APPLICATION_ID:
        raise _damaged(path, f"it is an SQLite file of another application ({found:#x})")
    before = {suffix for suffix in SIDECARS if Path(f"{path}{suffix}").exists()}
    try:
        _check_inside(path)
    except PenstockError:
        for suffix in set(SIDECARS) - before:
            Path(f"{path}{suffix}").unlink(missing_ok=True)
        raise


def connect(path: Path) -> sqlite3.Connection:
    """The writing connection, of a file that passed `check`. Makes the tables of a new one."""
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5)
    try:
        db.execute(f"PRAGMA wal_autocheckpoint = {PAGES_PER_CHECKPOINT}")
        if db.execute("PRAGMA user_version").fetchone() == (0,):
            # Before WAL, so that the header which `check` reads is in the file itself.
            for statement in ("BEGIN IMMEDIATE", *TABLES, "COMMIT"):
                db.execute(statement)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
    except BaseException:
        db.close()
        raise
    path.chmod(0o600)
    return db


def connect_reader(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(
        f"{path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None, check_same_thread=False
    )


def checked(body: bytes, crc: int, where: str) -> bytes:
    """`body`, when it is what was written. Raises StoreDamaged."""
    if zlib.crc32(body) != crc:
        raise StoreDamaged("store is damaged", which=where, why="its checksum differs")
    return body


def _check_inside(path: Path) -> None:
    try:
        db = connect_reader(path)
        try:
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version > FORMAT:
                raise StoreTooNew(
                    "store was written by a later version",
                    which=str(path),
                    why=f"format {version}, this one reads up to {FORMAT}",
                    now="use that version, or another data folder",
                )
            verdict = db.execute("PRAGMA quick_check(1)").fetchone()[0]
            if verdict != "ok":
                raise _damaged(path, verdict)
            _check_contents(db, path)
        finally:
            db.close()
    except sqlite3.Error as error:
        raise _damaged(path, str(error)) from error


def _check_contents(db: sqlite3.Connection, path: Path) -> None:
    for key, body, crc in db.execute("SELECT key, body, crc FROM base"):
        checked(body, crc, f"{path}, record {key!r}")
    row = db.execute("SELECT value FROM meta WHERE name = 'base_revision'").fetchone()
    if row is None:
        raise _damaged(path, "its base revision is missing")
    revision = row[0]
    for first, last, body, crc in db.execute("SELECT first, last, body, crc FROM log ORDER BY first"):
        if first != revision + 1 or last < first:
            raise _damaged(path, f"after revision {revision} it goes on with {first} to {last}")
        checked(body, crc, f"{path}, revisions {first} to {last}")
        revision = last


def _damaged(path: Path, why: str) -> StoreDamaged:
    return StoreDamaged(
        "store is damaged", which=str(path), why=why, now="restore it from a copy, or move it away to begin anew"
    )

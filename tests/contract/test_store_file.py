"""The store's file: what is not ours, damaged, newer or in use is refused, and not a byte of it changes."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from penstock.core.clock import SystemClock
from penstock.store.errors import StoreDamaged, StoreHeld, StoreTooNew
from penstock.store.sqlite import SqliteLog
from penstock.store.store import Put, Store

WRITERS = {"a/": frozenset({"t"})}


async def open_store(path: Path) -> Store:
    store = Store(SqliteLog(path), SystemClock(), writers=WRITERS)
    await store.open()
    return store


async def filled(path: Path) -> None:
    store = await open_store(path)
    for n in range(100):
        await store.commit([Put(f"a/{n}", bytes([n]) * 400)], by="t")
    await store.compact(50)
    await store.close()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".lock"}


async def refused(path: Path, error: type[Exception], match: str) -> None:
    before = contents(path.parent)
    with pytest.raises(error, match=match):
        await open_store(path)
    assert contents(path.parent) == before


def pid_told_to_another_process(path: Path) -> int:
    code = f"""
import asyncio
from penstock.core.clock import SystemClock
from penstock.store.errors import StoreHeld
from penstock.store.sqlite import SqliteLog
from penstock.store.store import Store
try:
    asyncio.run(Store(SqliteLog({str(path)!r}), SystemClock()).open())
except StoreHeld as error:
    print(error.pid)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    return int(said.stdout)


async def test_a_new_store_is_private_and_closes_to_one_file(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    await filled(path)
    assert list(contents(tmp_path)) == ["store.db"]
    assert path.stat().st_mode & 0o777 == 0o600


async def test_an_empty_file_is_a_store_not_yet_made(tmp_path: Path) -> None:
    """What a crash at the very first moment leaves."""
    path = tmp_path / "store.db"
    path.touch()
    await filled(path)


async def test_a_file_that_is_not_sqlite_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    path.write_bytes(b"precious notes of somebody\n" * 100)
    await refused(path, StoreDamaged, "not an SQLite file")
    path.write_bytes(b"short")
    await refused(path, StoreDamaged, "not an SQLite file")


async def test_a_database_of_another_application_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE theirs(x)")
    db.close()
    await refused(path, StoreDamaged, "another application")


async def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    await filled(path)
    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version = 2")
    db.close()
    await refused(path, StoreTooNew, r"format 2, this one reads up to 1\); use that version")


@pytest.mark.parametrize("where", range(12))
async def test_a_flipped_byte_is_noticed_wherever_it_is(tmp_path: Path, where: int) -> None:
    path = tmp_path / "store.db"
    await filled(path)
    data = bytearray(path.read_bytes())
    # Inside values, which SQLite itself does not check: every page holds a run of one byte, four hundred long.
    at = [n for n in range(0, len(data) - 300, 97) if data[n] and len(set(data[n : n + 300])) == 1][where * 3]
    data[at] ^= 0xFF
    path.write_bytes(data)
    await refused(path, StoreDamaged, "checksum|malformed|damaged")


@pytest.mark.parametrize("kept", [0.2, 0.5, 0.9])
async def test_a_truncated_file_is_refused(tmp_path: Path, kept: float) -> None:
    path = tmp_path / "store.db"
    await filled(path)
    os.truncate(path, int(path.stat().st_size * kept) // 4096 * 4096)
    await refused(path, StoreDamaged, "damaged")


async def test_garbage_in_the_middle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    await filled(path)
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(3 * 4096))
    await refused(path, StoreDamaged, "damaged")


async def test_a_missing_revision_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    await filled(path)
    db = sqlite3.connect(path)
    db.execute("DELETE FROM log WHERE first = 70")
    db.commit()
    db.close()
    await refused(path, StoreDamaged, "after revision 69 it goes on with 71")


async def test_a_newer_format_beside_an_unfinished_wal_is_refused(tmp_path: Path) -> None:
    """As a later version leaves it when it is killed: the file and its WAL must survive the refusal together."""
    live, path = tmp_path / "live.db", tmp_path / "left" / "store.db"
    path.parent.mkdir()
    await filled(live)
    db = sqlite3.connect(live)
    db.execute("PRAGMA user_version = 2")
    for suffix in ("", "-wal"):
        shutil.copy(f"{live}{suffix}", f"{path}{suffix}")
    db.close()
    await refused(path, StoreTooNew, "format 2")


async def test_a_second_opener_is_told_who_has_it(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    store = await open_store(path)
    with pytest.raises(StoreHeld, match=f"process {os.getpid()} has it open"):
        await open_store(path)
    assert pid_told_to_another_process(path) == os.getpid()
    await store.commit([Put("a/1", b"")], by="t")
    await store.close()
    await (await open_store(path)).close()

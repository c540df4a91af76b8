"""The store on a disk without a free byte: what ends things is still written, and nothing is lost."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.filling import fill

from penstock.core.clock import SystemClock
from penstock.store.errors import StoreFull
from penstock.store.reserve import Reserve
from penstock.store.sqlite import SqliteLog
from penstock.store.store import Put, Store

pytestmark = pytest.mark.root
WRITERS = {"a/": frozenset({"t"})}


@pytest.fixture(params=["ext4", "tmpfs"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system of 128 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if request.param == "ext4":
        image = tmp_path / "image"
        image.touch()
        subprocess.run(["truncate", "-s", "128M", image], check=True)
        subprocess.run(["mkfs.ext4", "-q", "-m", "0", image], check=True)
        subprocess.run(["mount", "-o", "loop", image, place], check=True)
    else:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128m", "none", place], check=True)
    yield place
    subprocess.run(["umount", place], check=True)


async def open_store(disk: Path) -> Store:
    store = Store(SqliteLog(disk / "store.db"), SystemClock(), writers=WRITERS)
    await store.open()
    return store


async def test_thousands_of_commits_fit_on_a_full_disk(disk: Path):
    store = await open_store(disk)
    await store.commit([Put("a/first", b"1")], by="t")
    fill(disk)
    for n in range(2_000):
        await store.commit([Put(f"a/{n % 50}", b"x" * 500)], by="t", durable=n % 100 == 0)
    revision = store.revision
    await store.close()
    again = await open_store(disk)
    assert again.revision == revision
    await again.close()


async def test_what_was_used_is_reserved_anew_when_there_is_room(disk: Path):
    store = await open_store(disk)
    for _ in range(2):
        hog = fill(disk)
        for n in range(1_500):
            await store.commit([Put(f"a/{n % 50}", b"x" * 500)], by="t")
        hog.unlink()
        for n in range(200):
            await store.commit([Put(f"a/{n % 50}", b"x" * 500)], by="t")
    await store.close()


async def test_without_a_reserve_it_is_full_at_once(disk: Path, monkeypatch: pytest.MonkeyPatch):
    """So that the tests above prove something; and a store that was full goes on when there is room."""
    monkeypatch.setattr(Reserve, "top_up", lambda self: None)
    store = await open_store(disk)
    hog = fill(disk)
    with pytest.raises(StoreFull):
        for n in range(2_000):
            await store.commit([Put(f"a/{n % 50}", b"x" * 500)], by="t")
    hog.unlink()
    await store.commit([Put("a/last", b"1")], by="t")
    await store.close()

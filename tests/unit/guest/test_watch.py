"""Watching: which events, in which order, how soon; what happens at the bounds."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from penstock.guest import watch
from penstock.guest.users import Users
from penstock.guest.watch import Watcher, Watchers, WatchFailed
from tests.unit.guest.filesroom import Room, open_room


@pytest.fixture
async def room(tmp_path: Path) -> AsyncIterator[Room]:
    async with open_room(tmp_path) as opened:
        yield opened


async def watching(room: Room, path: str = "", **wishes: bool) -> str:
    return str((await room.ok("CreateWatcher", path=path, **wishes))["watcherId"])


def inotify_descriptors() -> int:
    links = (f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd"))
    return sum(os.path.islink(link) and os.readlink(link) == "anon_inode:inotify" for link in links)


async def test_an_upload_is_told_as_create_chmod_write(room: Room) -> None:
    watcher = await watching(room)
    await room.upload("new", b"data", x_metadata_k="v")
    assert await room.events(watcher) == [("new", "CREATE"), ("new", "CHMOD"), ("new", "WRITE")]
    await room.upload("empty", b"")
    assert await room.events(watcher) == [("empty", "CREATE"), ("empty", "CHMOD")]
    assert await room.events(watcher) == []


async def test_what_a_program_does_is_told_at_once_and_in_order(room: Room) -> None:
    watcher = await watching(room)
    target = room.home / "f"
    target.write_bytes(b"1")
    os.chmod(target, 0o600)
    os.rename(target, room.home / "g")
    os.unlink(room.home / "g")
    assert await room.events(watcher) == [
        ("f", "CREATE"), ("f", "WRITE"), ("f", "CHMOD"), ("f", "RENAME"), ("g", "CREATE"), ("g", "REMOVE"),
    ]  # fmt: skip


async def test_a_watcher_that_is_not_recursive_hears_nothing_from_below(room: Room) -> None:
    (room.home / "sub").mkdir()
    watcher = await watching(room)
    (room.home / "sub/f").touch()
    assert await room.events(watcher) == []


async def test_recursive_watching_covers_what_was_there_and_what_comes(room: Room) -> None:
    (room.home / "old/er").mkdir(parents=True)
    watcher = await watching(room, recursive=True)
    (room.home / "old/er/f").touch()
    await room.ok("MakeDir", path="new/est")
    await room.upload("new/est/f", b"x")
    events = await room.events(watcher)
    assert events[0] == ("old/er/f", "CREATE")
    assert ("new", "CREATE") in events
    assert ("new/est", "CREATE") in events
    assert events[-3:] == [("new/est/f", "CREATE"), ("new/est/f", "CHMOD"), ("new/est/f", "WRITE")]


async def test_what_was_put_into_a_directory_before_it_was_watched_is_told_once(room: Room) -> None:
    watcher = await watching(room, recursive=True)
    (room.home / "a/b").mkdir(parents=True)  # all of it before the guest reads the first event
    (room.home / "a/b/f").write_bytes(b"x")
    (room.home / "a/b/empty").touch()
    events = await room.events(watcher)
    told = {("a", "CREATE"), ("a/b", "CREATE"), ("a/b/empty", "CREATE"), ("a/b/f", "CREATE"), ("a/b/f", "WRITE")}
    assert (set(events), len(events)) == (told, len(told))
    (room.home / "a/b/f").unlink()
    (room.home / "a/b/f").touch()
    assert await room.events(watcher) == [("a/b/f", "REMOVE"), ("a/b/f", "CREATE")]


async def test_a_directory_that_moves_is_followed_inside_and_forgotten_outside(room: Room, tmp_path: Path) -> None:
    (room.home / "a/in").mkdir(parents=True)
    watcher = await watching(room, recursive=True)
    os.rename(room.home / "a", room.home / "b")
    (room.home / "b/in/f").touch()
    events = await room.events(watcher)
    assert events[:2] == [("a", "RENAME"), ("b", "CREATE")]
    assert set(events[2:]) == {("b/in", "CREATE"), ("b/in/f", "CREATE")}
    (room.home / "b/in/g").touch()
    assert await room.events(watcher) == [("b/in/g", "CREATE")]
    os.rename(room.home / "b", tmp_path / "outside")
    (tmp_path / "outside/in/h").touch()
    assert await room.events(watcher) == [("b", "RENAME")]


async def test_a_directory_that_goes_and_comes_back_is_watched_again(room: Room) -> None:
    watcher = await watching(room, recursive=True)
    for _ in range(3):
        (room.home / "d").mkdir()
        await room.events(watcher)
        (room.home / "d/f").touch()
        assert await room.events(watcher) == [("d/f", "CREATE")]
        shutil.rmtree(room.home / "d")
        assert await room.events(watcher) == [("d/f", "REMOVE"), ("d", "REMOVE")]


async def test_the_end_of_the_watched_directory_is_told(room: Room) -> None:
    (room.home / "d").mkdir()
    watcher = await watching(room, "d", recursive=True)
    (room.home / "d").rmdir()
    assert await room.events(watcher) == [(".", "REMOVE")]


async def test_entries_come_with_events_of_what_is_there(room: Room) -> None:
    watcher = await watching(room, includeEntry=True)
    (room.home / "f").write_bytes(b"123")
    (room.home / "g").touch()
    (room.home / "g").unlink()
    events = (await room.ok("GetWatcherEvents", watcherId=watcher))["events"]
    sizes = {(e["name"], e["type"]): e["entry"]["size"] for e in events if "entry" in e}
    assert sizes == {("f", "EVENT_TYPE_CREATE"): "3", ("f", "EVENT_TYPE_WRITE"): "3"}


async def test_a_stream_tells_events_keeps_alive_and_ends_with_its_client(room: Room) -> None:
    before = inotify_descriptors()
    stream = room.stream("WatchDir", path="", recursive=True)
    assert await anext(stream) == {"start": {}}
    assert inotify_descriptors() == before + 1
    assert await anext(stream) == {"keepalive": {}}
    (room.home / "f").touch()
    assert await anext(stream) == {"filesystem": {"name": "f", "type": "EVENT_TYPE_CREATE"}}
    await stream.aclose()  # type: ignore[attr-defined]
    for _ in range(200):
        if inotify_descriptors() == before:
            break
        await asyncio.sleep(0.01)
    assert inotify_descriptors() == before


async def test_watching_what_is_no_directory_is_refused(room: Room) -> None:
    (room.home / "f").touch()
    assert await room.code("CreateWatcher", path="f") == "invalid_argument"
    assert [message async for message in room.stream("WatchDir", path="missing")] == [
        {"error": {"code": "not_found", "message": f"path '{room.home}/missing' does not exist"}}
    ]
    assert inotify_descriptors() == 0


async def test_a_watcher_ends_when_removed(room: Room) -> None:
    watcher = await watching(room)
    assert await room.ok("RemoveWatcher", watcherId=watcher) == {}
    assert inotify_descriptors() == 0
    assert await room.code("RemoveWatcher", watcherId=watcher) == "not_found"
    assert await room.code("GetWatcherEvents", watcherId=watcher) == "not_found"
    assert await room.code("GetWatcherEvents") == "not_found"


async def test_too_many_events_end_the_watcher_with_an_error_that_stays(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "EVENTS_MAX", 50)
    watcher = await watching(room)
    for n in range(60):
        (room.home / f"{n}").touch()
    assert await room.code("GetWatcherEvents", watcherId=watcher) == "resource_exhausted"
    assert await room.code("GetWatcherEvents", watcherId=watcher) == "resource_exhausted"
    assert inotify_descriptors() == 0
    await room.ok("RemoveWatcher", watcherId=watcher)


async def test_an_overflow_of_the_kernels_queue_is_an_error(tmp_path: Path) -> None:
    queue = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())  # noqa: ASYNC240
    if queue > 100_000:
        pytest.skip("this machine's queue is too long to fill in a test")
    watcher = Watcher(str(tmp_path), recursive=False, include_entry=False, names=Users())
    first, second = tmp_path / "a", tmp_path / "b"
    first.touch()
    for _ in range(queue // 2 + 10):  # the loop does not run, so nobody reads
        os.rename(first, second)
        os.rename(second, first)
    with pytest.raises(WatchFailed, match="lost"):
        watcher.take()
    watcher.close()


async def test_the_number_of_watchers_and_directories_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "WATCHERS_MAX", 2)
    monkeypatch.setattr(watch, "DIRECTORIES_MAX", 5)
    watchers = Watchers(Users())
    for _ in range(2):
        watchers.open(str(tmp_path), recursive=True, include_entry=False)
    with pytest.raises(WatchFailed, match="too many watchers"):
        watchers.open(str(tmp_path), recursive=False, include_entry=False)
    watchers.close_all()
    assert inotify_descriptors() == 0
    grows = watchers.open(str(tmp_path), recursive=True, include_entry=False)
    for n in range(6):
        (tmp_path / f"{n}").mkdir()
    with pytest.raises(WatchFailed, match="too many directories"):
        grows.take()
    with pytest.raises(WatchFailed, match="too many directories"):
        watchers.open(str(tmp_path), recursive=True, include_entry=False)
    watchers.close_all()
    assert inotify_descriptors() == 0


async def test_symlinks_to_directories_are_not_followed(room: Room, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    watcher = await watching(room, recursive=True)
    (room.home / "link").symlink_to(tmp_path / "outside")
    await room.events(watcher)
    (tmp_path / "outside/f").touch()
    assert await room.events(watcher) == []

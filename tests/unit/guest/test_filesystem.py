"""The filesystem calls over a real socket; each test looks at the disk."""

from __future__ import annotations

import os
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from penstock.guest import trees
from penstock.guest.entries import permissions, timestamp
from penstock.guest.paths import BadPath, resolve
from tests.unit.guest.filesroom import UID, Room, open_room


@pytest.fixture
async def room(tmp_path: Path) -> AsyncIterator[Room]:
    async with open_room(tmp_path) as opened:
        yield opened


def test_paths() -> None:
    assert resolve("", "/h") == "/h"
    assert resolve("", "/h", "/w") == "/w"
    assert resolve("~", "/h", "/w") == "/h"
    assert resolve("~/a", "/h") == "/h/a"
    assert resolve("a//b/./c/", "/h") == "/h/a/b/c"
    assert resolve("/link/../x", "/h") == "/link/../x"
    for bad in ("a\0b", "~other", "~other/x", "/" + "n" * 5000, "\ud800"):
        with pytest.raises(BadPath):
            resolve(bad, "/h")


def test_modes_and_times() -> None:
    assert permissions(stat.S_IFREG | 0o644) == "-rw-r--r--"
    assert permissions(stat.S_IFDIR | 0o1777) == "dtrwxrwxrwx"
    assert permissions(stat.S_IFLNK | 0o777) == "Lrwxrwxrwx"
    assert permissions(stat.S_IFCHR | 0o600) == "Dcrw-------"
    assert permissions(stat.S_IFREG | 0o4755) == "urwxr-xr-x"
    assert timestamp(0) == "1970-01-01T00:00:00Z"
    assert timestamp(1_700_000_000_000_000_001) == "2023-11-14T22:13:20.000000001Z"
    assert timestamp(-1) == "1969-12-31T23:59:59.999999999Z"
    assert timestamp(10**30).startswith("9999-")


async def test_stat_describes_a_file(room: Room) -> None:
    (room.home / "f").write_bytes(b"12345")
    os.chmod(room.home / "f", 0o640)
    os.chown(room.home / "f", UID, -1)
    entry = (await room.ok("Stat", path="f"))["entry"]
    modified = entry.pop("modifiedTime")
    assert modified == timestamp((room.home / "f").stat().st_mtime_ns)
    assert entry == {
        "name": "f", "type": "FILE_TYPE_FILE", "path": str(room.home / "f"), "size": "5", "mode": 0o640,
        "permissions": "-rw-r-----", "owner": "user", "group": "root" if UID == 1000 else "user",
    }  # fmt: skip


async def test_a_symlink_is_described_as_what_it_leads_to(room: Room) -> None:
    (room.home / "dir").mkdir()
    (room.home / "link").symlink_to("dir")
    (room.home / "dangling").symlink_to("nowhere")
    entry = (await room.ok("Stat", path="link/"))["entry"]
    assert (entry["type"], entry["symlinkTarget"]) == ("FILE_TYPE_DIRECTORY", str(room.home / "dir"))
    assert entry["permissions"] == "Lrwxrwxrwx"
    entry = (await room.ok("Stat", path="dangling"))["entry"]
    assert entry["type"] == "FILE_TYPE_UNSPECIFIED"


async def test_what_is_not_there_is_not_found(room: Room) -> None:
    (room.home / "f").touch()
    for method in ("Stat", "ListDir"):
        assert await room.code(method, path="missing") == "not_found"
        assert await room.code(method, path="f/x") == "not_found"
    assert await room.code("Move", source="missing", destination="x") == "not_found"
    assert await room.code("CreateWatcher", path="missing") == "not_found"
    for method in ("Stat", "ListDir", "MakeDir", "Remove"):
        assert await room.code(method, path="a\0b") == "invalid_argument"
        assert await room.code(method, path=7) == "invalid_argument"
        assert await room.code(method, path="~other/x") == "invalid_argument"


async def test_make_dir_makes_parents_of_the_user(room: Room) -> None:
    entry = (await room.ok("MakeDir", path="a/b/c"))["entry"]
    assert (entry["path"], entry["type"]) == (str(room.home / "a/b/c"), "FILE_TYPE_DIRECTORY")
    for folder in ("a", "a/b", "a/b/c"):
        assert ((room.home / folder).stat().st_mode & 0o777, (room.home / folder).stat().st_uid) == (0o755, UID)
    assert await room.code("MakeDir", path="a/b") == "already_exists"
    (room.home / "f").touch()
    (room.home / "dangling").symlink_to("nowhere")
    assert await room.code("MakeDir", path="f") == "invalid_argument"
    assert await room.code("MakeDir", path="f/x") == "invalid_argument"
    assert await room.code("MakeDir", path="dangling") == "invalid_argument"


async def test_list_dir_walks_by_name_down_to_its_depth(room: Room) -> None:
    for name in ("b/inner/deep", "a", "b/z"):
        await room.ok("MakeDir", path=name)
    (room.home / "c").write_bytes(b"")
    (room.home / "link").symlink_to("b")

    async def names(**message: object) -> list[str]:
        entries = (await room.ok("ListDir", **message))["entries"]
        return [entry["path"].removeprefix(f"{room.home}/") for entry in entries]

    assert await names(path="") == ["a", "b", "c", "link"]
    assert await names(path=".", depth=2) == ["a", "b", "b/inner", "b/z", "c", "link"]
    assert await names(path="", depth="3") == ["a", "b", "b/inner", "b/inner/deep", "b/z", "c", "link"]
    assert await names(path="link") == ["link/inner", "link/z"]
    assert await room.code("ListDir", path="c") == "invalid_argument"
    assert await room.code("ListDir", path="", depth=-1) == "invalid_argument"
    (room.home / "loop").symlink_to("loop")
    assert await room.code("ListDir", path="loop") == "failed_precondition"


async def test_names_that_are_not_utf8_come_out_readable(room: Room) -> None:
    os.close(os.open(os.fsencode(room.home) + b"/\xff", os.O_CREAT | os.O_WRONLY))
    assert (await room.ok("ListDir", path=""))["entries"][0]["name"] == "�"


async def test_remove_takes_a_tree_and_no_more(room: Room) -> None:
    outside = room.home / "outside"
    outside.mkdir()
    (outside / "kept").touch()
    (room.home / "tree/a/b").mkdir(parents=True)
    (room.home / "tree/a/b/f").touch()
    (room.home / "tree/away").symlink_to(outside)
    (room.home / "link").symlink_to(outside)
    os.mkfifo(room.home / "tree/fifo")
    assert await room.ok("Remove", path="tree") == {}
    assert await room.ok("Remove", path="link/") == {}
    assert sorted(os.listdir(room.home)) == ["outside"]
    assert (outside / "kept").exists()
    assert await room.ok("Remove", path="tree") == {}
    assert await room.ok("Remove", path="outside/kept/below") == {}
    for path in ("", "/", "a/..", "/../.."):
        assert await room.code("Remove", path=path) == "invalid_argument"


async def test_remove_takes_a_deep_and_wide_tree_with_few_descriptors(room: Room) -> None:
    deep = room.home / "tree"
    deep.mkdir()
    fd = os.open(deep, os.O_RDONLY)
    for _ in range(400):  # deeper than a path may be long
        os.mkdir("d" * 20, dir_fd=fd)
        below = os.open("d" * 20, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    for name in range(300):
        (deep / f"{name}").mkdir()
    assert await room.ok("Remove", path="tree") == {}
    assert not deep.exists()


async def test_move_renames_and_makes_the_way(room: Room) -> None:
    (room.home / "f").write_bytes(b"new")
    (room.home / "old").write_bytes(b"old")
    (room.home / "link").symlink_to("f")
    assert (await room.ok("Move", source="f", destination="x/y/g"))["entry"]["name"] == "g"
    assert (room.home / "x/y").stat().st_uid == UID
    await room.ok("Move", source="x/y/g", destination="old")
    assert (room.home / "old").read_bytes() == b"new"
    await room.ok("Move", source="link", destination="moved")
    assert os.readlink(room.home / "moved") == "f"
    (room.home / "full").mkdir()
    (room.home / "full/f").touch()
    assert await room.code("Move", source="old", destination="full") == "invalid_argument"
    assert await room.code("Move", source="full", destination="full/in") == "invalid_argument"
    assert await room.code("Move", source="old", destination="old/in") == "invalid_argument"
    assert (room.home / "old").read_bytes() == b"new"


async def test_a_move_between_file_systems_keeps_everything_and_leaves_nothing(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = room.home / "source", room.home / "target"
    (source / "in/ner").mkdir(parents=True)
    (source / "in/f").write_bytes(b"x" * 3_000_000)
    os.chmod(source / "in/f", 0o640)
    os.chown(source / "in/f", UID, -1)
    os.setxattr(source / "in/f", "user.e2b.k", b"v")
    os.utime(source / "in/f", ns=(5, 7))
    os.utime(source / "in", ns=(5, 9))
    (source / "link").symlink_to("/nowhere")
    os.mkfifo(source / "fifo")
    rename = os.rename
    calls: list[str] = []

    def first_fails(old: str, new: str) -> None:
        calls.append(new)
        if len(calls) == 1:
            raise OSError(18, "Invalid cross-device link")
        rename(old, new)

    monkeypatch.setattr(trees.os, "rename", first_fails)
    await trees.move(str(source), str(target))
    assert os.listdir(room.home) == ["target"]
    assert (target / "in/f").read_bytes() == b"x" * 3_000_000
    found = (target / "in/f").stat()
    assert (found.st_mode & 0o777, found.st_uid, found.st_mtime_ns) == (0o640, UID, 7)
    assert (target / "in").stat().st_mtime_ns == 9
    assert os.getxattr(target / "in/f", "user.e2b.k") == b"v"
    assert os.readlink(target / "link") == "/nowhere"
    assert stat.S_ISFIFO((target / "fifo").stat().st_mode)


async def test_a_listing_beyond_its_bound_says_so(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.guest.filesystem.ENTRIES_MAX", 3)
    for name in "abcd":
        (room.home / name).touch()
    assert await room.code("ListDir", path="") == "resource_exhausted"


async def test_an_unknown_user_is_unauthenticated(room: Room) -> None:
    answer = await room.client.post("/filesystem.Filesystem/Stat", json={"path": ""}, auth=("stranger", ""))
    assert (answer.status_code, answer.json()["code"]) == (401, "unauthenticated")

"""Images of the port Disks: what is kept of a disk, on both machines, and what is in it."""

from __future__ import annotations

import asyncio
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from penstock.core.deadlines import DeadlinePassed
from penstock.node.linux.disks import LinuxDisks

from .machines import LIMITS, WITHIN_S, Machine, on_both


@on_both
async def test_a_disk_is_kept_and_another_begins_as_its_copy(machine: Machine) -> None:
    await machine.disks.create("i1", LIMITS)
    assert await machine.disks.keep("i1", "s1", within_s=WITHIN_S) > 0
    assert machine.disks.list_images() == {"s1"}
    await machine.disks.remove("i1", within_s=WITHIN_S)
    assert machine.disks.list_images() == {"s1"}, "an image is nobody's disk"
    await machine.disks.create("i2", LIMITS, image="s1")
    await machine.disks.create("i3", LIMITS, image="s1")
    assert machine.disks.list_names() == {"i2", "i3"}
    for name in ("i2", "i3"):
        await machine.disks.remove(name, within_s=WITHIN_S)
    machine.disks.remove_image("s1")
    machine.disks.remove_image("s1")
    assert machine.disks.list_images() == set()


@on_both
async def test_keeping_twice_is_keeping_once_also_when_the_disk_has_gone(machine: Machine) -> None:
    await machine.disks.create("i1", LIMITS)
    await machine.disks.keep("i1", "s1", within_s=WITHIN_S)
    await machine.disks.keep("i1", "s1", within_s=WITHIN_S)
    await machine.disks.remove("i1", within_s=WITHIN_S)
    await machine.disks.keep("i1", "s1", within_s=WITHIN_S)
    machine.disks.remove_image("s1")
    with pytest.raises(FileNotFoundError):
        await machine.disks.keep("i1", "s1", within_s=WITHIN_S)
    assert machine.disks.list_images() == set()


@on_both
async def test_a_disk_in_use_is_not_kept_but_copied(machine: Machine) -> None:
    disk = await machine.disks.create("i1", LIMITS)
    pid = machine.start(None, disk=disk)
    await machine.disks.copy("i1", "s1", within_s=WITHIN_S)
    assert machine.disks.list_images() == {"s1"}
    with pytest.raises(DeadlinePassed):
        await machine.disks.keep("i1", "s2", within_s=0.2)
    assert machine.disks.list_images() == {"s1"}
    machine.end(pid)
    await machine.disks.remove("i1", within_s=WITHIN_S)
    machine.disks.remove_image("s1")


@on_both
async def test_no_image_no_disk(machine: Machine) -> None:
    with pytest.raises(FileNotFoundError):
        await machine.disks.create("i1", LIMITS, image="none")
    assert machine.disks.list_names() == set()


# ---- the real one: bytes


def _write(fd: int, name: str, data: bytes) -> None:
    file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600, dir_fd=fd)
    os.write(file, data)
    os.close(file)


def _read(fd: int, name: str) -> bytes:
    file = os.open(name, os.O_RDONLY, dir_fd=fd)
    try:
        return os.read(file, 1 << 20)
    finally:
        os.close(file)


def play(folder: Path, script: object) -> None:
    async def run() -> None:
        with ThreadPoolExecutor(2) as threads:
            disks = LinuxDisks(folder=str(folder), threads=threads)
            try:
                await script(disks)  # type: ignore[operator]
            finally:
                for name in disks.list_names():
                    await disks.remove(name, within_s=WITHIN_S)
                await disks.close()

    asyncio.run(run())


@pytest.mark.root
def test_what_was_written_without_a_sync_is_in_the_image_and_the_copy_is_independent(tmp_path: Path) -> None:
    async def script(disks: LinuxDisks) -> None:
        await disks.create("i1", LIMITS)
        _write(disks._held["i1"].folder_fd, "upper/note", b"before")
        await disks.keep("i1", "s1", within_s=WITHIN_S)
        await disks.remove("i1", within_s=WITHIN_S)
        await disks.create("i2", LIMITS, image="s1")
        await disks.create("i3", LIMITS, image="s1")
        _write(disks._held["i2"].folder_fd, "upper/note", b"changed")
        assert _read(disks._held["i2"].folder_fd, "upper/note") == b"changed"
        assert _read(disks._held["i3"].folder_fd, "upper/note") == b"before"

    play(tmp_path, script)


@pytest.mark.root
def test_a_copy_holds_what_was_written_until_then_and_the_disk_goes_on(tmp_path: Path) -> None:
    async def script(disks: LinuxDisks) -> None:
        await disks.create("i1", LIMITS)
        _write(disks._held["i1"].folder_fd, "upper/note", b"one")
        await disks.copy("i1", "s1", within_s=WITHIN_S)
        _write(disks._held["i1"].folder_fd, "upper/note", b"two")
        await disks.create("i2", LIMITS, image="s1")
        assert _read(disks._held["i2"].folder_fd, "upper/note") == b"one"
        assert _read(disks._held["i1"].folder_fd, "upper/note") == b"two"

    play(tmp_path, script)


@pytest.mark.root
def test_a_disk_that_was_shut_down_is_not_taken_for_whole(tmp_path: Path) -> None:
    """The shutdown that a release does drops what is unwritten: an image made after it would have lost it silently."""

    async def script(disks: LinuxDisks) -> None:
        await disks.create("i1", LIMITS)
        _write(disks._held["i1"].folder_fd, "upper/note", b"lost")
        disks._let_go("i1")
        with pytest.raises(OSError, match="cleanly"):
            await disks.keep("i1", "s1", within_s=WITHIN_S)
        assert disks.list_images() == set()

    play(tmp_path, script)


@pytest.mark.root
def test_a_disk_left_frozen_by_a_killed_daemon_is_thawed_by_the_next(tmp_path: Path) -> None:
    async def script(disks: LinuxDisks) -> None:
        import fcntl

        from penstock.node.linux.images import _FIFREEZE

        await disks.create("i1", LIMITS)
        fcntl.ioctl(disks._held["i1"].folder_fd, _FIFREEZE, 0)
        with ThreadPoolExecutor(2) as threads:
            successor = LinuxDisks(folder=str(tmp_path), threads=threads)
            await successor.retake()
            _write(successor._held["i1"].folder_fd, "upper/note", b"goes on")  # would wait for ever
            successor._let_go("i1")

    play(tmp_path, script)


@pytest.mark.root
def test_what_root_made_of_our_mount_points_is_moved_aside(tmp_path: Path) -> None:
    async def script(disks: LinuxDisks) -> None:
        await disks.create("i1", LIMITS)
        fd = disks._held["i1"].folder_fd
        os.rename("upper/etc", "upper/elsewhere", src_dir_fd=fd, dst_dir_fd=fd)
        os.symlink("/", "upper/etc", dir_fd=fd)
        os.makedirs(f"/proc/self/fd/{fd}/work/work/incompat/volatile")
        await disks.keep("i1", "s1", within_s=WITHIN_S)
        await disks.create("i2", LIMITS, image="s1")
        fd = disks._held["i2"].folder_fd
        assert stat.S_ISDIR(os.stat("upper/etc", dir_fd=fd, follow_symlinks=False).st_mode)
        assert os.listdir(f"/proc/self/fd/{fd}/work") == []

    play(tmp_path, script)

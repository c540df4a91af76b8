"""Disks: limits that hold, images that go, and a release that waits for nobody's dirty pages."""

from __future__ import annotations

import asyncio
import errno
import os
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from penstock.core.deadlines import DeadlinePassed
from penstock.model.sandbox import Limits
from penstock.node.linux import loops
from penstock.node.linux.disks import LinuxDisks
from penstock.node.ports import Disk

pytestmark = pytest.mark.root
MIB = 1 << 20
LIMITS = Limits(disk_bytes_max=64 * MIB, disk_inodes_max=1_024)


@pytest.fixture
async def disks(tmp_path: Path) -> AsyncIterator[LinuxDisks]:
    threads = ThreadPoolExecutor(4)
    made = LinuxDisks(folder=str(tmp_path), threads=threads)
    try:
        yield made
    finally:
        for name in made.list_names():
            await made.remove(name, within_s=10)
        assert backed(tmp_path) == []
        await made.close()
        threads.shutdown()


def backed(folder: Path) -> list[str]:
    """Images of `folder` that any loop device of the host holds."""
    found = (loops.backing(number) for number in loops.numbers())
    return [path for path in found if path is not None and path.startswith(str(folder))]


def upper(disk: Disk) -> int:
    return os.open("upper", os.O_RDONLY | os.O_DIRECTORY, dir_fd=disk.mount_fd)


def fill(folder: int, name: str, most: int) -> tuple[int, int]:
    """Write until the disk refuses: (bytes, errno)."""
    fd = os.open(name, os.O_WRONLY | os.O_CREAT, dir_fd=folder)
    written = 0
    try:
        while written < most:
            written += os.write(fd, bytes(256 * 1024))
    except OSError as error:
        return written, error.errno
    finally:
        os.close(fd)
    return written, 0


async def test_it_holds_as_many_bytes_as_its_limit_and_no_more(disks: LinuxDisks) -> None:
    disk = await disks.create("a", LIMITS)
    folder = upper(disk)
    written, number = await asyncio.to_thread(fill, folder, "big", 80 * MIB)
    os.close(folder)
    assert number == errno.ENOSPC
    assert 64 * MIB - 256 * 1024 <= written <= 65 * MIB


async def test_it_holds_as_many_files_as_its_limit_and_no_more(disks: LinuxDisks) -> None:
    disk = await disks.create("a", LIMITS)
    folder = upper(disk)
    made = 0
    with pytest.raises(OSError) as refused:
        while made < 2_000:
            os.close(os.open(f"f{made}", os.O_WRONLY | os.O_CREAT, dir_fd=folder))
            made += 1
    os.close(folder)
    assert refused.value.errno == errno.ENOSPC
    assert 1_024 <= made <= 1_024 * 1.1


async def test_a_fresh_one_has_canonical_owners_and_the_mount_points_of_a_root(disks: LinuxDisks) -> None:
    disk = await disks.create("a", LIMITS)
    folder = upper(disk)
    assert sorted(os.listdir(folder)) == ["dev", "etc", "proc", "run", "sys"]
    for name in (".", *os.listdir(folder)):
        info = os.stat(name, dir_fd=folder)
        assert (info.st_uid, info.st_gid, info.st_mode & 0o7777) == (0, 0, 0o755)
    os.close(folder)
    assert disks.used_bytes("a") < MIB


async def test_removing_leaves_no_image_and_no_loop_device(disks: LinuxDisks, tmp_path: Path) -> None:
    await disks.create("a", LIMITS)
    assert (disks.list_names(), backed(tmp_path)) == ({"a"}, [str(tmp_path / "a.img")])
    await disks.remove("a", within_s=5)
    assert (disks.list_names(), backed(tmp_path)) == (set(), [])
    await disks.remove("a", within_s=5)  # absent is success


async def test_more_at_once_than_the_kernel_has_loop_devices(disks: LinuxDisks, tmp_path: Path) -> None:
    made = [disks.create(f"d{number}", LIMITS) for number in range(24)]
    for each in [asyncio.ensure_future(each) for each in made]:
        await each
    assert len(set(backed(tmp_path))) == 24


async def test_a_name_is_not_given_twice(disks: LinuxDisks) -> None:
    await disks.create("a", LIMITS)
    with pytest.raises(FileExistsError):
        await disks.create("a", LIMITS)
    assert disks.list_names() == {"a"}


async def test_a_cancelled_create_is_finished_and_listed(disks: LinuxDisks, tmp_path: Path) -> None:
    making = asyncio.ensure_future(disks.create("a", LIMITS))
    await asyncio.sleep(0)
    making.cancel()
    with pytest.raises(asyncio.CancelledError):
        await making
    assert disks.list_names() == {"a"}
    await disks.remove("a", within_s=5)
    assert backed(tmp_path) == []


async def test_a_failed_create_leaves_nothing(
    disks: LinuxDisks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(number: int) -> int:
        raise OSError(errno.EIO, "made to fail")

    await disks.create("warm", LIMITS)
    monkeypatch.setattr("penstock.node.linux.blanks.mount", refuse)
    with pytest.raises(OSError, match="made to fail"):
        await disks.create("a", LIMITS)
    assert (disks.list_names(), backed(tmp_path)) == ({"warm"}, [str(tmp_path / "warm.img")])


async def test_one_in_use_stays_listed_until_its_user_has_gone(disks: LinuxDisks, tmp_path: Path) -> None:
    disk = await disks.create("a", LIMITS)
    user = os.open("upper", os.O_RDONLY, dir_fd=disk.mount_fd)
    with pytest.raises(DeadlinePassed, match="disk a"):
        await disks.remove("a", within_s=0.1)
    assert (disks.list_names(), backed(tmp_path)) == ({"a"}, [str(tmp_path / "a.img")])
    os.close(user)
    await disks.remove("a", within_s=5)
    assert backed(tmp_path) == []


async def test_a_restarted_node_takes_living_disks_in_hand_again(tmp_path: Path, disks: LinuxDisks) -> None:
    disk = await disks.create("a", LIMITS)
    used_by_a_sandbox = upper(disk)
    threads = ThreadPoolExecutor(1)
    later = LinuxDisks(folder=str(tmp_path), threads=threads)
    await later.retake()
    assert later.list_names() == {"a"}
    for fd in (disks._held["a"].folder_fd, disks._held.pop("a").mount_fd):
        os.close(fd)  # the first daemon has died
    os.close(used_by_a_sandbox)
    assert backed(tmp_path) == [str(tmp_path / "a.img")]
    await later.remove("a", within_s=5)
    assert backed(tmp_path) == []
    threads.shutdown()


async def test_release_waits_neither_for_its_own_dirty_pages_nor_for_a_neighbours(disks: LinuxDisks) -> None:
    size = Limits(disk_bytes_max=400 * MIB, disk_inodes_max=1_024)
    mine, other = await disks.create("mine", size), await disks.create("other", size)
    folders = upper(mine), upper(other)
    await asyncio.to_thread(fill, folders[0], "dirty", 200 * MIB)
    neighbour = asyncio.ensure_future(asyncio.to_thread(fill, folders[1], "dirty", 350 * MIB))
    await asyncio.sleep(0.05)
    os.close(folders[0])
    before = time.monotonic()
    await disks.remove("mine", within_s=5)
    took_s = time.monotonic() - before
    await neighbour
    os.close(folders[1])
    # Not a measurement: writing 200 MiB out takes this kind of machine longer than that.
    assert took_s < 2

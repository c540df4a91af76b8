"""Adapter of the port `Disks`: one ext4 image per sandbox, by loop device, mounted but attached nowhere.

This is how bytes and inodes are limited: kernels without project quota have nothing else that is not memory.

The adapter keeps a descriptor of each file system until `remove`. So the end of a sandbox's mount namespace unmounts
nothing by itself, where the kernel would write the disk's dirty pages out (for hundreds of MiB, seconds) while
everybody waits; `remove` first tells ext4 to shut down, which makes it drop them. After a restart `retake` gets those
descriptors again; without it everything is still right, only slower in that case.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import struct
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Final, TypeVar

import msgspec

from penstock.core.deadlines import within
from penstock.core.settle import settle
from penstock.model.sandbox import Limits
from penstock.node.linux import blanks, loops
from penstock.node.linux.blanks import Blanks
from penstock.node.linux.images import Images, make_fit, thaw
from penstock.node.ports import Disk

T = TypeVar("T")

_SUFFIX: Final = ".img"
_BLANKS: Final = ".blank"
_IMAGES: Final = ".kept"
_EXT4_IOC_SHUTDOWN: Final = 0x8004_587D  # _IOR('X', 125, __u32)
_SHUTDOWN_NO_FLUSH: Final = struct.pack("=I", 2)
_CREATE_S: Final = 60.0  # 2 ms; the first of a size formats its blank
_PAUSE_FIRST_S: Final = 0.001
_PAUSE_MAX_S: Final = 0.05


class _Held(msgspec.Struct, frozen=True):
    mount_fd: int
    folder_fd: int  # the file system's root, open for reading: what ioctl needs
    loop: int


class LinuxDisks:
    """Images in `folder`; blocking calls run on `threads`. All methods belong to one event loop."""

    def __init__(self, *, folder: str, threads: Executor) -> None:
        self._folder = os.path.realpath(folder)
        self._threads = threads
        self._blanks = Blanks(f"{self._folder}/{_BLANKS}")
        self._images = Images(f"{self._folder}/{_IMAGES}")
        self._held: dict[str, _Held] = {}
        self._loops_before = frozenset(loops.numbers())
        self._loops_used: set[int] = set()

    async def create(self, name: str, limits: Limits, *, image: str | None = None) -> Disk:
        """A disk `name` that holds `disk_bytes_max` bytes and `disk_inodes_max` files. About 2 ms when empty.

        With `image` it has that one's contents and size. Raises FileExistsError, FileNotFoundError, or OSError with
        nothing left. If cancelled, it is made all the same, and listed.
        """
        making = self._in_thread(lambda: self._create(name, limits, image))
        held = await settle(making, within_s=_CREATE_S, what=f"disk {name}")
        return Disk(name=name, path=self._path(name), mount_fd=held.mount_fd)

    async def retake(self) -> None:
        """Take the file systems of living disks in hand again, after a restart. Call once, before anything else."""
        await settle(self._in_thread(self._retake), within_s=_CREATE_S, what="taking disks in hand again")

    async def remove(self, name: str, *, within_s: float) -> None:
        """Drop what is unwritten, verify that no loop device holds the image, and unlink it. Absent is success.

        Raises DeadlinePassed while something still uses the disk (a sandbox that lives): the image stays listed.
        """
        async with within(within_s, f"release of disk {name}"):
            await self._until_unused(name, await self._in_thread(lambda: self._let_go(name)))
            await self._in_thread(lambda: _unlink(self._path(name)))

    async def keep(self, name: str, image: str, *, within_s: float) -> int:
        """Unmount the disk, everything written, verify that it is whole, and give it `image` as its second name."""
        kept = await self._in_thread(lambda: self._images.used_bytes(image))
        if kept is not None:
            return kept
        async with within(within_s, f"unmount of disk {name}"):
            await self._until_unused(name, await self._in_thread(lambda: self._let_go(name, drop=False)))
        adopting = self._in_thread(lambda: self._images.adopt(self._path(name), image))
        return await settle(adopting, within_s=_CREATE_S, what=f"image {image}")

    async def copy(self, name: str, image: str, *, within_s: float) -> int:
        """Freeze the disk's file system, which writes everything out, copy the image, thaw."""
        held = self._held.get(name)
        if held is None:
            raise FileNotFoundError(errno.ENOENT, "No such disk is mounted", name)
        copying = self._in_thread(lambda: self._images.copy(self._path(name), held.folder_fd, image))
        return await settle(copying, within_s=within_s, what=f"copy of disk {name}")

    def list_images(self) -> set[str]:
        return self._images.names()

    def remove_image(self, image: str) -> None:
        self._images.remove(image)

    async def _until_unused(self, name: str, number: int | None) -> None:
        """Until no loop device is backed by the disk. The caller bounds it.

        The device is free when the last user's exit has been worked off, of which nothing tells: sysfs raises no event.
        When we were that user, as usual, it is free already and nobody sleeps here.
        """
        pause_s = _PAUSE_FIRST_S
        while number is not None and await self._in_thread(lambda: loops.backing(number)) == self._path(name):
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, _PAUSE_MAX_S)

    def list_names(self) -> set[str]:
        try:
            entries = os.listdir(self._folder)
        except FileNotFoundError:
            return set()  # somebody removed the folder: no image is in it
        return {entry[: -len(_SUFFIX)] for entry in entries if entry.endswith(_SUFFIX)}

    def used_bytes(self, name: str) -> int:
        """What the image takes on the host's disk. Raises FileNotFoundError."""
        return os.stat(self._path(name)).st_blocks * 512

    async def close(self) -> None:
        """Remove the loop devices that exist because of us and are idle. Disks in use are left alone."""
        ours = self._loops_used - self._loops_before
        removing = [self._in_thread(lambda number=number: loops.discard(number)) for number in ours]  # type: ignore[misc]
        for each in removing:
            await each

    def _path(self, name: str) -> str:
        assert name and "/" not in name and not name.startswith("."), f"not a disk name: {name!r}"
        return f"{self._folder}/{name}{_SUFFIX}"

    def _create(self, name: str, limits: Limits, kept: str | None) -> _Held:
        path = self._path(name)
        if kept is not None:
            image = self._images.clone(kept, path)
        else:
            image = self._blanks.clone(path, bytes_max=limits.disk_bytes_max, inodes_max=limits.disk_inodes_max)
        try:
            number, device = loops.attach(image)
            try:
                held = _hold(number)
            finally:
                os.close(device)
        except BaseException:
            os.unlink(path)
            raise
        finally:
            os.close(image)
        self._loops_used.add(number)
        self._held[name] = held
        if kept is not None:
            make_fit(held.folder_fd)
        return held

    def _retake(self) -> None:
        names = {self._path(name): name for name in self.list_names()}
        for number in loops.numbers():
            name = names.get(loops.backing(number) or "")
            if name is not None and name not in self._held:
                held = self._held[name] = _hold(number)
                thaw(held.folder_fd)  # a daemon that was killed while it copied left it frozen

    def _let_go(self, name: str, *, drop: bool = True) -> int | None:
        """Close our descriptors. Returns the device to watch, None when there is none.

        `drop`: what is not written out never will be. Otherwise all of it is, and the unmount marks the disk clean.
        """
        held = self._held.pop(name, None)
        if held is None:
            return loops.find(self._path(name))
        try:
            if drop:
                fcntl.ioctl(held.folder_fd, _EXT4_IOC_SHUTDOWN, _SHUTDOWN_NO_FLUSH)
        except OSError as error:
            if error.errno != errno.EIO:  # it was shut down before
                raise
        finally:
            os.close(held.folder_fd)
            os.close(held.mount_fd)
        return held.loop

    def _in_thread(self, work: Callable[[], T]) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self._threads, work)


def _hold(number: int) -> _Held:
    mount_fd = blanks.mount(number)
    try:
        folder_fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=mount_fd)
    except BaseException:
        os.close(mount_fd)
        raise
    return _Held(mount_fd, folder_fd, number)


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass

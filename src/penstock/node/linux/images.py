"""What is kept of a disk: images, hard links or sparse copies of the disks' own, immutable once they have a name.

A disk is kept by unmounting it and giving its file a second name: nothing is copied, and the kernel's own unmount says
whether it is whole (the superblock is marked clean by nothing else). A disk in use is copied while its file system is
frozen (FIFREEZE), which writes out everything first.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
from typing import Final

from penstock.node.linux import blanks, rootfs

_FIFREEZE: Final = 0xC004_5877  # _IOWR('X', 119, int)
_FITHAW: Final = 0xC004_5878
_SUPERBLOCK: Final = 1024
_S_MAGIC: Final = 0x38  # offsets in struct ext4_super_block
_S_STATE: Final = 0x3A
_MAGIC: Final = 0xEF53
_CLEAN: Final = 1
_SUFFIX: Final = ".img"


class Images:
    """Images in `folder`. Blocks; thread-safe for different names."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def path(self, image: str) -> str:
        assert image and "/" not in image and not image.startswith("."), f"not an image name: {image!r}"
        return f"{self._folder}/{image}{_SUFFIX}"

    def names(self) -> set[str]:
        try:
            return {entry[: -len(_SUFFIX)] for entry in os.listdir(self._folder) if entry.endswith(_SUFFIX)}
        except FileNotFoundError:
            return set()

    def used_bytes(self, image: str) -> int | None:
        """None when there is no such image."""
        try:
            return os.stat(self.path(image)).st_blocks * 512
        except FileNotFoundError:
            return None

    def adopt(self, disk: str, image: str) -> int:
        """Give the unmounted disk at path `disk` its second name. Raises OSError (EIO) when it is not whole."""
        fd = os.open(disk, os.O_RDWR | os.O_CLOEXEC)
        try:
            _require_clean(fd, disk)
            os.fsync(fd)
            self._make_folder()
            os.link(disk, self.path(image))
            self._sync_folder()
            return os.fstat(fd).st_blocks * 512
        finally:
            os.close(fd)

    def copy(self, disk: str, folder_fd: int, image: str) -> int:
        """Copy the disk at path `disk`, whose root is open as `folder_fd`, as it is at one moment."""
        self._make_folder()
        path = self.path(image)
        if os.path.exists(path):
            raise FileExistsError(errno.EEXIST, "File exists", path)
        part = f"{self._folder}/.{image}.part"
        source = os.open(disk, os.O_RDONLY | os.O_CLOEXEC)
        try:
            target = os.open(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                fcntl.ioctl(folder_fd, _FIFREEZE, 0)
                try:
                    blanks.copy_data(source, target)
                finally:
                    thaw(folder_fd)
                os.fsync(target)
                used = os.fstat(target).st_blocks * 512
            finally:
                os.close(target)
            os.rename(part, path)
            self._sync_folder()
            return used
        except BaseException:
            _unlink(part)
            raise
        finally:
            os.close(source)

    def clone(self, image: str, disk: str) -> int:
        """A writable copy at path `disk`, which must not exist; its descriptor is the caller's."""
        source = os.open(self.path(image), os.O_RDONLY | os.O_CLOEXEC)
        try:
            target = os.open(disk, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                blanks.copy_data(source, target)
            except BaseException:
                os.close(target)
                _unlink(disk)
                raise
            return target
        finally:
            os.close(source)

    def remove(self, image: str) -> None:
        _unlink(self.path(image))

    def _make_folder(self) -> None:
        os.makedirs(self._folder, mode=0o700, exist_ok=True)

    def _sync_folder(self) -> None:
        fd = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def thaw(folder_fd: int) -> None:
    """Undo a freeze, also one that a daemon left behind when it was killed. Not frozen is success."""
    try:
        fcntl.ioctl(folder_fd, _FITHAW, 0)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise


def make_fit(folder_fd: int) -> None:
    """Make a cloned disk fit to be an upper again.

    The overlay's work directory says that the last mount was volatile, and a mount refuses that: here it is true that
    everything was written out, so the word is taken away. What the sandbox's root put where we mount is moved aside.
    """
    shutil.rmtree("work", dir_fd=folder_fd)
    os.mkdir("work", 0o755, dir_fd=folder_fd)
    upper = os.open("upper", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder_fd)
    try:
        for name in rootfs.TOP_LEVEL:
            try:
                mode = os.stat(name, dir_fd=upper, follow_symlinks=False).st_mode
            except FileNotFoundError:
                mode = None
            if mode is not None and not stat.S_ISDIR(mode):
                os.rename(name, f"{name}.was", src_dir_fd=upper, dst_dir_fd=upper)
                mode = None
            if mode is None:
                os.mkdir(name, 0o755, dir_fd=upper)
    finally:
        os.close(upper)


def _require_clean(fd: int, path: str) -> None:
    head = os.pread(fd, 64, _SUPERBLOCK)
    magic = int.from_bytes(head[_S_MAGIC : _S_MAGIC + 2], "little")
    state = int.from_bytes(head[_S_STATE : _S_STATE + 2], "little")
    if magic != _MAGIC or state != _CLEAN:
        raise OSError(errno.EIO, f"its file system was not unmounted cleanly (magic {magic:#x}, state {state})", path)


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass

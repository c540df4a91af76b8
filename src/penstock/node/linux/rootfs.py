"""The root file system of a sandbox, assembled in the child that will be its pid 1.

Ids on disk are canonical: the disk and every layer are mounted through the sandbox's own user namespace, so root's
files are owned by 0 on disk whatever range the sandbox has, and a layer serves all ranges without a copy. Overlay
works on its upper with the credentials of whoever mounted it, and an idmapped upper refuses ids outside its map
(EOVERFLOW for the host's root): so the child mounts with the file system ids of the sandbox's root.

An image is not trusted: mount points of the top level are directories of the fresh upper, which hide whatever the
image has there, and are opened without following links.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Final

from penstock.node.linux import devices, mounts, syscalls
from penstock.node.linux.syscalls import MOUNT_ATTR_NODEV, MOUNT_ATTR_RDONLY

TOP_LEVEL: Final = ("dev", "etc", "proc", "run", "sys")  # made in every fresh upper
_RUN_INODES: Final = 65_536
_BOOT_ID: Final = "/proc/sys/kernel/random/boot_id"
_MIB: Final = 1 << 20


def act_as_owner(uid_base: int) -> None:
    """New files of this process belong to the sandbox's root from now on; its capabilities stay in effect."""
    _, permitted, inheritable = syscalls.capget()
    syscalls.set_fs_ids(uid_base, uid_base)
    syscalls.capset(permitted, permitted, inheritable)


def attach_disk(disk_fd: int, userns_fd: int) -> None:
    """Map the disk's ids and attach it where the overlay expects its upper."""
    syscalls.set_mount(disk_fd, MOUNT_ATTR_NODEV, userns_fd=userns_fd)
    syscalls.move_mount(disk_fd, mounts.UPPER)


def open_disk() -> int:
    """The disk itself, for the guest to sync: through the volatile overlay nothing can.

    A sandbox's user cannot get at the guest's descriptors; what he could reach by this one is his own anyway.
    """
    return os.open(mounts.UPPER, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def write_etc(files: Mapping[str, str]) -> None:
    """Put files of /etc into the upper, before there is an overlay: nothing of the image is in the way.

    On a disk that was kept an earlier life's files are, whatever its root made of them.
    """
    etc = os.open(f"{mounts.UPPER}/upper/etc", os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        for name, text in files.items():
            _clear(name, etc)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(name, flags, 0o644, dir_fd=etc)
            try:
                os.write(fd, text.encode())
            finally:
                os.close(fd)
    finally:
        os.close(etc)


def _clear(name: str, folder_fd: int) -> None:
    try:
        os.unlink(name, dir_fd=folder_fd)
    except FileNotFoundError:
        pass
    except IsADirectoryError:
        os.rename(name, f"{name}.was", src_dir_fd=folder_fd, dst_dir_fd=folder_fd)


def attach_layers(layer_fds: Sequence[int], userns_fd: int) -> None:
    """Map the layers' ids, make them read-only, and attach them below LOWER, topmost first."""
    for index, fd in enumerate(layer_fds):
        syscalls.set_mount(fd, MOUNT_ATTR_RDONLY | MOUNT_ATTR_NODEV, userns_fd=userns_fd)
        syscalls.move_mount(fd, f"{mounts.LOWER}/{index}")


def open_root() -> int:
    return os.open(mounts.NEW_ROOT, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def attach_run(root_fd: int, *, owner: int, size_bytes: int) -> None:
    mounts.attach(mounts.tmpfs(size_bytes, _RUN_INODES, 0o755, owner, MOUNT_ATTR_NODEV), root_fd, "run")


def attach_devices(dev_fd: int, root_fd: int, *, owner: int, memory_bytes: int) -> None:
    """/dev and /dev/shm; like everywhere, shared memory may take half of the sandbox's memory."""
    devices.attach(dev_fd, root_fd, owner=owner, shm_bytes=max(memory_bytes // 2, 16 * _MIB))


def mask(paths: Sequence[tuple[str, str]]) -> None:
    for path, cover in paths:
        mounts.bind_over(cover, mounts.NEW_ROOT + path)


def give_boot_id(boot_id: str) -> None:
    """Lay a file with `boot_id` over the host's. Nobody inside can change it: it has no name and is read-only.

    It lives on the sandbox's own /dev, so that it goes with it. (An O_TMPFILE cannot be bound: ENOENT.)
    """
    path = f"{mounts.NEW_ROOT}/dev/.boot_id"
    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o444)
    os.write(fd, boot_id.encode() + b"\n")
    os.close(fd)
    mounts.bind_over(path, mounts.NEW_ROOT + _BOOT_ID)
    os.unlink(path)

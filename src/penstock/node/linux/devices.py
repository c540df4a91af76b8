"""/dev of a sandbox: a small tmpfs with the seven nodes every program expects, a devpts and a /dev/shm of its own.

The nodes are made, not bound from the host: six mounts less per sandbox. They work because the tmpfs is mounted from
the initial user namespace; root inside cannot make more of them (no CAP_MKNOD there), nor mount a file system where
they would work. All ids in mount options are those of the initial user namespace.
"""

from __future__ import annotations

import os
from typing import Final

from penstock.node.linux import mounts, syscalls
from penstock.node.linux.syscalls import MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC, MOUNT_ATTR_NOSUID

_NODES: Final = (
    ("null", 0o666, 1, 3),
    ("zero", 0o666, 1, 5),
    ("full", 0o666, 1, 7),
    ("random", 0o666, 1, 8),
    ("urandom", 0o666, 1, 9),
    ("tty", 0o666, 5, 0),
)
_LINKS: Final = (
    ("ptmx", "pts/ptmx"),
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
)
_TTY_GROUP: Final = 5  # Debian's, Alpine's and Fedora's number for `tty`
_SIZE_BYTES: Final = 1 << 20
_INODES: Final = 1_024
PTYS_MAX: Final = 256  # the host has 4,096 in all, of which it keeps 1,024 to itself
_SHM_INODES: Final = 65_536


def make(owner: int) -> int:
    """A detached tmpfs with the nodes in it. Call before joining a device cgroup, which might refuse mknod.

    New files get the caller's file system ids: set them to `owner` first.
    """
    fd = mounts.tmpfs(_SIZE_BYTES, _INODES, 0o755, owner, MOUNT_ATTR_NOEXEC)
    before = os.umask(0)
    for name, mode, major, minor in _NODES:
        os.mknod(name, 0o020000 | mode, os.makedev(major, minor), dir_fd=fd)
    os.umask(before)
    for name, target in _LINKS:
        os.symlink(target, name, dir_fd=fd)
    os.mkdir("pts", 0o755, dir_fd=fd)
    os.mkdir("shm", 0o755, dir_fd=fd)
    return fd


def attach(fd: int, root_fd: int, *, owner: int, shm_bytes: int) -> None:
    """Attach what `make` made at dev, with its terminals and its shared memory. `fd` is closed."""
    mounts.attach(fd, root_fd, "dev")
    options: dict[str, str | None] = {
        "newinstance": None,
        "ptmxmode": "0666",
        "mode": "0620",
        "gid": str(owner + _TTY_GROUP),
        "max": str(PTYS_MAX),
    }
    terminals = syscalls.mount_detached("devpts", "devpts", options, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NOEXEC)
    dev_fd = os.open("dev", os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=root_fd)
    try:
        mounts.attach(terminals, dev_fd, "pts")
        mounts.attach(mounts.tmpfs(shm_bytes, _SHM_INODES, 0o1777, owner, MOUNT_ATTR_NODEV), dev_fd, "shm")
    finally:
        os.close(dev_fd)

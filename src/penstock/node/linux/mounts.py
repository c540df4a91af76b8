"""Detached mounts, and the bare root the zygote lives in.

A detached mount is a descriptor: made by one process, passed to another over a socket, attached by the third in its
own namespace. So the daemon, which sees the data folder, opens what a sandbox needs, and the zygote sees nothing.
"""

from __future__ import annotations

import os
from typing import Final

from penstock.node.linux import syscalls
from penstock.node.linux.syscalls import MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC, MOUNT_ATTR_NOSUID, MOUNT_ATTR_RDONLY

LAYERS_MAX: Final = 64  # mount points the bare root has; the kernel's own bound is 500

# Where the bare root keeps what a child needs on its way to its own root. Short: overlay options are one page.
UPPER: Final = "/u"
LOWER: Final = "/l"
NEW_ROOT: Final = "/r"
EMPTY_DIR: Final = "/e"
NULL_FILE: Final = "/n"

# Readable by everybody on a plain kernel, and about the host or its other sandboxes. What only the host's root may
# read needs no mask: root inside is not that one.
_MASKED: Final = (
    *("/proc/acpi", "/proc/asound", "/proc/bus", "/proc/scsi", "/proc/driver", "/proc/fs"),
    *("/proc/keys", "/proc/key-users", "/proc/interrupts", "/proc/timer_list", "/proc/sched_debug"),
    *("/proc/latency_stats", "/proc/sysrq-trigger", "/proc/kcore", "/proc/diskstats", "/proc/partitions"),
    *("/sys/firmware", "/sys/devices/virtual/block", "/sys/devices/virtual/powercap", "/sys/fs/ext4"),
)


def clone_tree(path: str) -> int:
    """A detached clone of the tree at the host directory `path`, without the mounts below it."""
    return syscalls.open_tree(path)


def tmpfs(size_bytes: int, inodes: int, mode: int, owner: int, attributes: int = 0) -> int:
    """A new detached tmpfs whose root belongs to `owner` (an id of the initial user namespace)."""
    options: dict[str, str | None] = {
        "size": str(size_bytes),
        "nr_inodes": str(inodes),
        "mode": f"{mode:o}",
        "uid": str(owner),
        "gid": str(owner),
    }
    return syscalls.mount_detached("tmpfs", "tmpfs", options, attributes | MOUNT_ATTR_NOSUID)


def attach(fd: int, root_fd: int, name: str) -> None:
    """Attach the detached mount `fd` on the directory `name` of `root_fd`, and close it. Never follows a link."""
    target = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=root_fd)
    try:
        syscalls.move_mount(fd, "", dir_fd=target)
    finally:
        os.close(target)
        os.close(fd)


def bind_over(source: str, target: str) -> None:
    """Lay a read-only view of `source` over the absolute `target`, which lies on a file system of the kernel's."""
    fd = syscalls.open_tree(source)
    try:
        syscalls.set_mount(fd, MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NOEXEC)
        syscalls.move_mount(fd, target)
    finally:
        os.close(fd)


def masked_paths() -> tuple[tuple[str, str], ...]:
    """(path, what to lay over it) for each path of _MASKED that this kernel has. Ask before entering the bare root."""
    return tuple((path, EMPTY_DIR if os.path.isdir(path) else NULL_FILE) for path in _MASKED if os.path.exists(path))


def enter_bare_root(stepping_stone: str) -> None:
    """Move the calling process into a mount namespace of its own with nothing of the host's in it.

    `stepping_stone` is any existing directory; it is only mounted over in the new namespace. Children made with
    CLONE_NEWNS inherit the mount points, so no launch spends time on making them, and a bug in a launch cannot reach
    a file of the host. After this no module can be imported any more.
    """
    syscalls.unshare(syscalls.CLONE_NEWNS)
    syscalls.mount("", "/", "", syscalls.MS_REC | syscalls.MS_PRIVATE)
    fd = tmpfs(1 << 20, 1_024, 0o755, 0)
    syscalls.move_mount(fd, stepping_stone)
    os.close(fd)
    os.chdir(stepping_stone)
    for path in ("proc", UPPER, LOWER, NEW_ROOT, EMPTY_DIR):
        os.mkdir(path.lstrip("/"))
    for index in range(LAYERS_MAX):
        os.mkdir(f"{LOWER.lstrip('/')}/{index}")
    os.mknod(NULL_FILE.lstrip("/"), 0o020444, os.makedev(1, 3))
    syscalls.mount("proc", "proc", "proc", syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC)
    leave_old_root(".")


def leave_old_root(new_root: str) -> None:
    """Make `new_root`, a mount point, the root of this mount namespace; nothing of the old one stays attached."""
    os.chdir(new_root)
    syscalls.pivot_root(".", ".")  # both at "/": the old one on top, until it is detached
    syscalls.umount(".", syscalls.MNT_DETACH)
    os.chdir("/")


def proc() -> int:
    """A /proc of the calling process's pid namespace, detached."""
    return syscalls.mount_detached("proc", "proc", {}, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC)


def sysfs() -> int:
    """A read-only /sys of the calling process's network namespace, detached."""
    attributes = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC
    return syscalls.mount_detached("sysfs", "sysfs", {}, attributes)


def overlay(layers: int, source: str) -> None:
    """Mount the overlay of UPPER over the first `layers` directories of LOWER at NEW_ROOT.

    `volatile`: no fsync of a sandbox reaches the disk, and unmounting does not sync the file system (0.1 ms against
    196 ms beside a neighbour's dirty pages). What must be durable is synced explicitly by whoever says so.
    """
    lower = ":".join(f"{LOWER}/{index}" for index in range(layers))
    options = f"lowerdir={lower},upperdir={UPPER}/upper,workdir={UPPER}/work,volatile,xino=off"
    syscalls.mount(source, NEW_ROOT, "overlay", syscalls.MS_NODEV, options)

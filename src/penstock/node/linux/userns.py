"""User namespaces: one per sandbox, with its own 65,536 ids and its own ceilings on what the kernel counts per user.

`create` is for a process that may fork: the zygote, a test. The daemon has threads and a big heap, so it asks the
zygote (`zygote.ZygoteClient.create_userns`, the same function behind a socket). Both return a descriptor, which is
all that keeps the namespace alive.

The namespace is made by a process whose effective uid is `uid_base`, because the kernel charges what happens inside
also to (parent namespace, owner). Made by root, all sandboxes together would share root's 128 inotify instances with
the host; made like this, each has 128 of its own.

Refused designs: a long-lived holder process per namespace (2 MiB each, and one more thing to leak); writing the
ceilings at launch (0.2 ms on the path instead of ahead of it).
"""

from __future__ import annotations

import errno
import os
from typing import Final

from penstock.node.linux import syscalls

IDS: Final = 65_536  # per sandbox; 0 inside is `uid_base` outside

# /proc/sys/user/max_* inside the namespace; names this kernel does not know are skipped. A sandbox makes no
# namespaces: each kind is reachable kernel code it does not need. seccomp says the same, this one holds without it.
CEILINGS: Final[dict[str, int]] = {
    "user_namespaces": 0,
    "mnt_namespaces": 0,
    "pid_namespaces": 0,
    "net_namespaces": 0,
    "uts_namespaces": 0,
    "ipc_namespaces": 0,
    "cgroup_namespaces": 0,
    "time_namespaces": 0,
    "inotify_instances": 128,
    "inotify_watches": 65_536,  # about 1 KiB of kernel memory each, charged to the sandbox
    "fanotify_groups": 16,
    "fanotify_marks": 8_192,
}


def create(uid_base: int) -> int:
    """Make a user namespace that maps 0..65535 to `uid_base`.. and return its descriptor. About 2 ms.

    Blocks. Forks: the child only makes system calls and never returns into the caller's code. Raises OSError.
    """
    assert uid_base >= IDS, "a range must not overlap the host's own users"
    ready_read, ready_write = os.pipe2(os.O_CLOEXEC)
    done_read, done_write = os.pipe2(os.O_CLOEXEC)
    try:
        child = os.fork()
        if child == 0:
            _be_the_owner(uid_base, ready_write, done_read, done_write)
        try:
            word = os.read(ready_read, 4)
            number = int.from_bytes(word, "little") if word else errno.ECHILD  # it was killed
            if number:
                raise OSError(number, f"user namespace could not be made: {os.strerror(number)}")
            return _map_ids(child, uid_base)
        finally:
            os.close(done_write)
            done_write = -1
            _reap(child)
    finally:
        for fd in (ready_read, ready_write, done_read, done_write):
            if fd >= 0:
                os.close(fd)


def _be_the_owner(uid_base: int, ready: int, done: int, done_write: int) -> None:
    """The child: becomes `uid_base`, makes the namespace, sets its ceilings, and stays until its fd was taken."""
    number = errno.EPROTO
    try:
        os.close(done_write)  # else our own copy would keep the pipe open for ever
        os.setresuid(-1, uid_base, -1)
        syscalls.unshare(syscalls.CLONE_NEWUSER)
        for name, value in CEILINGS.items():
            _set_ceiling(name, value)
        number = 0
    except OSError as error:
        number = error.errno or errno.EPROTO
    finally:
        os.write(ready, number.to_bytes(4, "little"))
        os.read(done, 1)
        os._exit(0)


def _set_ceiling(name: str, value: int) -> None:
    try:
        fd = os.open(f"/proc/sys/user/max_{name}", os.O_WRONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return  # an older kernel does not count it
    os.write(fd, str(value).encode())
    os.close(fd)


def _map_ids(child: int, uid_base: int) -> int:
    line = f"0 {uid_base} {IDS}".encode()
    for name in ("uid_map", "gid_map"):
        fd = os.open(f"/proc/{child}/{name}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, line)
        finally:
            os.close(fd)
    return os.open(f"/proc/{child}/ns/user", os.O_RDONLY | os.O_CLOEXEC)


def _reap(child: int) -> None:
    try:
        os.waitpid(child, 0)
    except ChildProcessError:
        pass  # SIGCHLD is ignored here: the kernel reaped it


def base_of(pid: int) -> int:
    """The outer id of root in the namespace of process `pid`; -1 when its map is none of ours. Raises OSError."""
    with open(f"/proc/{pid}/uid_map") as file:
        fields = file.readline().split()
    return int(fields[1]) if len(fields) == 3 and fields[0] == "0" else -1

"""The system calls Python 3.11 lacks, by ctypes: each raises OSError naming the call and its object.

Numbers from 424 on are the same on every architecture; what is older has a wrapper in every libc. Nothing here
allocates a descriptor without O_CLOEXEC.
"""

from __future__ import annotations

import ctypes
import os
import struct
from typing import Final

CLONE_NEWTIME: Final = 0x0000_0080
CLONE_PIDFD: Final = 0x0000_1000
CLONE_NEWNS: Final = 0x0002_0000
CLONE_NEWCGROUP: Final = 0x0200_0000
CLONE_NEWUTS: Final = 0x0400_0000
CLONE_NEWIPC: Final = 0x0800_0000
CLONE_NEWUSER: Final = 0x1000_0000
CLONE_NEWPID: Final = 0x2000_0000
CLONE_NEWNET: Final = 0x4000_0000
CLONE_INTO_CGROUP: Final = 0x2_0000_0000

MS_RDONLY: Final = 0x1
MS_NOSUID: Final = 0x2
MS_NODEV: Final = 0x4
MS_NOEXEC: Final = 0x8
MS_REC: Final = 0x4000
MS_PRIVATE: Final = 0x4_0000
MNT_DETACH: Final = 2

MOUNT_ATTR_RDONLY: Final = 0x1
MOUNT_ATTR_NOSUID: Final = 0x2
MOUNT_ATTR_NODEV: Final = 0x4
MOUNT_ATTR_NOEXEC: Final = 0x8
MOUNT_ATTR_NOATIME: Final = 0x10
MOUNT_ATTR_IDMAP: Final = 0x0010_0000

PR_SET_NAME: Final = 15
PR_SET_SECCOMP: Final = 22
PR_CAPBSET_DROP: Final = 24
SECCOMP_MODE_FILTER: Final = 2

_SYS_OPEN_TREE: Final = 428
_SYS_MOVE_MOUNT: Final = 429
_SYS_FSOPEN: Final = 430
_SYS_FSCONFIG: Final = 431
_SYS_FSMOUNT: Final = 432
_SYS_CLONE3: Final = 435
_SYS_MOUNT_SETATTR: Final = 442

_AT_FDCWD: Final = -100
_AT_EMPTY_PATH: Final = 0x1000
_AT_RECURSIVE: Final = 0x8000
_OPEN_TREE_CLONE: Final = 0x1
_FSOPEN_CLOEXEC: Final = 0x1
_FSMOUNT_CLOEXEC: Final = 0x1
_FSCONFIG_SET_FLAG: Final = 0
_FSCONFIG_SET_STRING: Final = 1
_FSCONFIG_CMD_CREATE: Final = 6
_MOVE_MOUNT_F_EMPTY_PATH: Final = 0x4
_MOVE_MOUNT_T_EMPTY_PATH: Final = 0x40
_SIGCHLD: Final = 17
_LINUX_CAPABILITY_VERSION_3: Final = 0x2008_0522

# PyDLL, not CDLL: the interpreter lock stays held, so that the child of `clone3` wakes up holding it. Nothing called
# through it blocks for longer than a mount does.
_libc: Final = ctypes.PyDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.mount.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p]
_libc.umount2.argtypes = [ctypes.c_char_p, ctypes.c_int]
_libc.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
# The same calls for the daemon's threads: these let other threads run meanwhile (a mount may wait for the disk).
_libc_waiting: Final = ctypes.CDLL(None, use_errno=True)
_libc_waiting.syscall.restype = ctypes.c_long


# Looked up now: the first time stores what was found, which in a child means copied pages.
for _name in (
    "unshare",
    "setns",
    "sethostname",
    "prctl",
    "setfsuid",
    "setfsgid",
    "capget",
    "capset",
    "umount2",
    "pivot_root",
):
    getattr(_libc, _name)
_before_fork: Final = ctypes.pythonapi.PyOS_BeforeFork
_after_fork_in_child: Final = ctypes.pythonapi.PyOS_AfterFork_Child
_after_fork_in_parent: Final = ctypes.pythonapi.PyOS_AfterFork_Parent


def _check(result: int, call: str, subject: str | None = None) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}", subject)
    return result


def _long(value: int) -> ctypes.c_long:
    return ctypes.c_long(value)


# -- processes and namespaces ------------------------------------------------------------------------------------------


def clone3(flags: int, *, cgroup_fd: int = -1) -> tuple[int, int]:
    """Fork with `flags`: (pid, pidfd) in the parent, (0, -1) in the child. `cgroup_fd` is a cgroup v2 directory.

    Only for a process with a single thread: other threads' locks would stay taken in the child for ever. Python's own
    fork handlers run (those registered); libc's do not, and its cached thread id stays the parent's, which only
    matters to code that signals itself by `raise()`.
    """
    pidfd = ctypes.c_int(-1)
    if cgroup_fd >= 0:
        flags |= CLONE_INTO_CGROUP
    arguments = struct.pack(
        "=11Q",
        *(flags | CLONE_PIDFD, ctypes.addressof(pidfd), 0, 0, _SIGCHLD, 0, 0, 0, 0, 0, max(cgroup_fd, 0)),
    )
    _before_fork()
    pid = _libc.syscall(_long(_SYS_CLONE3), arguments, _long(len(arguments)))
    number = ctypes.get_errno()
    if pid == 0:
        _after_fork_in_child()
        return 0, -1
    _after_fork_in_parent()
    if pid < 0:
        raise OSError(number, f"clone3: {os.strerror(number)}")
    return int(pid), pidfd.value


def unshare(flags: int) -> None:
    _check(_libc.unshare(flags), "unshare", hex(flags))


def setns(fd: int, kind: int) -> None:
    _check(_libc.setns(fd, kind), "setns", hex(kind))


def sethostname(name: str) -> None:
    raw = name.encode()
    _check(_libc.sethostname(raw, len(raw)), "sethostname", name)


def prctl(option: int, argument: int = 0, argument2: int = 0) -> int:
    return _check(_libc.prctl(option, argument, argument2, 0, 0), "prctl", str(option))


def set_name(name: bytes) -> None:
    """The short name of the calling process: its first 15 bytes."""
    buffer = ctypes.create_string_buffer(name[:15])
    prctl(PR_SET_NAME, ctypes.addressof(buffer))


def set_fs_ids(uid: int, gid: int) -> None:
    """The ids that new files get. Clears the effective file capabilities when `uid` is not 0: see `capset`."""
    _libc.setfsgid(gid)
    _libc.setfsuid(uid)
    # setfsuid never fails, it answers the old value: ask again to know.
    if _libc.setfsuid(uid) != uid or _libc.setfsgid(gid) != gid:
        raise OSError(1, "setfsuid refused", str(uid))


def capget() -> tuple[int, int, int]:
    """(effective, permitted, inheritable) of the calling thread, as bit masks."""
    header = struct.pack("=Ii", _LINUX_CAPABILITY_VERSION_3, 0)
    data = ctypes.create_string_buffer(24)
    _check(_libc.capget(header, data), "capget")
    low_e, low_p, low_i, high_e, high_p, high_i = struct.unpack("=6I", data.raw)
    return low_e | high_e << 32, low_p | high_p << 32, low_i | high_i << 32


def capset(effective: int, permitted: int, inheritable: int) -> None:
    header = struct.pack("=Ii", _LINUX_CAPABILITY_VERSION_3, 0)
    low = [mask & 0xFFFF_FFFF for mask in (effective, permitted, inheritable)]
    high = [mask >> 32 for mask in (effective, permitted, inheritable)]
    _check(_libc.capset(header, struct.pack("=6I", *low, *high)), "capset")


def install_seccomp(program: bytes) -> None:
    """Install a classic BPF filter of 8-byte instructions. Needs CAP_SYS_ADMIN in the user namespace."""
    code = ctypes.create_string_buffer(program, len(program))
    fprog = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(code)))
    _check(_libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(fprog), 0, 0), "seccomp")


# -- mounts ------------------------------------------------------------------------------------------------------------


def mount(source: str, target: str, kind: str, flags: int = 0, options: str = "") -> None:
    _check(_libc.mount(source.encode(), target.encode(), kind.encode(), flags, options.encode() or None), kind, target)


def umount(target: str, flags: int = 0) -> None:
    _check(_libc.umount2(target.encode(), flags), "umount", target)


def pivot_root(new: str, old: str) -> None:
    _check(_libc.pivot_root(new.encode(), old.encode()), "pivot_root", new)


def open_tree(path: str, *, dir_fd: int = _AT_FDCWD, recursive: bool = False) -> int:
    """A detached clone of the mount that `path` lies on, rooted at `path`. With `path` empty, at `dir_fd`."""
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC | (_AT_RECURSIVE if recursive else 0) | (0 if path else _AT_EMPTY_PATH)
    result = _libc_waiting.syscall(_long(_SYS_OPEN_TREE), _long(dir_fd), path.encode(), _long(flags))
    return int(_check(result, "open_tree", path))


def move_mount(fd: int, target: str, *, dir_fd: int = _AT_FDCWD) -> None:
    """Attach the detached mount `fd` at `target`; with `target` empty, on the directory `dir_fd` itself."""
    flags = _MOVE_MOUNT_F_EMPTY_PATH | (0 if target else _MOVE_MOUNT_T_EMPTY_PATH)
    numbers = (_long(_SYS_MOVE_MOUNT), _long(fd), b"", _long(dir_fd), target.encode(), _long(flags))
    _check(_libc.syscall(*numbers), "move_mount", target)


def set_mount(fd: int, attributes: int, *, userns_fd: int = -1) -> None:
    """Add `attributes` to the mount `fd`; with `userns_fd`, also map its ids (only while it is detached, only once)."""
    if userns_fd >= 0:
        attributes |= MOUNT_ATTR_IDMAP
    request = struct.pack("=QQQQ", attributes, 0, 0, max(userns_fd, 0))
    flags = _long(_AT_EMPTY_PATH)
    result = _libc.syscall(_long(_SYS_MOUNT_SETATTR), _long(fd), b"", flags, request, _long(len(request)))
    _check(result, "mount_setattr")


def mount_detached(kind: str, source: str, options: dict[str, str | None], attributes: int) -> int:
    """Mount a new file system attached nowhere, and return its descriptor. An option without a value is a flag.

    The kernel's own words about a refused option are part of the error.
    """
    context = _check(_libc_waiting.syscall(_long(_SYS_FSOPEN), kind.encode(), _long(_FSOPEN_CLOEXEC)), "fsopen", kind)
    try:
        _configure(context, _FSCONFIG_SET_STRING, "source", source)
        for key, value in options.items():
            _configure(context, _FSCONFIG_SET_FLAG if value is None else _FSCONFIG_SET_STRING, key, value)
        _configure(context, _FSCONFIG_CMD_CREATE, None, None)
        flags = _long(_FSMOUNT_CLOEXEC)
        result = _libc_waiting.syscall(_long(_SYS_FSMOUNT), _long(context), flags, _long(attributes))
        return int(_check(result, "fsmount", kind))
    finally:
        os.close(context)


def _configure(context: int, command: int, key: str | None, value: str | None) -> None:
    raw_key = None if key is None else key.encode()
    raw_value = None if value is None else value.encode()
    result = _libc_waiting.syscall(_long(_SYS_FSCONFIG), _long(context), _long(command), raw_key, raw_value, _long(0))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"fsconfig {key or 'create'}: {_last_words(context) or os.strerror(number)}", value)


def _last_words(context: int) -> str:
    try:
        return os.read(context, 512).decode(errors="replace").strip()
    except OSError:
        return ""

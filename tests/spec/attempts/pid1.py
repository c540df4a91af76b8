"""Getting into pid 1: its memory with the access token, its descriptors, its root."""

import ctypes
import os
import signal
import struct

from attempt import attempt, call, read, syscall, write

ATTACH, SEIZE, PEEK = 16, 0x4206, 2
pidfd = syscall("pidfd_open", 1, 0)
buffer = ctypes.create_string_buffer(64)
vector = struct.pack("=QQ", ctypes.addressof(buffer), 64)
remote = struct.pack("=QQ", 0x400000, 64)


def _nothing():
    raise OSError("empty")


for name in (
    "mem",
    "environ",
    "maps",
    "smaps",
    "auxv",
    "stack",
    "syscall",
    "pagemap",
    "io",
    "mountstats",
    "personality",
):
    attempt(f"read {name}", lambda name=name: read(f"/proc/1/{name}") or _nothing())
for name in ("fd", "fdinfo", "map_files", "ns"):
    attempt(f"list {name}", lambda name=name: os.listdir(f"/proc/1/{name}"))
for name in ("root", "cwd", "exe", "fd/0", "fd/3", "ns/mnt", "ns/user", "ns/pid", "ns/net"):
    attempt(f"link {name}", lambda name=name: os.readlink(f"/proc/1/{name}"))
    attempt(f"open {name}", lambda name=name: os.open(f"/proc/1/{name}", os.O_RDONLY))
attempt("read through root", lambda: read("/proc/1/root/etc/shadow"))
attempt("read through cwd", lambda: read("/proc/1/cwd/etc/shadow"))
for name in ("mem", "oom_score_adj", "oom_adj", "comm", "coredump_filter", "loginuid", "clear_refs", "autogroup",
             "uid_map", "attr/current", "timens_offsets", "sched"):  # fmt: skip
    attempt(f"write {name}", lambda name=name: write(f"/proc/1/{name}", "1"))
attempt("ptrace attach", lambda: syscall("ptrace", ATTACH, 1, 0, 0))
attempt("ptrace seize", lambda: syscall("ptrace", SEIZE, 1, 0, 0))
attempt("ptrace peek", lambda: syscall("ptrace", PEEK, 1, 0x400000, 0))
attempt("process_vm_readv", lambda: syscall("process_vm_readv", 1, vector, 1, remote, 1, 0))
attempt("process_vm_writev", lambda: syscall("process_vm_writev", 1, vector, 1, remote, 1, 0))
attempt("process_madvise", lambda: syscall("process_madvise", pidfd, remote, 1, 21, 0))
attempt("move_pages", lambda: syscall("move_pages", 1, 0, None, None, None, 0))
attempt("kcmp", lambda: syscall("kcmp", 1, os.getpid(), 0, 0, 0))
for number in range(8):
    attempt(f"pidfd_getfd {number}", lambda number=number: syscall("pidfd_getfd", pidfd, number, 0))
attempt("setns by pidfd", lambda: call("setns", pidfd, 0x20000 | 0x10000000))


def inherited():
    """Descriptors beyond 0, 1, 2 that we did not open; environment that looks like a secret."""
    own = {pidfd}
    found = [fd for fd in os.listdir("/proc/self/fd") if int(fd) > 2 and int(fd) not in own]
    links = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in found if os.path.exists(f"/proc/self/fd/{fd}")]
    if not links:
        raise OSError("nothing")
    return links


def secrets():
    found = [name for name in os.environ if any(word in name.upper() for word in ("TOKEN", "KEY", "SEED", "SECRET"))]
    if not found:
        raise OSError("nothing")
    return found


attempt("inherited descriptors", inherited)
attempt("secrets in the environment", secrets)
if os.getuid():
    for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGSTOP):
        attempt(f"kill {number.name}", lambda number=number: os.kill(1, number))
        attempt(
            f"pidfd_send_signal {number.name}", lambda number=number: syscall("pidfd_send_signal", pidfd, number, 0, 0)
        )

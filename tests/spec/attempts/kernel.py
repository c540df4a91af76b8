"""Parts of the kernel that a sandbox has no use for, and rights that only the host's root has."""

import ctypes
import os
import resource
import struct

from attempt import attempt, call, syscall

NAMESPACES = {"user": 0x10000000, "mnt": 0x20000, "pid": 0x20000000, "net": 0x40000000, "ipc": 0x8000000,
              "uts": 0x4000000, "cgroup": 0x2000000, "time": 0x80}  # fmt: skip


def cloned(flags):
    pid = syscall("clone", flags | 17, 0, 0, 0, 0)
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return pid


def cloned3(flags):
    pid = syscall("clone3", struct.pack("11Q", flags, 0, 0, 0, 17, 0, 0, 0, 0, 0, 0), 88)
    if pid == 0:
        os._exit(0)
    return pid


def unkillable():
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("-1000")


for name, flag in NAMESPACES.items():
    attempt(f"unshare {name}", lambda flag=flag: call("unshare", flag))
    if name != "time":  # in clone's flags that bit belongs to the exit signal
        attempt(f"clone {name}", lambda flag=flag: cloned(flag))
    attempt(f"clone3 {name}", lambda flag=flag: cloned3(flag))
    attempt(f"setns {name}", lambda name=name: call("setns", os.open(f"/proc/self/ns/{name}", os.O_RDONLY), 0))
attempt("unshare user and mnt at once", lambda: call("unshare", 0x10020000))


handle = struct.pack("=Ii", 8, 1) + bytes(8)
attempt("keyctl", lambda: syscall("keyctl", 0, -3, 1, 0, 0))
attempt("add_key", lambda: syscall("add_key", b"user", b"x", b"x", 1, -3))
attempt("bpf", lambda: syscall("bpf", 0, bytes(72), 72))
attempt("bpf program", lambda: syscall("bpf", 5, bytes(72), 72))
attempt("perf_event_open", lambda: syscall("perf_event_open", bytes(120), 0, -1, -1, 0))
attempt("userfaultfd", lambda: syscall("userfaultfd", 0))
attempt("userfaultfd in user mode only", lambda: syscall("userfaultfd", 1))
attempt("io_uring", lambda: syscall("io_uring_setup", 8, bytes(120)))
attempt("open_by_handle_at", lambda: syscall("open_by_handle_at", os.open("/", os.O_RDONLY), handle, 0))
attempt("kexec_load", lambda: syscall("kexec_load", 0, 0, 0, 0))
attempt("kexec_file_load", lambda: syscall("kexec_file_load", 0, 0, 0, b"", 0))
attempt("init_module", lambda: syscall("init_module", b"x", 1, b""))
attempt("finit_module", lambda: syscall("finit_module", 0, b"", 0))
attempt("delete_module", lambda: syscall("delete_module", b"overlay", 0))
attempt("swapon", lambda: syscall("swapon", b"/tmp/swap", 0))
attempt("reboot", lambda: call("reboot", 0x1234567))
attempt("ctrl-alt-del", lambda: call("reboot", 0x89ABCDEF - (1 << 32)))
attempt("settimeofday", lambda: call("settimeofday", struct.pack("=qq", 1, 0), None))
attempt("clock_settime", lambda: call("clock_settime", 0, struct.pack("=qq", 1, 0)))
attempt("adjtimex", lambda: call("adjtimex", struct.pack("=I", 1) + bytes(252)))
attempt("sethostname", lambda: call("sethostname", b"evil", 4))
attempt("setdomainname", lambda: call("setdomainname", b"evil", 4))
attempt("acct", lambda: call("acct", b"/tmp/acct"))
attempt("quotactl", lambda: syscall("quotactl", 0, 0, 0, 0))
attempt("kernel log", lambda: call("klogctl", 3, ctypes.create_string_buffer(64), 64))
attempt("vhangup", lambda: call("vhangup"))
attempt("more core", lambda: resource.setrlimit(resource.RLIMIT_CORE, (1 << 30, 1 << 30)))
attempt("more descriptors", lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (1 << 30, 1 << 30)))
attempt("less nice", lambda: os.setpriority(os.PRIO_PROCESS, 0, -10))
attempt("real time", lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10)))
attempt("out of the memory killer's sight", unkillable)
attempt("trusted attribute", lambda: os.setxattr("/tmp", "trusted.overlay.opaque", b"y"))

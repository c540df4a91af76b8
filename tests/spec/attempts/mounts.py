"""Changing what is mounted, and reaching the host by that."""

import os

from attempt import attempt, call, syscall

BIND, REMOUNT, MOVE, REC, PRIVATE = 4096, 32, 8192, 16384, 1 << 18

os.makedirs("/tmp/point", exist_ok=True)
attempt("tmpfs", lambda: call("mount", b"x", b"/tmp/point", b"tmpfs", 0, None))
attempt("proc", lambda: call("mount", b"x", b"/tmp/point", b"proc", 0, None))
attempt("sysfs", lambda: call("mount", b"x", b"/tmp/point", b"sysfs", 0, None))
attempt("devpts", lambda: call("mount", b"x", b"/tmp/point", b"devpts", 0, None))
attempt("cgroup v1", lambda: call("mount", b"x", b"/tmp/point", b"cgroup", 0, b"memory"))
attempt("cgroup v2", lambda: call("mount", b"x", b"/tmp/point", b"cgroup2", 0, None))
attempt("overlay", lambda: call("mount", b"x", b"/tmp/point", b"overlay", 0, b"lowerdir=/u:/l/0"))
attempt("ext4", lambda: call("mount", b"/dev/vda", b"/tmp/point", b"ext4", 0, None))
attempt("fuse", lambda: call("mount", b"x", b"/tmp/point", b"fuse", 0, b"fd=0,rootmode=40000,user_id=0,group_id=0"))
attempt("bind over proc", lambda: call("mount", b"/tmp", b"/proc", None, BIND, None))
attempt("bind over a mask", lambda: call("mount", b"/tmp", b"/sys/firmware", None, BIND, None))
attempt("bind of pid 1's root", lambda: call("mount", b"/proc/1/root", b"/tmp/point", None, BIND | REC, None))
attempt("remount of sys, writable", lambda: call("mount", b"x", b"/sys", None, REMOUNT | BIND, None))
attempt("remount of a mask, writable", lambda: call("mount", b"x", b"/proc/acpi", None, REMOUNT | BIND, None))
attempt("remount of the root with devices", lambda: call("mount", b"x", b"/", None, REMOUNT | BIND, None))
attempt("move", lambda: call("mount", b"/proc", b"/tmp/point", None, MOVE, None))
attempt("propagation", lambda: call("mount", b"x", b"/", None, REC | PRIVATE, None))
for path in ("/proc/acpi", "/proc/sys/kernel/random/boot_id", "/sys/firmware", "/proc", "/sys", "/dev", "/"):
    attempt(f"umount {path}", lambda path=path: call("umount2", path.encode(), 0))
    attempt(f"umount -l {path}", lambda path=path: call("umount2", path.encode(), 2))
attempt("pivot_root", lambda: syscall("pivot_root", b".", b"."))
attempt("open_tree", lambda: syscall("open_tree", -100, b"/", 1))
attempt("move_mount", lambda: syscall("move_mount", -100, b"/tmp", -100, b"/proc", 0))
attempt("fsopen", lambda: syscall("fsopen", b"tmpfs", 0))
attempt("fspick", lambda: syscall("fspick", -100, b"/", 0))
attempt("mount_setattr", lambda: syscall("mount_setattr", -100, b"/", 0, bytes(32), 32))

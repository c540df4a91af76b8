"""What `ps` shows of this process, on the host and inside.

A child of the zygote would show the zygote's command line, with the path of the host's data folder in it, and keep
its environment. The kernel reads both from the memory where exec put them, so that memory is overwritten.
`prctl(PR_SET_MM)` would be the polite way, but needs CAP_SYS_RESOURCE.
"""

from __future__ import annotations

import ctypes
import os

from penstock.node.linux import syscalls

_region: tuple[int, int] | None = None  # where exec put our arguments; found before /proc/self changes its owner


def prepare() -> None:
    """Find the memory of the arguments and wipe that of the environment. Once, in a process that needs neither."""
    global _region
    with open("/proc/self/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    start, end, environment, environment_end = (int(field) for field in fields[45:49])
    os.environ.clear()
    if environment:
        ctypes.memset(environment, 0, environment_end - environment)
    _region = (start, end - start) if start else None


def set_title(title: str) -> None:
    """Name this process `title`, as far as its original command line was that long."""
    raw = title.encode()
    syscalls.set_name(raw)
    if _region is not None:
        start, size = _region
        raw = raw[: size - 1]
        ctypes.memmove(start, raw + b"\0" * (size - len(raw)), size)

"""The v2 side of a sandbox's cgroups.

Where v2 carries the controllers, processes may only live in leaves:

    penstock-<installation>/sb-<id>         limits: the limit plus a reserve for the guest
    penstock-<installation>/sb-<id>/guest   pid 1
    penstock-<installation>/sb-<id>/user    the sandbox's processes; limits: the limit

Where v1 carries them (a hybrid host), one directory without children serves for kill, freeze and events.
Devices need no rule here: no process of a sandbox can make a node, as it owns no user namespace that a file system was
mounted in; filtering them as well would take a BPF program.
"""

from __future__ import annotations

import os
from typing import Final

from penstock.model.sandbox import Limits
from penstock.node.linux.absent import is_absent
from penstock.node.linux.cgroup_files import Tree, keyed, pid_list
from penstock.node.linux.cgroup_v1 import CPU_PERIOD_US, GUEST_RESERVE_BYTES, GUEST_RESERVE_PIDS, USER, quota_us

GUEST: Final = "guest"
CONTROLLERS: Final = ("cpu", "memory", "pids")
_WEIGHT_PER_CPU: Final = 100
_WEIGHT_MAX: Final = 10_000


class V2:
    """`controls`: this hierarchy carries the controllers (else v1 does)."""

    def __init__(self, tree: Tree, parent: str, *, controls: bool) -> None:
        self._tree, self._parent, self.controls = tree, parent, controls
        self.kills = False  # cgroup.kill is there (Linux 5.14)

    def prepare(self) -> None:
        """Make our directory. Present is success."""
        if self.controls:
            self._tree.write(_enable(), "cgroup.subtree_control")
        try:
            self._tree.make(self._parent)
        except FileExistsError:
            pass
        if self.controls:
            self._tree.write(_enable(), self._parent, "cgroup.subtree_control")
        self.kills = self._tree.exists(self._parent, "cgroup.kill")

    def create(self, leaf: str, limits: Limits) -> None:
        self._tree.make(self._parent, leaf)
        if not self.controls:
            return
        self._write("+memory +pids", leaf, "cgroup.subtree_control")
        for child in (GUEST, USER):
            self._tree.make(self._parent, leaf, child)
        for parts, memory, pids in (
            ((leaf,), limits.memory_bytes_max + GUEST_RESERVE_BYTES, limits.pids_max + GUEST_RESERVE_PIDS),
            ((leaf, USER), limits.memory_bytes_max, limits.pids_max),
        ):
            self._write(str(memory), *parts, "memory.max")
            self._tree.write_if_there("0", self._parent, *parts, "memory.swap.max")
            self._write("0", *parts, "memory.oom.group")
            self._write(str(pids), *parts, "pids.max")
        self._write(f"{quota_us(limits.cpu_milli)} {CPU_PERIOD_US}", leaf, "cpu.max")
        weight = max(1, min(limits.cpu_milli * _WEIGHT_PER_CPU // 1000, _WEIGHT_MAX))
        self._write(str(weight), leaf, "cpu.weight")

    def directory(self, leaf: str) -> int:
        """A descriptor of the directory pid 1 is born in (CLONE_INTO_CGROUP). The caller closes it."""
        parts = (leaf, GUEST) if self.controls else (leaf,)
        return self._tree.open(os.O_RDONLY | os.O_DIRECTORY, self._parent, *parts)

    def user_procs(self, leaf: str) -> list[int]:
        """Descriptors the guest's children write "0" to: none on a hybrid host. The caller closes them."""
        if not self.controls:
            return []
        return [self._tree.open(os.O_WRONLY, self._parent, leaf, USER, "cgroup.procs")]

    def names(self) -> set[str]:
        return self._tree.children(self._parent)

    def has(self, leaf: str) -> bool:
        return self._tree.exists(self._parent, leaf)

    def pids(self, leaf: str) -> set[int]:
        found = set(pid_list(self._tree.read(self._parent, leaf, "cgroup.procs")))
        for child in self._tree.children(self._parent, leaf):
            found.update(pid_list(self._tree.read(self._parent, leaf, child, "cgroup.procs")))
        return found

    def kill(self, leaf: str) -> None:
        """SIGKILL to every process below, now and atomically; a fork bomb cannot outrun it. Frozen ones die too."""
        self._write("1", leaf, "cgroup.kill")

    def freeze(self, leaf: str, frozen: bool) -> None:
        self._write("1" if frozen else "0", leaf, "cgroup.freeze")

    def open_events(self, leaf: str) -> int:
        return self._tree.open(os.O_RDONLY, self._parent, leaf, "cgroup.events")

    def remove(self, leaf: str) -> None:
        """Children first. Absent is success. Raises OSError with EBUSY while it is in use."""
        for child in self._tree.children(self._parent, leaf):
            self._tree.remove(self._parent, leaf, child)
        self._tree.remove(self._parent, leaf)

    def remove_parent(self) -> None:
        self._tree.remove(self._parent)

    def cpu_s(self, leaf: str) -> float:
        return keyed(self._tree.read(self._parent, leaf, "cpu.stat")).get("usage_usec", 0) / 1e6

    def memory(self, leaf: str) -> tuple[int, int, int, int] | None:
        """(bytes used, of them page cache, limit of the processes, times the kernel killed one), or None."""
        if not self.controls:
            return None
        used = int(self._tree.read(self._parent, leaf, "memory.current"))
        cache = keyed(self._tree.read(self._parent, leaf, "memory.stat")).get("file", 0)
        limit = self._tree.read(self._parent, leaf, USER, "memory.max").strip()
        kills = keyed(self._tree.read(self._parent, leaf, "memory.events")).get("oom_kill", 0)
        return used, cache, int(limit) if limit.isdecimal() else 0, kills

    def pids_current(self, leaf: str) -> int | None:
        return int(self._tree.read(self._parent, leaf, "pids.current")) if self.controls else None

    def _write(self, value: str, *parts: str) -> None:
        self._tree.write(value, self._parent, *parts)


def _enable() -> str:
    return " ".join(f"+{each}" for each in CONTROLLERS)


def event(text: str, name: str) -> int:
    """One value of cgroup.events; an absent one (an older kernel) is 0."""
    return keyed(text).get(name, 0)


def read_event(fd: int, name: str) -> int:
    """The value now. A removed cgroup has no events: 0."""
    try:
        return event(os.pread(fd, 4096, 0).decode(), name)
    except OSError as error:
        if is_absent(error):
            return 0
        raise

"""The v1 side of a sandbox's cgroups: one directory in each controller's hierarchy.

    <controller>/penstock-<installation>/sb-<id>        the guest; the ceiling is the limit plus a reserve
    <memory, pids>/penstock-<installation>/sb-<id>/user the sandbox's processes; the ceiling is the limit

so that what overflows is below `user`, and the guest is never the one the kernel kills. Devices are ruled once, in
the installation's own directory: children inherit. Processes are moved by `tasks`, never `cgroup.procs`: a lone thread
moving itself skips the kernel's global lock (0.2 ms for all hierarchies against 10-17 after an idle while, measured).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Final

from penstock.model.sandbox import Limits
from penstock.node.linux.absent import is_absent
from penstock.node.linux.cgroup_files import Tree, keyed, pid_list

USER: Final = "user"
GUEST_RESERVE_BYTES: Final = 32 * 1024 * 1024  # of memory, for the guest beside its processes
GUEST_RESERVE_PIDS: Final = 16
# Socket buffers are not memory to v1's main counter: 4,000 sockets of one sandbox held 4.6 GiB beside its limit of 1,
# which is all that tcp_mem and udp_mem allow to the whole host (measured). Their own counter is off until it is set.
SOCKET_SHARE: Final = 8  # one part in 8 of the memory limit, on top of it
CPU_PERIOD_US: Final = 100_000
CPU_QUOTA_US_MIN: Final = 1_000
_SHARES_PER_CPU: Final = 1_024
_WANTED: Final = ("memory", "cpu", "pids", "devices")
_WITH_USER: Final = ("memory", "pids")
# null, zero, full, random, urandom; tty, ptmx; pseudo terminals.
_DEVICES: Final = (
    "c 1:3 rwm",
    "c 1:5 rwm",
    "c 1:7 rwm",
    "c 1:8 rwm",
    "c 1:9 rwm",
    "c 5:0 rwm",
    "c 5:2 rwm",
    "c 136:* rwm",
)


def quota_us(cpu_milli: int) -> int:
    return max(cpu_milli * CPU_PERIOD_US // 1000, CPU_QUOTA_US_MIN)


class V1:
    """`hierarchies` maps a controller to the tree that carries it (two may share one). `parent` is our directory."""

    def __init__(self, hierarchies: Mapping[str, Tree], parent: str, *, freezer: bool) -> None:
        wanted = (*_WANTED, "cpuacct", "freezer") if freezer else _WANTED
        self._trees = {name: hierarchies[name] for name in wanted if name in hierarchies}
        self._parent = parent
        self._distinct = list({tree.root: tree for tree in self._trees.values()}.values())
        self.freezes = "freezer" in self._trees

    def prepare(self) -> None:
        """Make our directory in every hierarchy. Present is success."""
        for tree in self._distinct:
            try:
                tree.make(self._parent)
            except FileExistsError:
                pass
        if "memory" in self._trees and not self._trees["memory"].children(self._parent):
            self._trees["memory"].write_if_there("1", self._parent, "memory.use_hierarchy")
        devices = self._trees.get("devices")
        if devices is not None and devices.read(self._parent, "devices.list").startswith("a *:*"):
            devices.write("a", self._parent, "devices.deny")
            for each in _DEVICES:
                devices.write(each, self._parent, "devices.allow")

    def create(self, leaf: str, limits: Limits) -> None:
        for tree in self._distinct:
            tree.make(self._parent, leaf)
        for tree in {self._trees[name].root: self._trees[name] for name in _WITH_USER if name in self._trees}.values():
            tree.make(self._parent, leaf, USER)
        self._limit_memory(leaf, limits.memory_bytes_max)
        if "pids" in self._trees:
            self._write("pids", str(limits.pids_max + GUEST_RESERVE_PIDS), leaf, "pids.max")
            self._write("pids", str(limits.pids_max), leaf, USER, "pids.max")
        if "cpu" in self._trees:
            self._write("cpu", str(CPU_PERIOD_US), leaf, "cpu.cfs_period_us")
            self._write("cpu", str(quota_us(limits.cpu_milli)), leaf, "cpu.cfs_quota_us")
            self._write("cpu", str(max(limits.cpu_milli * _SHARES_PER_CPU // 1000, 2)), leaf, "cpu.shares")

    def tasks(self, leaf: str) -> list[int]:
        """Descriptors of the `tasks` files the sandbox's first process writes "0" to. The caller closes them."""
        return _open_all([(tree, (self._parent, leaf, "tasks")) for tree in self._distinct])

    def user_tasks(self, leaf: str) -> list[int]:
        """Descriptors of the `tasks` files the guest's children write "0" to. The caller closes them."""
        return _open_all([(tree, (self._parent, leaf, USER, "tasks")) for tree in self._with_user()])

    def guest_tasks(self, leaf: str) -> list[int]:
        """The guest's own in the same hierarchies, by which it comes back from a visit. The caller closes them."""
        return _open_all([(tree, (self._parent, leaf, "tasks")) for tree in self._with_user()])

    def _with_user(self) -> list[Tree]:
        return list({self._trees[name].root: self._trees[name] for name in _WITH_USER if name in self._trees}.values())

    def names(self) -> set[str]:
        return set().union(*(tree.children(self._parent) for tree in self._distinct))

    def has(self, leaf: str) -> bool:
        return any(tree.exists(self._parent, leaf) for tree in self._distinct)

    def pids(self, leaf: str) -> set[int]:
        """Of every process in any of its directories. Raises FileNotFoundError when it has none."""
        found: set[int] = set()
        absent = 0
        for tree in self._distinct:
            for parts in ((leaf,), (leaf, USER)):
                try:
                    found.update(pid_list(tree.read(self._parent, *parts, "cgroup.procs")))
                except OSError as error:
                    if not is_absent(error):
                        raise
                    absent += 1
        if absent == 2 * len(self._distinct):
            raise FileNotFoundError(2, "no such cgroup", leaf)
        return found

    def remove(self, leaf: str) -> None:
        """Children first. Absent is success. Raises OSError with EBUSY while it is in use."""
        for tree in self._distinct:
            for child in tree.children(self._parent, leaf):
                tree.remove(self._parent, leaf, child)
            tree.remove(self._parent, leaf)

    def remove_parent(self) -> None:
        for tree in self._distinct:
            tree.remove(self._parent)

    def freeze(self, leaf: str, frozen: bool) -> None:
        self._write("freezer", "FROZEN" if frozen else "THAWED", leaf, "freezer.state")

    def is_frozen(self, leaf: str) -> bool:
        return self._trees["freezer"].read(self._parent, leaf, "freezer.state").strip() == "FROZEN"

    def cpu_s(self, leaf: str) -> float | None:
        if "cpuacct" not in self._trees:
            return None
        return int(self._trees["cpuacct"].read(self._parent, leaf, "cpuacct.usage")) / 1e9

    def memory(self, leaf: str) -> tuple[int, int, int, int] | None:
        """(bytes used, of them page cache, limit of the processes, times the kernel killed one), or None."""
        tree = self._trees.get("memory")
        if tree is None:
            return None
        used = int(tree.read(self._parent, leaf, "memory.usage_in_bytes"))
        stat = keyed(tree.read(self._parent, leaf, "memory.stat"))
        limit = int(tree.read(self._parent, leaf, USER, "memory.limit_in_bytes"))
        kills = keyed(tree.read(self._parent, leaf, USER, "memory.oom_control")).get("oom_kill", 0)
        return used, stat.get("total_cache", 0), limit, kills

    def pids_current(self, leaf: str) -> int | None:
        tree = self._trees.get("pids")
        return None if tree is None else int(tree.read(self._parent, leaf, "pids.current"))

    def _limit_memory(self, leaf: str, bytes_max: int) -> None:
        if "memory" not in self._trees:
            return
        for parts, limit in (((leaf,), bytes_max + GUEST_RESERVE_BYTES), ((leaf, USER), bytes_max)):
            self._write("memory", str(limit), *parts, "memory.limit_in_bytes")
            # No swap beside it. Absent where the kernel does not account for swap.
            self._trees["memory"].write_if_there(str(limit), self._parent, *parts, "memory.memsw.limit_in_bytes")
            sockets = str(limit // SOCKET_SHARE)
            self._trees["memory"].write_if_there(sockets, self._parent, *parts, "memory.kmem.tcp.limit_in_bytes")

    def _write(self, controller: str, value: str, *parts: str) -> None:
        self._trees[controller].write(value, self._parent, *parts)


def _open_all(files: list[tuple[Tree, tuple[str, ...]]]) -> list[int]:
    opened: list[int] = []
    try:
        for tree, parts in files:
            opened.append(tree.open(os.O_WRONLY, *parts))
    except BaseException:
        for fd in opened:
            os.close(fd)
        raise
    return opened

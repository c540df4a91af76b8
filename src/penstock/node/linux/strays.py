"""Processes outside of every cgroup of ours that keep an object of ours alive: what cgroup listings can never show.

A namespace lives as long as one process is in it. Somebody who entered a sandbox from the host (`nsenter`) and stayed
pins its link, its ids or its disk after the sandbox has ended; only a walk through /proc finds him.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from penstock.node.linux import links, netns
from penstock.node.linux.claims import Claims
from penstock.node.linux.launcher import root_source
from penstock.node.linux.netlink import NETLINK_ROUTE, Netlink
from penstock.node.ports import Stray


class LinuxStrays:
    """Adapter of the port `Strays`. `router_path` is what pins the router."""

    def __init__(self, *, installation: str, router_path: str, claims: Claims | None = None) -> None:
        self._parent = f"/penstock-{installation}/".encode()
        self._installation, self._router_path = installation, router_path
        self._root_source = root_source(installation, "").encode()
        self._claims = claims or Claims()

    def list_strays(self) -> list[Stray]:
        """Blocks: some 20 µs a process of the host, more for each in namespaces of its own."""
        host = {kind: _identity("self", kind) for kind in ("net", "user", "mnt")}
        slots = self._slots_by_namespace()
        found = []
        for pid in _outsiders(self._parent):
            why = self._pins(pid, host, slots)
            if why:
                found.append(Stray(int(pid), why))
        return found

    def _pins(self, pid: str, host: dict[str, str], slots: dict[str, int]) -> str:
        network = _identity(pid, "net")
        if network != host["net"] and network in slots:
            return f"network namespace of slot {slots[network]}"
        if _identity(pid, "user") not in (host["user"], ""):
            slot = self._slot_of_ids(pid)
            if slot is not None:
                return f"user namespace of slot {slot}"
        if _identity(pid, "mnt") not in (host["mnt"], ""):
            for line in _read(pid, "mountinfo").splitlines():
                source = line.rpartition(b" - ")[2].split()[1:2]
                if source and source[0].startswith(self._root_source):
                    return f"mounts and disk of {source[0].decode().partition(':')[2]}"
        return ""

    def _slot_of_ids(self, pid: str) -> int | None:
        block = self._claims.block_of(self._installation)
        fields = _read(pid, "uid_map").split()
        if block is None or len(fields) < 2:
            return None
        number = (int(fields[1]) - block.uid_first) // 65_536
        return number if 0 <= number < block.count else None

    def _slots_by_namespace(self) -> dict[str, int]:
        """`net:[inode]` → slot, of every network namespace of the host that a link of our router leads into."""
        router = netns.open_kept(self._router_path)
        if router is None:
            return {}
        try:
            return netns.run_inside(router, _namespaces_behind_us)
        finally:
            os.close(router)


def _namespaces_behind_us() -> dict[str, int]:
    route = Netlink(NETLINK_ROUTE)
    try:
        slots = {link.peer_nsid: links.slot_of(link.name) for link in links.list_links(route) if link.peer_nsid >= 0}
        found: dict[str, int] = {}
        seen: set[str] = set()
        for pid in _pids():
            identity = _identity(pid, "net")
            if not identity or identity in seen:
                continue
            seen.add(identity)
            try:
                fd = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                continue  # it has ended
            try:
                slot = slots.get(links.namespace_id(route, fd))
            finally:
                os.close(fd)
            if slot is not None:
                found[identity] = slot
        return found
    finally:
        route.close()


def _outsiders(parent: bytes) -> Iterator[str]:
    for pid in _pids():
        if parent not in _read(pid, "cgroup"):
            yield pid


def _pids() -> Iterator[str]:
    return (name for name in os.listdir("/proc") if name.isdigit())


def _identity(pid: str, kind: str) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/{kind}")
    except OSError:
        return ""  # it has ended, or is a kernel thread


def _read(pid: str, name: str) -> bytes:
    try:
        with open(f"/proc/{pid}/{name}", "rb") as file:
            return file.read()
    except OSError:
        return b""

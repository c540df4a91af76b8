"""What an installation may leave behind that no listing of its ports shows: loop devices, mounts, pinned namespaces,
firewall elements, sockets and claims.

Everything here is known to be ours by something only we have: a backing file or a mount point in our folder, the source
of a sandbox's root mount, an address of our block in our router, a claim that names our folder.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Final

from penstock.core.deadlines import within
from penstock.node import ruleset
from penstock.node.linux import egress, links, loops, netns, syscalls
from penstock.node.linux.claims import Block, Claims, has_cgroups
from penstock.node.linux.launcher import root_source
from penstock.node.linux.nftables import NfTables
from penstock.node.ports import Remnant

_LOOP_CLR_FD: Final = 0x4C01
_SOCKETS: Final = frozenset({"zygote.sock", "feed.sock", "daemon.sock"})
_PAUSE_S: Final = 0.01


class LinuxRemnants:
    """Adapter of the port `Remnants` for the data folder `data`."""

    def __init__(self, *, installation: str, data: str, router_path: str, claims: Claims | None = None) -> None:
        self._installation, self._data = installation, os.path.realpath(data)
        self._router_path = os.path.realpath(router_path)
        self._root_source = root_source(installation, "")
        self._claims = claims or Claims()

    def list_remnants(self) -> list[Remnant]:
        return [*self._loops(), *self._mounts(), *self._elements(), *self._sockets(), *self._ids()]

    async def remove(self, remnant: Remnant, *, within_s: float) -> None:
        match remnant.kind:
            case "loop":
                await self._free_loop(int(remnant.name.removeprefix("loop")), within_s)
            case "mount" | "namespace":
                syscalls.umount(remnant.name)  # EBUSY when somebody is in it: then it is not dead
            case "element":
                self._in_router(lambda tables: self._withdraw(tables, remnant.name))
            case "socket":
                _unlink_unheard(remnant.name)
            case "ids":
                if not has_cgroups(remnant.name):
                    self._claims.release(remnant.name)

    def _loops(self) -> list[Remnant]:
        found = []
        for number in loops.numbers():
            file = loops.backing(number)
            if file is None or not file.startswith(f"{self._data}/disks/"):
                continue
            path = file.removesuffix(" (deleted)")
            name = os.path.basename(path)
            owner = name.removesuffix(".img") if os.path.dirname(path) == f"{self._data}/disks" else ""
            found.append(Remnant(kind="loop", name=f"loop{number}", owner=owner, why=f"backed by {file}"))
        return found

    def _mounts(self) -> list[Remnant]:
        found: list[Remnant] = []
        ours = {f"/dev/loop{each.name.removeprefix('loop')}": each for each in self._loops()}
        routers = 0
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            left, _, right = line.partition(" - ")
            point = left.split()[4].encode().decode("unicode_escape")
            kind, source = right.split()[:2]
            if point == self._router_path and kind == "nsfs":
                routers += 1
                if routers == 1:
                    continue
            if source.startswith(self._root_source):
                owner = source.removeprefix(self._root_source)
                found.append(Remnant(kind="mount", name=point, owner=owner, why=f"root of {owner}, on the host"))
            elif source in ours:
                found.append(Remnant(kind="mount", name=point, owner=ours[source].owner, why=ours[source].why))
            elif kind == "nsfs" and point.startswith(f"{self._data}/"):
                found.append(Remnant(kind="namespace", name=point, owner="", why=f"pins {left.split()[3]}"))
        return found

    def _elements(self) -> list[Remnant]:
        """Addresses of which the firewall holds rules, and which are no slot's (those are listed with the slots)."""
        block = self._claims.block_of(self._installation)
        found: list[Remnant] = []

        def read(tables: NfTables) -> None:
            slots = egress.present(tables)
            for address in egress.read_back(tables):
                if address not in slots:
                    found.append(
                        Remnant(
                            kind="element", name=address, owner=_owner(block, address), why="in the firewall's sets"
                        )
                    )

        self._in_router(read)
        return found

    def _withdraw(self, tables: NfTables, address: str) -> None:
        block = self._claims.block_of(self._installation)
        number = block.number_at(address) if block is not None else None
        held = egress.read_back(tables).get(address)
        if held is not None and address not in egress.present(tables):
            egress.withdraw(tables, links.link_name(number if number is not None else 0), address, held)

    def _in_router(self, work: Callable[[NfTables], None]) -> None:
        router = netns.open_kept(self._router_path)
        if router is None:
            return

        def run() -> None:
            tables = NfTables(ruleset.TABLE)
            try:
                work(tables)
            finally:
                tables.close()

        try:
            netns.run_inside(router, run)
        finally:
            os.close(router)

    def _sockets(self) -> list[Remnant]:
        found = []
        for entry in Path(self._data, "run").iterdir():
            if entry.name not in _SOCKETS and stat.S_ISSOCK(entry.lstat().st_mode):
                found.append(Remnant(kind="socket", name=str(entry), owner="", why="none of ours has this name"))
        return found

    def _ids(self) -> list[Remnant]:
        return [
            Remnant(
                kind="ids", name=other, owner="", why=f"a claim of slots, ids and addresses that names {self._data}"
            )
            for other in self._claims.installations_at(self._data)
            if other != self._installation
        ]

    async def _free_loop(self, number: int, within_s: float) -> None:
        """A device with users stays theirs: it lets go of its file when the last one does."""
        try:
            fd = os.open(f"/dev/loop{number}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENXIO):
                return
            raise
        try:
            fcntl.ioctl(fd, _LOOP_CLR_FD)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
        finally:
            os.close(fd)
        async with within(within_s, f"the end of loop{number}"):
            while (loops.backing(number) or "").startswith(self._data):  # noqa: ASYNC110
                await asyncio.sleep(_PAUSE_S)  # sysfs raises no event


def _owner(block: Block | None, address: str) -> str:
    number = block.number_at(address) if block is not None else None
    return "" if number is None else f"slot{number}"


def _unlink_unheard(path: str) -> None:
    """Unlink a socket that nobody listens on. Raises OSError with EBUSY when somebody does."""
    folder = os.open(os.path.dirname(path), os.O_PATH | os.O_CLOEXEC)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.connect(f"/proc/self/fd/{folder}/{os.path.basename(path)}")
        raise OSError(errno.EBUSY, "somebody listens on it", path)
    except (ConnectionRefusedError, FileNotFoundError):
        Path(path).unlink(missing_ok=True)
    finally:
        os.close(folder)

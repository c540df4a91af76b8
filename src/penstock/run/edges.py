"""The Linux adapters of one node, chosen and wired in one place, and the zygote beside them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import msgspec

from penstock.node.linux.at_rest import NetworkAtRest
from penstock.node.linux.cgroups import LinuxCgroups
from penstock.node.linux.disks import LinuxDisks
from penstock.node.linux.failpoint import Failpoint
from penstock.node.linux.files import LinuxFiles
from penstock.node.linux.guests import SocketGuests
from penstock.node.linux.launcher import ZygoteLauncher
from penstock.node.linux.network import LinuxNetwork
from penstock.node.linux.remnants import LinuxRemnants
from penstock.node.linux.strays import LinuxStrays
from penstock.node.linux.zygote_client import ZygoteClient
from penstock.node.ports import Ports
from penstock.node.ruleset import GATEWAY
from penstock.run import children
from penstock.run.datafolder import DataFolder
from penstock.run.settings import Settings

THREADS: Final = 8  # blocking system calls of launches and disks; two cores do not need more
ZYGOTE_TERM_S: Final = 2.0


class Edges:
    """`open` before use; `close(destroy=True)` also ends the zygote and removes what belongs to no sandbox."""

    def __init__(self, settings: Settings, folder: DataFolder) -> None:
        self._settings, self._folder = settings, folder
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="kernel")
        self._zygote: children.Child | None = None
        installation = folder.installation
        client = ZygoteClient(str(folder.zygote_socket))
        cgroups = LinuxCgroups(installation)
        disks = LinuxDisks(folder=str(folder.disks), threads=self._threads)
        self.ports = Ports(
            launcher=ZygoteLauncher(
                client=client,
                open_cgroups=cgroups.doors,
                threads=self._threads,
                nameserver=GATEWAY,
                rng=random.SystemRandom(),
                installation=installation,
            ),
            cgroups=cgroups,
            network=LinuxNetwork(
                installation=installation,
                data=str(folder.path),
                router_path=str(folder.router),
                make_userns=client.create_userns,
                slots=settings.slots_max,
                network=settings.network_cidr,
                uplink=settings.uplink,
                allow_private_egress=settings.allow_private_egress,
            ),
            disks=disks,
            files=LinuxFiles(
                records=str(folder.path / "records"),
                run=str(folder.run / "sb"),
                failpoint=Failpoint.of_environment(),
            ),
            guests=SocketGuests(),
            remnants=LinuxRemnants(installation=installation, data=str(folder.path), router_path=str(folder.router)),
            strays=LinuxStrays(installation=installation, router_path=str(folder.router)),
        )
        self._cgroups, self._disks = cgroups, disks

    async def open(self, say: Callable[[str], None]) -> None:
        """The zygote runs and our cgroups exist. An earlier daemon's is taken over, unless its sources are others."""
        self._zygote = self._folder.zygote()
        if self._zygote is not None and not self._folder.zygote_socket.exists():
            await asyncio.to_thread(children.end, self._zygote, term_s=ZYGOTE_TERM_S)  # nobody can reach it any more
            self._zygote = None
        if self._zygote is not None and self._zygote.stale:
            say(f"replacing the running zygote, pid {self._zygote.pid}: it is of another version; sandboxes run on")
            await asyncio.to_thread(children.end, self._zygote, term_s=ZYGOTE_TERM_S)
            self._zygote = None
        await self._disks.retake()  # those of running sandboxes: their ends need no write-out then
        await self._cgroups.open()
        if self._zygote is not None:
            say(f"taking over the running zygote, pid {self._zygote.pid}")
            return
        say("starting the zygote")
        await self._start_zygote()

    async def keep(self, log: Callable[[str], None]) -> None:
        """Until cancelled: a zygote that dies is replaced; running sandboxes do not notice."""
        assert self._zygote is not None
        await children.keep(self._zygote, self._start_zygote, log=log)

    async def _start_zygote(self) -> children.Child:
        self._zygote = await children.start(
            "zygote",
            children.module("penstock.run.zygote", str(self._folder.path)),
            pid_file=self._folder.zygote_file,
            log=self._folder.zygote_log,
        )
        return self._zygote

    async def close(self, *, destroy: bool) -> None:
        """Idempotent. With `destroy`, our cgroup folders go too, and the zygote."""
        await self.ports.launcher.close()
        await self._disks.close()
        if destroy and self._zygote is not None:
            await asyncio.to_thread(children.end, self._zygote, term_s=ZYGOTE_TERM_S)
            self._folder.zygote_file.unlink(missing_ok=True)
            self._folder.zygote_socket.unlink(missing_ok=True)
        await self._cgroups.close(destroy=destroy)
        self._threads.shutdown(wait=True)


def read_only_ports(folder: DataFolder) -> Ports:
    """Adapters for looking only: no zygote, no network opened, nothing made. Works while a daemon runs, and without."""
    edges = Edges(Settings(data=str(folder.path)), folder)
    return msgspec.structs.replace(edges.ports, network=network_at_rest(folder))


def network_at_rest(folder: DataFolder) -> NetworkAtRest:
    return NetworkAtRest(installation=folder.installation, router_path=str(folder.router))

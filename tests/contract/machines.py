"""The two machines that node ports are tested on: one in memory in virtual time, and this host.

    @on_both
    async def test_something(machine: Machine) -> None: ...

runs on each. A machine has the ports, and what a test does beside them: start a process, restart the daemon, tear a
record. `NEIGHBOUR` is another installation on the same machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import pytest

from penstock.model.sandbox import Limits
from penstock.node.ports import Cgroups, Disk, Disks, Files, GuestConfig, LaunchOrder, Network, Slot, Strays
from penstock.sim import loop as virtual
from penstock.sim.faults import Faults, Rates
from penstock.sim.guests import Guest, Manner, Nursery
from penstock.sim.kernel import Kernel, Life, Proc
from penstock.sim.trace import Trace

MIB = 1 << 20
LIMITS = Limits(memory_bytes_max=128 * MIB, pids_max=64, disk_bytes_max=64 * MIB, disk_inodes_max=1_024)
WITHIN_S = 10.0


class Machine(Protocol):
    """What the suites need beside the port under test. Objects are made through the ports, by the tests."""

    cgroups: Cgroups
    network: Network
    disks: Disks
    files: Files
    strays: Strays
    neighbour: Any  # the same ports of another installation: cgroups, disks, files

    def start(self, cgroup: str | None, *, slot: Slot | None = None, disk: Disk | None = None) -> int:
        """A process in a cgroup, in a slot's namespaces, using a disk. Returns its pid."""

    def end(self, pid: int) -> None:
        """Kill it and wait until it is gone."""

    def tear_record(self, sandbox: str, piece: bytes) -> None:
        """What a write that was cut off leaves."""

    def fill_disk_of_records(self) -> contextlib.AbstractContextManager[None]:
        """While it is entered, no record can grow."""

    async def restart(self) -> None:
        """Another daemon: fresh adapters over the same machine."""


def on_both(scenario: Callable[[Any], Awaitable[None]]) -> Callable[..., None]:
    return on_each({"simulated": simulated, "linux": linux})(scenario)


def on_each(
    machines: dict[str, Callable[[Path], contextlib.AbstractAsyncContextManager[Any]]],
) -> Callable[[Callable[[Any], Awaitable[None]]], Callable[..., None]]:
    """A decorator: the coroutine function becomes a test that runs once per machine. "simulated" is in virtual time."""

    def decorate(scenario: Callable[[Any], Awaitable[None]]) -> Callable[..., None]:
        async def play(name: str, folder: Path) -> None:
            async with machines[name](folder) as machine:
                await scenario(machine)

        @pytest.mark.parametrize("name", ["simulated", pytest.param("linux", marks=pytest.mark.root)])
        def test(name: str, tmp_path: Path) -> None:
            if name == "simulated":
                virtual.run(play(name, tmp_path), 1)
            else:
                asyncio.run(play(name, tmp_path))

        test.__name__, test.__doc__ = scenario.__name__, scenario.__doc__
        return test

    return decorate


# ---- in memory ------------------------------------------------------------------------------------------------------


class Obedient(Nursery):
    """Guests of the manner that a test wants."""

    def __init__(self) -> None:
        super().__init__(random.Random(0), odd=0.0)
        self.manner = Manner.PROMPT

    def draw(self) -> Guest:
        return Guest(manner=self.manner, hello_s=0.003, lives_s=0.05)


class SimulatedMachine:
    def __init__(self) -> None:
        self.nursery = Obedient()
        self.kernel = self._kernel(Rates())
        self.neighbour = self._kernel(Rates()).ports(Life(1))
        self._lives = 0
        self._take_ports()

    def start(self, cgroup: str | None, *, slot: Slot | None = None, disk: Disk | None = None) -> int:
        order = make_order(
            "i1", cgroup=cgroup or "", slot=slot or Slot(number=-1, address=""), disk=disk or Disk(name="", path="")
        )
        proc = self.kernel.start_process(order, Guest(manner=Manner.PROMPT, hello_s=0, lives_s=1e9))
        proc.cgroup = cgroup
        return proc.pid

    def end(self, pid: int) -> None:
        proc: Proc | None = self.kernel.processes.get(pid)
        if proc is not None:
            self.kernel.end_process(proc)

    def tear_record(self, sandbox: str, piece: bytes) -> None:
        self.kernel.records.setdefault(sandbox, [])
        self.kernel.torn[sandbox] = piece

    @contextlib.contextmanager
    def fill_disk_of_records(self):  # type: ignore[no-untyped-def]
        self.kernel.faults.rates = Rates(disk_full=1.0)
        yield
        self.kernel.faults.rates = Rates()

    async def restart(self) -> None:
        self._take_ports()

    def _take_ports(self) -> None:
        self._lives += 1
        ports = self.kernel.ports(Life(self._lives))
        self.guests = ports.guests
        self.launcher, self.cgroups, self.network = ports.launcher, ports.cgroups, ports.network
        self.disks, self.files, self.strays = ports.disks, ports.files, ports.strays

    def _kernel(self, rates: Rates) -> Kernel:
        trace = Trace(asyncio.get_running_loop().time)
        return Kernel(faults=Faults(random.Random(1), rates), nursery=self.nursery, trace=trace)


@contextlib.asynccontextmanager
async def simulated(_folder: Path) -> AsyncIterator[SimulatedMachine]:
    yield SimulatedMachine()


# ---- this host ------------------------------------------------------------------------------------------------------


class LinuxMachine:
    """Made by parts, each by the first test that asks: a network takes half a second."""

    def __init__(self, folder: Path, name: str) -> None:
        from penstock.node.linux.cgroups import LinuxCgroups
        from penstock.node.linux.disks import LinuxDisks
        from penstock.node.linux.files import LinuxFiles

        self.folder, self.name = folder / name, name
        for part in ("records", "run", "disks"):
            (self.folder / part).mkdir(parents=True)
        self.threads = ThreadPoolExecutor(4)
        self.cgroups = LinuxCgroups(name)
        self.disks = LinuxDisks(folder=str(self.folder / "disks"), threads=self.threads)
        self.files = LinuxFiles(records=str(self.folder / "records"), run=str(self.folder / "run"))
        self.neighbour: Any = None
        self._started: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, cgroup: str | None, *, slot: Slot | None = None, disk: Disk | None = None) -> int:
        doors = self.cgroups.doors(cgroup) if cgroup else None
        fds = [*doors.tasks, *doors.user, *([] if doors.unified is None else [doors.unified])] if doors else []
        where = [] if slot is None else [slot.userns_fd, slot.netns_fd]
        kept = [] if disk is None else [os.dup(disk.mount_fd)]
        argv = ["sleep", "60"]
        if where:
            argv = ["nsenter", f"--net=/proc/self/fd/{where[1]}", f"--user=/proc/self/fd/{where[0]}", *argv]

        def enter() -> None:
            for fd in doors.tasks if doors else []:
                os.write(fd, b"0")
            if doors and doors.unified is not None:
                joining = os.open("cgroup.procs", os.O_WRONLY, dir_fd=doors.unified)
                os.write(joining, b"0")
                os.close(joining)

        started = subprocess.Popen(argv, preexec_fn=enter, pass_fds=[*where, *kept], stdin=subprocess.DEVNULL)
        for fd in (*fds, *kept):
            os.close(fd)
        self._started[started.pid] = started
        while b"sleep" not in Path(f"/proc/{started.pid}/cmdline").read_bytes()[:6]:
            assert started.poll() is None, "it did not get there"
        return started.pid

    def end(self, pid: int) -> None:
        started = self._started.pop(pid, None)
        if started is not None:
            started.kill()
            started.wait()

    def tear_record(self, sandbox: str, piece: bytes) -> None:
        with (self.folder / "records" / f"{sandbox}.log").open("ab") as file:
            file.write(piece)

    @contextlib.contextmanager
    def fill_disk_of_records(self):  # type: ignore[no-untyped-def]
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))  # a write beyond is cut short, then refused
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, before)

    async def restart(self) -> None:
        await self.network.close(destroy=False)
        self.network = self._network()
        await self.network.open()

    async def open_network(self) -> None:
        from tests.linux import netlab

        from penstock.node.linux.claims import Claims
        from penstock.node.linux.strays import LinuxStrays

        (self.folder / "installation").write_text(self.name)
        self._host = netlab.make_netns()
        self._claims = Claims(str(self.folder / "host"), in_use=lambda _: False)
        self.network = self._network()
        await self.network.open()
        self.strays = LinuxStrays(installation=self.name, router_path=str(self.folder / "router"), claims=self._claims)

    def _network(self):  # type: ignore[no-untyped-def]
        from tests.linux import netlab

        from penstock.node.linux.network import LinuxNetwork

        async def make_userns(uid_base: int) -> int:
            return netlab.make_userns(uid_base)

        return LinuxNetwork(
            installation=self.name,
            data=str(self.folder),
            router_path=str(self.folder / "router"),
            make_userns=make_userns,
            slots=16,
            claims=self._claims,
            host_fd=self._host,
            uplink=False,
        )

    async def close(self) -> None:
        for pid in list(self._started):
            self.end(pid)
        if hasattr(self, "_host"):
            for number in self.network.list_slots():
                await self.network.destroy_slot(number, within_s=WITHIN_S)
            await self.network.close(destroy=True)
            os.close(self._host)
        for name in self.cgroups.list_names():
            await self.cgroups.kill(name, within_s=WITHIN_S)
            await self.cgroups.remove(name, within_s=WITHIN_S)
        await self.cgroups.close(destroy=True)
        for name in self.disks.list_names():
            await self.disks.remove(name, within_s=WITHIN_S)
        await self.disks.close()
        self.threads.shutdown()


@contextlib.asynccontextmanager
async def linux(folder: Path) -> AsyncIterator[LinuxMachine]:
    """Cgroups, disks and files; use `linux_network` where slots are needed."""
    machine, neighbour = LinuxMachine(folder, "ctr0a"), LinuxMachine(folder, "ctr0b")
    machine.neighbour = neighbour
    try:
        yield machine
    finally:
        await neighbour.close()
        await machine.close()


@contextlib.asynccontextmanager
async def linux_network(folder: Path) -> AsyncIterator[LinuxMachine]:
    machine = LinuxMachine(folder, "ctr0a")
    try:
        await machine.open_network()
        yield machine
    finally:
        await machine.close()


def make_order(sandbox: str, *, cgroup: str, slot: Slot, disk: Disk) -> LaunchOrder:
    guest = GuestConfig(
        sandbox_id=sandbox, template_id="t", access_token=None, env={}, user="user", workdir="/", hostname=sandbox
    )
    return LaunchOrder(
        sandbox=sandbox, cgroup=cgroup, layers=[], disk=disk, slot=slot, limits=LIMITS, run_dir="", guest=guest
    )

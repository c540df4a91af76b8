"""A Linux machine in memory: every port of `node/ports.py` with the same promises, delays and refusals.

`Kernel` is what survives the daemon: processes, cgroups, slots, disks, folders, records, the boot id. The adapters
belong to one `Life` of the daemon; when that life is over (kill -9), each further call of theirs raises `Dead`, so that
no `finally` of a dead daemon can touch the machine.
"""

from __future__ import annotations

import asyncio
import errno
import signal
from collections.abc import Callable
from typing import Final

from penstock.core.deadlines import DeadlinePassed, within
from penstock.model.errors import LaunchFailed
from penstock.model.sandbox import EgressRules, Limits
from penstock.node.ports import CgroupUsage, Disk, LaunchOrder, Ports, Slot, Stray
from penstock.sim.faults import Faults
from penstock.sim.guests import Guest, Manner, Nursery
from penstock.sim.trace import Trace

FOREVER_S: Final = 1e9


class Dead(BaseException):
    """The daemon that calls was killed. Not an Exception: production code must not be able to handle its own death."""


class Life:
    """One run of the daemon, from start to kill -9."""

    def __init__(self, number: int, *, crash_after: int | None = None, before_write: bool = False) -> None:
        self.number = number
        self.dead = False
        self.died = asyncio.Event()
        self._appends_left = crash_after
        self._before_write = before_write

    def check(self) -> None:
        if self.dead:
            raise Dead

    def end(self) -> None:
        self.dead = True
        self.died.set()

    def append(self, write: Callable[[], None]) -> None:
        """Do `write`, unless the daemon dies in it: then before or after the bytes reached the page cache."""
        self.check()
        if self._appends_left is not None:
            self._appends_left -= 1
            if self._appends_left <= 0:
                if not self._before_write:
                    write()
                self.end()
                raise Dead
        write()


class Proc:
    """A process the kernel knows."""

    def __init__(self, pid: int, start_ticks: int, order: LaunchOrder, guest: Guest) -> None:
        self.pid, self.start_ticks, self.order, self.guest = pid, start_ticks, order, guest
        self.cgroup: str | None = order.cgroup
        self.alive = True
        self.gone = asyncio.Event()


class Kernel:
    """The machine. `told(kind, name, verb)` is called at every change, for the checkers."""

    def __init__(self, *, faults: Faults, nursery: Nursery, trace: Trace) -> None:
        self.faults, self.nursery, self.trace = faults, nursery, trace
        self.told: Callable[[str, str, str], None] = lambda kind, name, verb: None
        self.boots = 1
        self.processes: dict[int, Proc] = {}
        self.cgroups: dict[str, bool] = {}  # name → frozen
        self.slots: dict[int, EgressRules] = {}
        self.disks: dict[str, Limits] = {}
        self.run_dirs: set[str] = set()
        self.records: dict[str, list[bytes]] = {}
        self._pids = 1_000

    @property
    def boot_id(self) -> str:
        return f"boot-{self.boots}"

    def ports(self, life: Life) -> Ports:
        return Ports(
            launcher=SimLauncher(self, life),
            cgroups=SimCgroups(self, life),
            network=SimNetwork(self, life),
            disks=SimDisks(self, life),
            files=SimFiles(self, life),
            strays=SimStrays(self),
        )

    def reboot(self) -> None:
        """Power off and on: what lives in the kernel is gone, what lies on disk is not."""
        self.trace.say("reboot")
        for proc in list(self.processes.values()):
            self.end_process(proc)
        for name in list(self.cgroups):
            del self.cgroups[name]
            self.told("cgroup", name, "gone")
        for number in list(self.slots):
            del self.slots[number]
            self.told("slot", str(number), "gone")
        self.boots += 1

    def start_process(self, order: LaunchOrder, guest: Guest) -> Proc:
        self._pids += 1
        proc = Proc(self._pids, self._pids * 7, order, guest)
        self.processes[proc.pid] = proc
        self.change("process", order.sandbox, "made")
        return proc

    def end_process(self, proc: Proc) -> None:
        if not proc.alive:
            return
        proc.alive = False
        del self.processes[proc.pid]
        proc.gone.set()
        self.change("process", proc.order.sandbox, "gone")

    def members(self, cgroup: str) -> list[Proc]:
        return [proc for proc in self.processes.values() if proc.cgroup == cgroup]

    def change(self, kind: str, name: str, verb: str) -> None:
        self.trace.say(f"{kind} {verb}", name=name)
        self.told(kind, name, verb)

    async def step(self, life: Life, what: str, usual_s: float) -> None:
        """The time an operation takes, and its chance to fail before it did anything."""
        life.check()
        delay_s = self.faults.delay_s(usual_s)
        fails = self.faults.fails()
        await asyncio.sleep(delay_s)
        life.check()
        if fails:
            self.trace.say("fault", op=what.replace(" ", "_"))
            raise OSError(errno.EIO, f"{what} failed (simulated)")

    async def release(self, life: Life, what: str, usual_s: float, within_s: float) -> None:
        """A step of a release, that may stay busy until its deadline."""
        async with within(within_s, what):
            if self.faults.busy():
                self.trace.say("busy", op=what.replace(" ", "_"))
                await asyncio.sleep(FOREVER_S)
            await self.step(life, what, usual_s)


class SimProcess:
    """A handle on pid 1 of a sandbox: the pidfd of one life of the daemon."""

    def __init__(self, kernel: Kernel, life: Life, proc: Proc) -> None:
        self._kernel, self._life, self._proc = kernel, life, proc
        self.pid, self.start_ticks = proc.pid, proc.start_ticks
        self.steps_ms: dict[str, float] = {}

    async def wait(self) -> int | None:
        await self._proc.gone.wait()
        self._life.check()
        return 9

    def signal(self, number: int) -> None:
        self._life.check()
        if not self._proc.alive:
            return
        if number == signal.SIGKILL or (number == signal.SIGTERM and self._proc.guest.manner is not Manner.STUBBORN):
            asyncio.get_running_loop().call_later(0.002, self._kernel.end_process, self._proc)

    def alive(self) -> bool:
        self._life.check()
        return self._proc.alive

    def close(self) -> None:
        self._life.check()


class SimLauncher:
    def __init__(self, kernel: Kernel, life: Life) -> None:
        self._kernel, self._life = kernel, life

    async def launch(self, order: LaunchOrder, *, within_s: float) -> SimProcess:
        kernel = self._kernel
        await kernel.step(self._life, "launch", 0.003)
        assert order.cgroup in kernel.cgroups, f"{order.sandbox} launched without its cgroup"
        assert order.slot.number in kernel.slots, f"{order.sandbox} launched without its slot"
        assert order.disk.name in kernel.disks, f"{order.sandbox} launched without its disk"
        assert order.sandbox in kernel.run_dirs, f"{order.sandbox} launched without its folder"
        guest = kernel.nursery.draw()
        if kernel.faults.is_calm:
            guest = Guest(manner=Manner.PROMPT, hello_s=0.003, lives_s=FOREVER_S)
        proc = kernel.start_process(order, guest)
        try:
            async with within(within_s, f"guest hello of {order.sandbox}"):
                await self._hello(proc)
        except BaseException:
            # A zygote sees its client vanish and kills the child, so a dead daemon leaves no half-born process here.
            if not self._life.dead:
                kernel.end_process(proc)
            raise
        return SimProcess(kernel, self._life, proc)

    async def _hello(self, proc: Proc) -> None:
        """Until the guest answers, or pid 1 is gone: a launcher hears of both."""
        guest = proc.guest
        try:
            async with within(FOREVER_S if guest.manner is Manner.DEAF else guest.hello_s, "hello"):
                await proc.gone.wait()
        except DeadlinePassed:
            pass
        self._life.check()
        if guest.manner is Manner.STILLBORN:
            self._kernel.end_process(proc)
        if not proc.alive:
            raise LaunchFailed(proc.order.sandbox, "guest hello", "pid 1 ended")
        if guest.manner is Manner.ESCAPED:
            proc.cgroup = None
        if guest.manner is Manner.MORTAL:
            asyncio.get_running_loop().call_later(guest.lives_s, self._kernel.end_process, proc)

    def adopt(self, pid: int, start_ticks: int) -> SimProcess | None:
        self._life.check()
        if self._kernel.faults.fails():
            raise OSError(errno.EMFILE, "Too many open files (simulated)")
        proc = self._kernel.processes.get(pid)
        if proc is None or proc.start_ticks != start_ticks:
            return None
        return SimProcess(self._kernel, self._life, proc)

    async def close(self) -> None:
        self._life.check()


class SimCgroups:
    def __init__(self, kernel: Kernel, life: Life) -> None:
        self._kernel, self._life = kernel, life

    async def create(self, name: str, limits: Limits) -> None:
        await self._kernel.step(self._life, f"cgroup create {name}", 0.001)
        if name in self._kernel.cgroups:
            raise FileExistsError(errno.EEXIST, "File exists", name)
        self._kernel.cgroups[name] = False
        self._kernel.change("cgroup", name, "made")

    async def kill(self, name: str, *, within_s: float) -> None:
        await self._kernel.release(self._life, f"cgroup kill {name}", 0.001, within_s)
        for proc in self._kernel.members(name):
            self._kernel.end_process(proc)

    async def remove(self, name: str, *, within_s: float) -> None:
        await self._kernel.release(self._life, f"cgroup remove {name}", 0.001, within_s)
        if name not in self._kernel.cgroups:
            return
        if self._kernel.members(name):
            raise OSError(errno.EBUSY, "Device or resource busy", name)
        del self._kernel.cgroups[name]
        self._kernel.change("cgroup", name, "gone")

    def list_names(self) -> set[str]:
        self._life.check()
        return set(self._kernel.cgroups)

    def pids(self, name: str) -> list[int]:
        self._life.check()
        return [proc.pid for proc in self._kernel.members(name)]

    def usage(self, name: str) -> CgroupUsage:
        self._life.check()
        pids = len(self._kernel.members(name))
        return CgroupUsage(cpu_s=0.0, memory_bytes=0, memory_cache_bytes=0, memory_bytes_max=0, pids=pids, oom_kills=0)

    async def freeze(self, name: str, *, within_s: float) -> None:
        await self._kernel.release(self._life, f"freeze {name}", 0.0005, within_s)
        self._kernel.cgroups[name] = True

    async def thaw(self, name: str, *, within_s: float) -> None:
        await self._kernel.release(self._life, f"thaw {name}", 0.0005, within_s)
        self._kernel.cgroups[name] = False


class SimNetwork:
    def __init__(self, kernel: Kernel, life: Life) -> None:
        self._kernel, self._life = kernel, life

    async def open(self) -> None:
        self._life.check()

    async def create_slot(self, number: int) -> Slot:
        await self._kernel.step(self._life, f"slot create {number}", 0.001)
        assert number not in self._kernel.slots, f"slot {number} made twice"
        self._kernel.slots[number] = EgressRules()
        self._kernel.change("slot", str(number), "made")
        return _slot(number)

    async def destroy_slot(self, number: int, *, within_s: float) -> None:
        await self._kernel.release(self._life, f"slot destroy {number}", 0.001, within_s)
        if self._kernel.slots.pop(number, None) is not None:
            self._kernel.change("slot", str(number), "gone")

    async def apply(self, number: int, rules: EgressRules) -> None:
        await self._kernel.step(self._life, f"rules of slot {number}", 0.0005)
        assert number in self._kernel.slots, f"rules for slot {number}, which does not exist"
        self._kernel.slots[number] = rules

    def retake(self, number: int, pid: int) -> Slot:
        self._life.check()
        if number not in self._kernel.slots or pid not in self._kernel.processes:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", f"slot {number} of pid {pid}")
        return _slot(number)

    def list_slots(self) -> set[int]:
        self._life.check()
        return set(self._kernel.slots)

    async def close(self, *, destroy: bool) -> None:
        self._life.check()


class SimDisks:
    def __init__(self, kernel: Kernel, life: Life) -> None:
        self._kernel, self._life = kernel, life

    async def create(self, name: str, limits: Limits) -> Disk:
        await self._kernel.step(self._life, f"disk create {name}", 0.002)
        assert name not in self._kernel.disks, f"disk {name} made twice"
        self._kernel.disks[name] = limits
        self._kernel.change("disk", name, "made")
        return Disk(name=name, path=f"/sim/disks/{name}.img")

    async def remove(self, name: str, *, within_s: float) -> None:
        await self._kernel.release(self._life, f"disk remove {name}", 0.001, within_s)
        if self._kernel.disks.pop(name, None) is not None:
            self._kernel.change("disk", name, "gone")

    def list_names(self) -> set[str]:
        self._life.check()
        return set(self._kernel.disks)

    def used_bytes(self, name: str) -> int:
        self._life.check()
        return 0


class SimFiles:
    def __init__(self, kernel: Kernel, life: Life) -> None:
        self._kernel, self._life = kernel, life

    def make_run_dir(self, sandbox: str) -> str:
        self._life.check()
        self._kernel.run_dirs.add(sandbox)
        self._kernel.change("run_dir", sandbox, "made")
        return f"/sim/run/{sandbox}"

    def remove_run_dir(self, sandbox: str) -> None:
        self._life.check()
        if sandbox in self._kernel.run_dirs:
            self._kernel.run_dirs.discard(sandbox)
            self._kernel.change("run_dir", sandbox, "gone")

    def list_run_dirs(self) -> set[str]:
        self._life.check()
        return set(self._kernel.run_dirs)

    def append_record(self, sandbox: str, line: bytes) -> None:
        self._life.check()
        self._kernel.faults.refuse_append()

        def write() -> None:
            self._kernel.records.setdefault(sandbox, []).append(line)

        self._life.append(write)

    def read_record(self, sandbox: str) -> list[bytes]:
        self._life.check()
        return list(self._kernel.records.get(sandbox, ()))

    def remove_record(self, sandbox: str) -> None:
        self._life.check()
        if self._kernel.records.pop(sandbox, None) is not None:
            self._kernel.change("record", sandbox, "gone")

    def list_records(self) -> set[str]:
        self._life.check()
        return set(self._kernel.records)


class SimStrays:
    """Processes outside every cgroup that still hold a slot's namespace."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel

    def list_strays(self) -> list[Stray]:
        return [
            Stray(proc.pid, f"netns of slot {proc.order.slot.number}")
            for proc in self._kernel.processes.values()
            if proc.cgroup is None
        ]


def _slot(number: int) -> Slot:
    return Slot(number=number, address=f"100.64.{number // 256}.{number % 256}", uid_base=1_000_000 + number * 65_536)

"""The node's ports in front of a machine in memory, with the same promises, delays and refusals as Linux.

The adapters belong to one `Life` of the daemon; when that life is over (kill -9), each further call of theirs raises
`Dead`, so that no `finally` of a dead daemon can touch the machine. `tests/contract/` holds them to what the adapters
of `node/linux/` do.
"""

from __future__ import annotations

import asyncio
import errno
import signal
from typing import Final

from penstock.core.deadlines import DeadlinePassed, within
from penstock.model.errors import LaunchFailed, NotTheSlot
from penstock.model.sandbox import EgressRules, Limits
from penstock.node.egress_rules import compile_rules
from penstock.node.ports import CgroupUsage, Disk, LaunchOrder, Ports, Slot, Stray
from penstock.sim.conversations import SimGuests
from penstock.sim.guests import Guest, Manner
from penstock.sim.machinery import FOREVER_S, Dead, Life, Machinery, Proc

__all__ = ["Dead", "Kernel", "Life", "Proc", "SimFiles"]

ESCAPE_S: Final = 0.05


class Kernel(Machinery):
    """The machine, and the ports of the daemon that lives `life` on it."""

    def ports(self, life: Life) -> Ports:
        return Ports(
            launcher=SimLauncher(self, life),
            cgroups=SimCgroups(self, life),
            network=SimNetwork(self, life),
            disks=SimDisks(self, life),
            files=SimFiles(self, life),
            guests=SimGuests(self, life),
            strays=SimStrays(self),
        )


class SimProcess:
    """A handle on pid 1 of a sandbox: the pidfd of one life of the daemon."""

    def __init__(self, kernel: Kernel, life: Life, proc: Proc) -> None:
        self._kernel, self._life, self._proc = kernel, life, proc
        self.pid, self.start_ticks = proc.pid, proc.start_ticks
        self.steps_ms: dict[str, float] = {}  # of the launch; empty when adopted

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
        process = SimProcess(kernel, self._life, proc)
        process.steps_ms = {"hello": guest.hello_s * 1000}
        return process

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
            self._escape(proc)
        if guest.manner is Manner.MORTAL:
            asyncio.get_running_loop().call_later(guest.lives_s, self._kernel.end_process, proc)

    def _escape(self, proc: Proc) -> None:
        """Once it is known: of one that goes before anybody wrote down its pid, nothing would tell whose it is."""
        lines = self._kernel.records.get(proc.order.sandbox, [])
        if any(b'"k":"pid"' in line for line in lines):
            proc.cgroup = None
        elif proc.alive:
            asyncio.get_running_loop().call_later(ESCAPE_S, self._escape, proc)

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
        if name in self._kernel.cgroups:
            self._kernel.cgroups[name] = False  # thawed: a frozen process of v1 would not die
        for proc in self._kernel.members(name):
            self._kernel.end_process(proc)

    async def remove(self, name: str, *, within_s: float) -> None:
        await self._kernel.release(self._life, f"cgroup remove {name}", 0.001, within_s)
        if name not in self._kernel.cgroups:
            return
        busy = f"removal of cgroup {name}"
        await self._kernel.until(self._life, lambda: not self._kernel.members(name), busy, within_s)
        if name not in self._kernel.cgroups:
            return
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
        self._find(name)
        pids = len(self._kernel.members(name))
        return CgroupUsage(cpu_s=0.0, memory_bytes=0, memory_cache_bytes=0, memory_bytes_max=0, pids=pids, oom_kills=0)

    async def freeze(self, name: str, *, within_s: float) -> None:
        await self._kernel.release(self._life, f"freeze {name}", 0.0005, within_s)
        self._find(name)
        self._kernel.cgroups[name] = True

    async def thaw(self, name: str, *, within_s: float) -> None:
        await self._kernel.release(self._life, f"thaw {name}", 0.0005, within_s)
        self._find(name)
        self._kernel.cgroups[name] = False

    def _find(self, name: str) -> None:
        if name not in self._kernel.cgroups:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", name)


class SimNetwork:
    def __init__(self, kernel: Kernel, life: Life) -> None:
        self._kernel, self._life = kernel, life

    async def open(self) -> None:
        self._life.check()

    async def create_slot(self, number: int) -> Slot:
        await self._kernel.step(self._life, f"slot create {number}", 0.001)
        if number in self._kernel.slots:
            self._kernel.told("slot", str(number), "made twice")
            raise FileExistsError(errno.EEXIST, "File exists", f"slot {number}")
        self._kernel.slots[number] = EgressRules()
        self._kernel.change("slot", str(number), "made")
        return _slot(number)

    async def destroy_slot(self, number: int, *, within_s: float) -> None:
        await self._kernel.release(self._life, f"slot destroy {number}", 0.001, within_s)
        if self._kernel.slots.pop(number, None) is not None:
            self._kernel.change("slot", str(number), "gone")

    async def apply(self, number: int, rules: EgressRules) -> None:
        await self._kernel.step(self._life, f"rules of slot {number}", 0.0005)
        if number not in self._kernel.slots:
            raise NotTheSlot("no such network slot", which=str(number))
        compile_rules(rules, allow_private=False)
        self._kernel.slots[number] = rules

    def retake(self, number: int, pid: int) -> Slot:
        self._life.check()
        proc = self._kernel.processes.get(pid)
        if proc is None:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", f"/proc/{pid}")
        if number not in self._kernel.slots or proc.order.slot.number != number:
            raise NotTheSlot("the process is not in its network slot", which=str(number), why=f"pid {pid}")
        return _slot(number)

    def list_slots(self) -> set[int]:
        self._life.check()
        return set(self._kernel.slots)

    async def close(self, *, destroy: bool) -> None:
        self._life.check()


class SimDisks:
    def __init__(self, kernel: Kernel, life: Life) -> None:
        self._kernel, self._life = kernel, life

    async def create(self, name: str, limits: Limits, *, image: str | None = None) -> Disk:
        await self._kernel.step(self._life, f"disk create {name}", 0.002)
        if image is not None and image not in self._kernel.images:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", image)
        if name in self._kernel.disks:
            self._kernel.told("disk", name, "made twice")
            raise FileExistsError(errno.EEXIST, "File exists", name)
        self._kernel.disks[name] = limits
        self._kernel.change("disk", name, "made")
        return Disk(name=name, path=f"/sim/disks/{name}.img")

    async def remove(self, name: str, *, within_s: float) -> None:
        await self._kernel.release(self._life, f"disk remove {name}", 0.001, within_s)
        await self._kernel.until(self._life, lambda: not self._in_use(name), f"release of disk {name}", within_s)
        if self._kernel.disks.pop(name, None) is not None:
            self._kernel.change("disk", name, "gone")

    def list_names(self) -> set[str]:
        self._life.check()
        return set(self._kernel.disks)

    def used_bytes(self, name: str) -> int:
        self._life.check()
        if name not in self._kernel.disks:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", name)
        return 0

    async def keep(self, name: str, image: str, *, within_s: float) -> int:
        await self._kernel.release(self._life, f"disk keep {name}", 0.004, within_s)
        await self._kernel.until(self._life, lambda: not self._in_use(name), f"disk {name} to be unused", within_s)
        return self._image(name, image)

    async def copy(self, name: str, image: str, *, within_s: float) -> int:
        await self._kernel.release(self._life, f"disk copy {name}", 0.02, within_s)
        return self._image(name, image)

    def list_images(self) -> set[str]:
        self._life.check()
        return set(self._kernel.images)

    def remove_image(self, image: str) -> None:
        self._life.check()
        if self._kernel.images.pop(image, None) is not None:
            self._kernel.change("image", image, "gone")

    def _image(self, name: str, image: str) -> int:
        if image not in self._kernel.images:
            if name not in self._kernel.disks:
                raise FileNotFoundError(errno.ENOENT, "No such file or directory", name)
            self._kernel.images[image] = name
            self._kernel.change("image", image, "made")
        return 1

    def _in_use(self, name: str) -> bool:
        return any(proc.order.disk.name == name for proc in self._kernel.processes.values())


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
            self._kernel.torn.pop(sandbox, None)  # nobody was told of it
            self._kernel.records.setdefault(sandbox, []).append(line)

        def tear() -> None:
            self._kernel.records.setdefault(sandbox, [])
            self._kernel.torn[sandbox] = line[: len(line) // 2]

        self._life.append(write, tear)

    def read_record(self, sandbox: str) -> list[bytes]:
        self._life.check()
        return list(self._kernel.records.get(sandbox, ()))

    def remove_record(self, sandbox: str) -> None:
        self._life.check()
        self._kernel.torn.pop(sandbox, None)
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

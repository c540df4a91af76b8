"""A Linux machine in memory: what survives the daemon, the daemon's lives, and how long an operation takes there.

Processes, cgroups, slots, disks, folders, records and the boot id are tables here; `sim/kernel.py` puts the node's
ports in front of them.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from typing import Final

from penstock.core.deadlines import within
from penstock.model.sandbox import EgressRules, Limits
from penstock.node.ports import Guests, LaunchOrder, Notice
from penstock.sim import loop as virtual
from penstock.sim.faults import Faults
from penstock.sim.guests import Guest, Nursery
from penstock.sim.trace import Trace

FOREVER_S: Final = 1e9
BUSY_PAUSE_S: Final = 0.05  # between attempts to remove what is in use


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

    def append(self, write: Callable[[], None], tear: Callable[[], None]) -> None:
        """Do `write`, unless the daemon dies in it: then after it, or after `tear`, which writes half of the bytes."""
        self.check()
        if self._appends_left is not None:
            self._appends_left -= 1
            if self._appends_left <= 0:
                if self._before_write:
                    tear()
                else:
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


class Machinery:
    """The machine. `told(kind, name, verb)` is called at every change, for the checkers."""

    def __init__(self, *, faults: Faults, nursery: Nursery, trace: Trace) -> None:
        self.faults, self.nursery, self.trace = faults, nursery, trace
        self.told: Callable[[str, str, str], None] = lambda kind, name, verb: None
        # Guests' clock; a world puts its own here.
        self.wall: Callable[[], float] = lambda: virtual.SimClock(asyncio.get_running_loop()).wall()
        self.boots = 1
        self.processes: dict[int, Proc] = {}
        self.cgroups: dict[str, bool] = {}  # name → frozen
        self.slots: dict[int, EgressRules] = {}
        self.disks: dict[str, Limits] = {}
        self.images: dict[str, str] = {}  # kept of which disk
        self.run_dirs: set[str] = set()
        self.records: dict[str, list[bytes]] = {}  # whole lines
        self.in_person: Guests | None = None  # where guests are real ones, how to speak to them
        self.notices: dict[str, list[Notice]] = {}  # that guests took, by sandbox
        self.torn: dict[str, bytes] = {}  # what a write that was cut off left at the end of a record
        self._pids = 1_000

    @property
    def boot_id(self) -> str:
        return f"boot-{self.boots}"

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

    async def until(self, life: Life, free: Callable[[], bool], what: str, within_s: float) -> None:
        """What a release that meets EBUSY does: try again until it is free, or its deadline."""
        async with within(within_s, what):
            while not free():
                await asyncio.sleep(BUSY_PAUSE_S)
                life.check()

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

"""The port `Guests` on a machine in memory: who hears the daemon, and who does not."""

from __future__ import annotations

import asyncio

from penstock.core.deadlines import DeadlinePassed, within
from penstock.model.errors import Unavailable
from penstock.node.ports import Notice
from penstock.sim.guests import Manner
from penstock.sim.machinery import FOREVER_S, Life, Machinery


class SimGuests:
    """What guests were told is in `Machinery.notices`. A frozen guest hears nothing, nor a deaf one."""

    def __init__(self, kernel: Machinery, life: Life) -> None:
        self._kernel, self._life = kernel, life

    async def notify(self, run_dir: str, notice: Notice, *, within_s: float) -> None:
        async with within(within_s, f"notice of the guest of {_sandbox(run_dir)}"):
            await self._reach(run_dir)
            if self._kernel.in_person is not None:
                await self._kernel.in_person.notify(run_dir, notice, within_s=within_s)
        self._life.check()
        self._kernel.notices.setdefault(_sandbox(run_dir), []).append(notice)
        self._kernel.trace.say("notice", name=_sandbox(run_dir), epoch=notice.epoch)

    async def quiesce(self, run_dir: str, *, within_s: float) -> float:
        at = self._kernel.wall()
        async with within(within_s, f"quiesce of the guest of {_sandbox(run_dir)}"):
            await self._reach(run_dir)
            if self._kernel.in_person is not None:
                at = await self._kernel.in_person.quiesce(run_dir, within_s=within_s)
        self._life.check()
        return at

    async def health(self, run_dir: str, *, within_s: float) -> bool:
        try:
            async with within(within_s, f"health of the guest of {_sandbox(run_dir)}"):
                await self._reach(run_dir)
        except (Unavailable, DeadlinePassed):
            return False
        return True

    async def _reach(self, run_dir: str) -> None:
        """Until the guest has answered; for ever when it does not."""
        sandbox = _sandbox(run_dir)
        try:
            await self._kernel.step(self._life, f"call of the guest of {sandbox}", 0.001)
        except OSError as error:
            raise Unavailable("the guest does not answer", which=sandbox, why=str(error)) from error
        proc = next((each for each in self._kernel.processes.values() if each.order.sandbox == sandbox), None)
        if proc is None:
            raise Unavailable("the guest does not answer", which=sandbox, why="Connection refused (simulated)")
        frozen = proc.cgroup is not None and self._kernel.cgroups.get(proc.cgroup, False)
        if frozen or proc.guest.manner is Manner.DEAF:
            await asyncio.sleep(FOREVER_S)


def _sandbox(run_dir: str) -> str:
    return run_dir.rpartition("/")[2]

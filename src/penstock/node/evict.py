"""Undoing what a sandbox holds, one label at a time, each verified; and what is asked of a sandbox before force.

The ladder is data: notice (SIGTERM to pid 1, which passes it on) → kill of the whole cgroup → release of everything
else, in the reverse order of taking. A label names all that its undo needs, so that a restarted daemon, which has
nothing but the record, climbs the same way down.
"""

from __future__ import annotations

import signal
from collections.abc import Awaitable
from typing import Final

from penstock.core.deadlines import within
from penstock.model.errors import PoolClosed
from penstock.model.ids import SnapshotId
from penstock.node.means import Means
from penstock.node.ports import Process

# In the order of taking. One label per kind: which slot or disk it is, the pool's own record says.
RUN_DIR: Final = "run_dir"
SLOT: Final = "slot"
DISK: Final = "disk"
CGROUP: Final = "cgroup"
PROCESS: Final = "process"
LABELS: Final = (RUN_DIR, SLOT, DISK, CGROUP, PROCESS)


def cgroup_name(sandbox: str) -> str:
    return f"sb-{sandbox}"


class Undo:
    """The way back from each label of one sandbox. Every method is idempotent; absent is success."""

    def __init__(self, sandbox: str, means: Means) -> None:
        self.sandbox, self._means = sandbox, means
        self.process: Process | None = None
        self.keep: SnapshotId | None = None  # as which image its disk is kept before it goes
        self.kept_bytes = 0
        self.kept_at = 0.0  # wall: everything that was ever written is in the image
        self.identity: tuple[int, int] | None = None  # (pid, start ticks) of this boot, where only the record knows it

    async def of(self, label: str) -> None:
        """Undo `label` and verify it. Raises what the port raised, or DeadlinePassed naming the step."""
        match label:
            case "process":
                await self._process()
            case "cgroup":
                await self._means.ports.cgroups.remove(cgroup_name(self.sandbox), within_s=self._within_s)
            case "disk":
                await self._disk()
            case "slot":
                await self._slot()
            case "run_dir":
                self._means.ports.files.remove_run_dir(self.sandbox)
            case _:
                raise ValueError(f"no way back from label {label!r} of {self.sandbox}")

    @property
    def _within_s(self) -> float:
        return self._means.settings.step_within_s

    async def _process(self) -> None:
        """Kill everything in the cgroup, and pid 1 by its descriptor should it have left; then see it gone."""
        await self._means.ports.cgroups.kill(cgroup_name(self.sandbox), within_s=self._within_s)
        process = self.process
        if process is None and self.identity is not None:
            # An emptied cgroup proves nothing about a process that was moved out of it (sim seed 208).
            process = self._means.ports.launcher.adopt(*self.identity)
        if process is None:
            return
        if process.alive():
            process.signal(signal.SIGKILL)
            async with within(self._within_s, f"the death of pid {process.pid} of {self.sandbox}"):
                await process.wait()
        process.close()
        self.process = None

    async def _slot(self) -> None:
        for number in self._means.slots.owned_by(self.sandbox):
            await _give_back(self._means.slots.give_back(number))

    async def _disk(self) -> None:
        if self.keep is not None:
            await self._keep_image(self.keep)
        for number in self._means.disks.owned_by(self.sandbox):
            await _give_back(self._means.disks.give_back(number))
        # A disk of another size than the pool's has the sandbox's own name.
        await self._means.ports.disks.remove(self.sandbox, within_s=self._within_s)

    async def _keep_image(self, image: SnapshotId) -> None:
        owned = self._means.disks.owned_by(self.sandbox)
        name = self._means.disks.name(owned[0]) if owned else self.sandbox
        self.kept_bytes = await self._means.ports.disks.keep(name, image, within_s=self._within_s)
        self.kept_at = self._means.clock.wall()


async def _give_back(returning: Awaitable[None]) -> None:
    try:
        await returning
    except PoolClosed:
        # Destroyed and verified all the same: a closed pool says so by raising nothing but this.
        pass

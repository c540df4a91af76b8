"""The ports Launcher and Process, on both machines. What a launch makes inside is tested in tests/linux."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import ClassVar, Protocol

import pytest

from penstock.core.deadlines import DeadlinePassed
from penstock.model.errors import LaunchFailed
from penstock.node.ports import Cgroups, Launcher, LaunchOrder, Process
from penstock.sim.guests import Manner

from .machines import LIMITS, WITHIN_S, SimulatedMachine, make_order, on_each

DEATHS = (signal.SIGKILL, None)  # the wait status, where the kernel still knows it


class Pad(Protocol):
    """Where sandboxes are launched from."""

    launcher: Launcher
    cgroups: Cgroups

    async def order(self, sandbox: str, *, manner: Manner = Manner.PROMPT) -> LaunchOrder:
        """All that a launch needs, for a guest that behaves so: PROMPT, DEAF or STILLBORN."""


class SimulatedPad(SimulatedMachine):
    async def order(self, sandbox: str, *, manner: Manner = Manner.PROMPT) -> LaunchOrder:
        self.nursery.manner = manner
        await self.cgroups.create(f"sb-{sandbox}", LIMITS)
        self.files.make_run_dir(sandbox)
        slot = await self.network.create_slot(len(self.kernel.slots))
        disk = await self.disks.create(sandbox, LIMITS)
        return make_order(sandbox, cgroup=f"sb-{sandbox}", slot=slot, disk=disk)


@contextlib.asynccontextmanager
async def simulated(_folder: Path) -> AsyncIterator[SimulatedPad]:
    yield SimulatedPad()


class LinuxPad:
    """The launch lab, with an image that has nothing in it."""

    _HOW: ClassVar = {Manner.PROMPT: "", Manner.DEAF: "hang", Manner.STILLBORN: "exit"}

    def __init__(self, folder: Path) -> None:
        from tests.linux.launchlab import Lab

        self._lab = Lab(folder, "ctr0c")
        (folder / "layer").mkdir()
        self._lab.layer = str(folder / "layer")
        self._orders: list[LaunchOrder] = []
        self.cgroups, self.launcher = self._lab.cgroups, self._lab.launcher

    async def open(self) -> None:
        await self._lab.open()

    async def order(self, sandbox: str, *, manner: Manner = Manner.PROMPT) -> LaunchOrder:
        how = self._HOW[manner]
        self._orders.append(await self._lab.order(sandbox, env={"FAIL": how} if how else {}))
        return self._orders[-1]

    async def close(self) -> None:
        for order in self._orders:
            await self.cgroups.kill(order.cgroup, within_s=WITHIN_S)
            for fd in (order.slot.netns_fd, order.slot.userns_fd):
                os.close(fd)
        await self._lab.close()


@contextlib.asynccontextmanager
async def linux(folder: Path) -> AsyncIterator[LinuxPad]:
    pad = LinuxPad(folder / "pad")
    try:
        await pad.open()
        yield pad
    finally:
        await pad.close()


on_both = on_each({"simulated": simulated, "linux": linux})


async def launch(pad: Pad, sandbox: str = "i1") -> tuple[LaunchOrder, Process]:
    order = await pad.order(sandbox)
    return order, await pad.launcher.launch(order, within_s=WITHIN_S)


@on_both
async def test_it_lives_in_its_cgroup_and_says_where_the_time_went(pad: Pad) -> None:
    order, process = await launch(pad)
    assert process.alive()
    assert pad.cgroups.pids(order.cgroup) == [process.pid]
    assert process.steps_ms
    assert all(took >= 0 for took in process.steps_ms.values())
    process.close()


@on_both
async def test_adopted_by_pid_and_start_time_only_while_it_lives(pad: Pad) -> None:
    order, process = await launch(pad)
    adopted = pad.launcher.adopt(process.pid, process.start_ticks)
    assert adopted is not None
    assert (adopted.pid, adopted.start_ticks, adopted.alive()) == (process.pid, process.start_ticks, True)
    assert dict(adopted.steps_ms) == {}
    for ticks in (process.start_ticks + 1, process.start_ticks - 1, 0):
        assert pad.launcher.adopt(process.pid, ticks) is None
    await pad.cgroups.kill(order.cgroup, within_s=WITHIN_S)
    await adopted.wait()
    assert pad.launcher.adopt(process.pid, process.start_ticks) is None
    process.close()
    adopted.close()


@on_both
async def test_all_who_wait_hear_of_its_death_and_so_does_who_comes_late(pad: Pad) -> None:
    _, process = await launch(pad)
    early = [asyncio.ensure_future(process.wait()) for _ in range(3)]
    await asyncio.sleep(0.01)
    assert not any(task.done() for task in early)
    process.signal(signal.SIGKILL)
    assert {await task for task in early} <= set(DEATHS)
    assert not process.alive()
    assert await process.wait() in DEATHS
    process.close()


@on_both
async def test_a_cancelled_wait_leaves_the_process_and_the_next_wait_alone(pad: Pad) -> None:
    _, process = await launch(pad)
    other = asyncio.ensure_future(process.wait())
    waiting = asyncio.ensure_future(process.wait())
    await asyncio.sleep(0.01)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert process.alive()
    assert not other.done()
    process.signal(signal.SIGKILL)
    await other
    await process.wait()
    process.close()


@on_both
async def test_sigterm_ends_a_guest_and_a_signal_to_the_dead_is_success(pad: Pad) -> None:
    _, process = await launch(pad)
    process.signal(signal.SIGTERM)
    await process.wait()
    for number in (signal.SIGTERM, signal.SIGKILL):
        process.signal(number)
    process.close()


@on_both
async def test_neither_closing_a_handle_nor_the_launcher_touches_the_sandbox(pad: Pad) -> None:
    order, process = await launch(pad)
    pid, ticks = process.pid, process.start_ticks
    process.close()
    process.close()
    await pad.launcher.close()
    again = pad.launcher.adopt(pid, ticks)
    assert again is not None
    assert again.alive()
    assert pad.cgroups.pids(order.cgroup) == [pid]
    again.close()


@on_both
async def test_a_guest_that_never_answers_ends_at_the_deadline(pad: Pad) -> None:
    order = await pad.order("i1", manner=Manner.DEAF)
    with pytest.raises(DeadlinePassed, match="i1"):
        await pad.launcher.launch(order, within_s=0.5)
    await settled(pad, order)


@on_both
async def test_a_guest_that_dies_at_birth_is_a_failed_launch_that_names_its_step(pad: Pad) -> None:
    order = await pad.order("i1", manner=Manner.STILLBORN)
    with pytest.raises(LaunchFailed) as failed:
        await pad.launcher.launch(order, within_s=WITHIN_S)
    assert failed.value.step
    assert "i1" in str(failed.value)
    await settled(pad, order)


@on_both
async def test_a_cancelled_launch_leaves_no_process(pad: Pad) -> None:
    for number, after_s in enumerate((0, 0.001, 0.002, 0.004, 0.008)):
        order = await pad.order(f"i{number}")
        launching = asyncio.ensure_future(pad.launcher.launch(order, within_s=WITHIN_S))
        await asyncio.sleep(after_s)
        launching.cancel()
        await asyncio.wait([launching])
        if launching.cancelled():
            assert pad.cgroups.pids(order.cgroup) == []
            assert not order.run_dir or os.listdir(order.run_dir) == []
        else:
            assert pad.cgroups.pids(order.cgroup) == [launching.result().pid]
            launching.result().close()


async def settled(pad: Pad, order: LaunchOrder) -> None:
    """Nothing of the launch is left but what it was given."""
    assert pad.cgroups.pids(order.cgroup) == []
    assert pad.cgroups.list_names() == {order.cgroup}
    assert not order.run_dir or os.listdir(order.run_dir) == []

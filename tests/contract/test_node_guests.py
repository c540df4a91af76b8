"""The port Guests, on both machines: guests that answer, stand still or are gone. What they do is tested elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Protocol

import msgspec
import pytest

from penstock.core.deadlines import DeadlinePassed
from penstock.model.errors import Unavailable
from penstock.node.ports import Cgroups, Guests, LaunchOrder, Notice, Process
from penstock.sim import loop as virtual

from .machines import LIMITS, WITHIN_S, SimulatedMachine, make_order, on_each

DEAF_S = 0.3
NOTICE = Notice(epoch=3, reason="an upgrade", soft_by=1_800_000_000.0, hard_by=1_800_000_060.5)


class Ward(Protocol):
    guests: Guests
    cgroups: Cgroups

    async def sandbox(self, name: str) -> tuple[LaunchOrder, Process]:
        """A running one."""

    def known(self, name: str) -> Notice | None:
        """What its programs are told now, apart from withdrawals."""

    def wall(self) -> float: ...


class SimulatedWard(SimulatedMachine):
    async def sandbox(self, name: str) -> tuple[LaunchOrder, Process]:
        await self.cgroups.create(f"sb-{name}", LIMITS)
        run_dir = self.files.make_run_dir(name)
        slot = await self.network.create_slot(len(self.kernel.slots))
        order = make_order(name, cgroup=f"sb-{name}", slot=slot, disk=await self.disks.create(name, LIMITS))
        order = msgspec.structs.replace(order, run_dir=run_dir)
        return order, await self.launcher.launch(order, within_s=WITHIN_S)

    def known(self, name: str) -> Notice | None:
        newest = self.kernel.notices.get(name, [None])[-1]
        return None if newest is None or newest.withdrawn else newest

    def wall(self) -> float:
        return virtual.SimClock(asyncio.get_running_loop()).wall()


@contextlib.asynccontextmanager
async def simulated(_folder: Path) -> AsyncIterator[SimulatedWard]:
    yield SimulatedWard()


class LinuxWard:
    """The launch lab with the real guest, in images with nothing in them."""

    def __init__(self, folder: Path) -> None:
        from tests.linux.launchlab import Lab

        from penstock.core.clock import SystemClock
        from penstock.node.linux.guests import SocketGuests

        self._lab = Lab(folder, "ctr0g", guest="penstock.guest.main")
        (folder / "layer").mkdir()
        self._lab.layer = str(folder / "layer")
        self._living: dict[str, tuple[LaunchOrder, Process]] = {}
        self.cgroups, self.guests, self.wall = self._lab.cgroups, SocketGuests(), SystemClock().wall

    async def open(self) -> None:
        await self._lab.open()

    async def sandbox(self, name: str) -> tuple[LaunchOrder, Process]:
        order = await self._lab.order(name)
        self._living[name] = (order, await self._lab.launcher.launch(order, within_s=WITHIN_S))
        return self._living[name]

    def known(self, name: str) -> Notice | None:
        file = Path(f"/proc/{self._living[name][1].pid}/root/run/penstock/notice.json")
        return msgspec.json.decode(file.read_bytes(), type=Notice) if file.exists() else None

    async def close(self) -> None:
        for order, process in self._living.values():
            await self._lab.end(order, process)  # type: ignore[arg-type]
        await self._lab.close()


@contextlib.asynccontextmanager
async def linux(folder: Path) -> AsyncIterator[LinuxWard]:
    # Longer than a socket's address may be.
    ward = LinuxWard(folder / ("long" * 25))
    try:
        await ward.open()
        yield ward
    finally:
        await ward.close()


on_both = on_each({"simulated": simulated, "linux": linux})


@on_both
async def test_a_notice_is_known_inside_when_the_call_returns_until_it_is_withdrawn(ward: Ward) -> None:
    order, _ = await ward.sandbox("i1")
    await ward.guests.notify(order.run_dir, NOTICE, within_s=WITHIN_S)
    assert ward.known("i1") == NOTICE
    await ward.guests.notify(order.run_dir, NOTICE, within_s=WITHIN_S)
    assert ward.known("i1") == NOTICE
    await ward.guests.notify(order.run_dir, Notice(epoch=3, withdrawn=True), within_s=WITHIN_S)
    assert ward.known("i1") is None


@on_both
async def test_a_quiesce_says_up_to_when_the_disk_has_it(ward: Ward) -> None:
    order, _ = await ward.sandbox("i1")
    before = ward.wall()
    assert before <= await ward.guests.quiesce(order.run_dir, within_s=WITHIN_S) <= ward.wall()


@on_both
async def test_a_frozen_guest_costs_the_deadline_and_no_more(ward: Ward) -> None:
    order, _ = await ward.sandbox("i1")
    assert await ward.guests.health(order.run_dir, within_s=WITHIN_S)
    await ward.cgroups.freeze(order.cgroup, within_s=WITHIN_S)
    with pytest.raises(DeadlinePassed, match="notice of the guest of i1"):
        await ward.guests.notify(order.run_dir, NOTICE, within_s=DEAF_S)
    with pytest.raises(DeadlinePassed, match="quiesce of the guest of i1"):
        await ward.guests.quiesce(order.run_dir, within_s=DEAF_S)
    assert not await ward.guests.health(order.run_dir, within_s=DEAF_S)
    await ward.cgroups.thaw(order.cgroup, within_s=WITHIN_S)
    assert await ward.guests.health(order.run_dir, within_s=WITHIN_S)


@on_both
async def test_a_guest_that_is_gone_is_unavailable_at_once(ward: Ward) -> None:
    order, process = await ward.sandbox("i1")
    process.signal(9)
    await process.wait()
    with pytest.raises(Unavailable, match="i1"):
        await ward.guests.notify(order.run_dir, NOTICE, within_s=WITHIN_S)
    with pytest.raises(Unavailable, match="i1"):
        await ward.guests.quiesce(order.run_dir, within_s=WITHIN_S)
    assert not await ward.guests.health(order.run_dir, within_s=WITHIN_S)
    nowhere = os.path.join(os.path.dirname(order.run_dir), "i2")
    with pytest.raises(Unavailable, match="i2"):
        await ward.guests.notify(nowhere, NOTICE, within_s=WITHIN_S)

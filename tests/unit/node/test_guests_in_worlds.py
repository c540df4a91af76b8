"""The guests of a world with traffic hear of drains as those of a real node do: by the production route."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path

import msgspec
import pytest

from penstock.model.errors import Unavailable
from penstock.model.sandbox import Limits
from penstock.node.linux.guests import SocketGuests
from penstock.node.ports import GuestConfig, LaunchOrder, Notice
from penstock.sim import loop as virtual
from penstock.sim.faults import Faults, Rates
from penstock.sim.guests import Nursery
from penstock.sim.inhabitants import House, guest_address
from penstock.sim.kernel import Kernel, Life, Proc
from penstock.sim.net import Net
from penstock.sim.trace import Trace

NOTICE = Notice(epoch=2, reason="an upgrade", soft_by=None, hard_by=1_800_000_000.0)


class Place:
    """A kernel with one sandbox, `i1`, whose guest is the production one."""

    def __init__(self, folder: Path, clock: virtual.SimClock) -> None:
        rng = random.Random(1)
        self.folder, self.faults_found = folder, list[str]()
        self.kernel = Kernel(faults=Faults(rng, Rates()), nursery=Nursery(rng, odd=0.0), trace=Trace(clock.monotonic))
        net = Net(rng)
        self.kernel.in_person = SocketGuests(lambda path: net.open_streams(guest_address(path)))
        self.house = House(net, clock, rng, folder, self.faults_found.append)
        self.ports = self.kernel.ports(Life(1))

    async def launch(self) -> tuple[LaunchOrder, Proc]:
        limits = Limits()
        await self.ports.cgroups.create("sb-i1", limits)
        guest = GuestConfig(
            sandbox_id="i1", template_id="t", access_token=None, env={}, user="user", workdir="/", hostname="i1"
        )
        order = LaunchOrder(
            sandbox="i1",
            cgroup="sb-i1",
            layers=[],
            disk=await self.ports.disks.create("i1", limits),
            slot=await self.ports.network.create_slot(0),
            limits=limits,
            run_dir=self.ports.files.make_run_dir("i1"),
            guest=guest,
        )
        process = await self.ports.launcher.launch(order, within_s=5)
        proc = self.kernel.processes[process.pid]
        self.house.move_in(proc)
        return order, proc

    def file(self) -> Path:
        return self.folder / "i1.run/penstock/notice.json"


def test_a_simulated_notice_is_filed_by_the_production_guest_and_remembered(tmp_path: Path) -> None:
    async def play() -> None:
        clock = virtual.SimClock(asyncio.get_running_loop())
        place = Place(tmp_path, clock)
        order, proc = await place.launch()
        guests = place.ports.guests
        assert await guests.health(order.run_dir, within_s=5)
        await guests.notify(order.run_dir, NOTICE, within_s=5)
        assert msgspec.json.decode(place.file().read_bytes(), type=Notice) == NOTICE
        assert place.kernel.notices == {"i1": [NOTICE]}
        await guests.notify(order.run_dir, Notice(epoch=1, reason="too late"), within_s=5)
        assert json.loads(place.file().read_text())["epoch"] == 2
        before = clock.wall()
        assert before <= await guests.quiesce(order.run_dir, within_s=5) <= clock.wall()
        place.kernel.end_process(proc)
        place.house.move_out(proc.pid)
        with pytest.raises(Unavailable, match="i1"):
            await guests.notify(order.run_dir, NOTICE, within_s=5)
        place.house.close()
        assert place.faults_found == []

    virtual.run(play(), 1)

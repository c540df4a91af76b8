"""Objects without a record, records without objects: named by kind, and what nobody owns is removed."""

from __future__ import annotations

import asyncio

import pytest

from penstock.model.sandbox import EgressRules, Limits
from penstock.node.ports import Stray
from penstock.node.reap import Leak, Sweeper, find_leaks
from penstock.node.record import Pooled, encode
from tests.unit.node.plant import SETTINGS, Plant, play

WHY = "no record names it"


def test_a_node_at_work_leaks_nothing() -> None:
    async def script(plant: Plant) -> None:
        sandbox = await plant.ready()
        assert find_leaks(plant.ports) == []
        await plant.stop(sandbox)
        await plant.ended(sandbox)
        await asyncio.sleep(1.0)
        assert find_leaks(plant.ports) == []

    play(script)


def test_every_kind_of_orphan_is_named_and_removed() -> None:
    async def script(plant: Plant) -> None:
        await asyncio.sleep(0.5)  # the pools are full
        kernel = plant.kernel
        kernel.cgroups["sb-ix"] = False
        kernel.slots[7] = EgressRules()
        kernel.disks["iy"] = Limits()
        kernel.run_dirs.add("iz")
        assert find_leaks(plant.ports) == [
            Leak("cgroup", "sb-ix", WHY),
            Leak("disk", "iy", WHY),
            Leak("run_dir", "iz", WHY),
            Leak("slot", "7", WHY),
        ]
        sweeper = Sweeper(plant.ports, step_within_s=2.0)
        assert await sweeper.sweep() == []
        assert sweeper.removed_total == 4
        assert find_leaks(plant.ports) == []
        assert 7 not in kernel.slots

    play(script)


def test_a_living_daemon_sweeps_now_and_then() -> None:
    async def script(plant: Plant) -> None:
        plant.kernel.cgroups["sb-ix"] = False
        await asyncio.sleep(SETTINGS.sweep_every_s + 1.0)
        assert "sb-ix" not in plant.kernel.cgroups
        assert plant.node.statistics().swept_total == {"cgroup": 1}

    play(script)


def test_records_without_objects_are_named_by_kind_and_kept() -> None:
    async def script(plant: Plant) -> None:
        sandbox = await plant.ready()
        await plant.kill_daemon()
        kernel = plant.kernel
        kernel.records["slot99"] = [encode(Pooled(kind="slot", number=99))]
        kernel.records["disk99"] = [encode(Pooled(kind="disk", number=99))]
        kernel.reboot()
        kernel.run_dirs.clear()
        reader = kernel.ports(type(plant.life)(99))
        found = find_leaks(reader)
        assert Leak("record", sandbox, "none of the objects it names exists") in found
        assert Leak("record", "slot99", "its slot does not exist") in found
        assert Leak("record", "disk99", "its disk does not exist") in found
        assert sandbox in kernel.records
        await plant.start_node()
        await plant.ended(sandbox)
        await asyncio.sleep(1.0)
        assert find_leaks(plant.ports) == []

    play(script)


def test_a_first_process_outside_its_cgroup_is_named() -> None:
    async def script(plant: Plant) -> None:
        sandbox = await plant.ready()
        (pid,) = plant.processes_of(sandbox)
        plant.kernel.processes[pid].cgroup = None
        found = find_leaks(plant.ports)
        assert Leak("process", str(pid), f"first process of {sandbox}, outside its cgroup") in found

    play(script)


def test_a_stray_that_pins_a_namespace_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    async def script(plant: Plant) -> None:
        await asyncio.sleep(0.5)
        assert plant.ports.strays is not None
        monkeypatch.setattr(type(plant.ports.strays), "list_strays", lambda self: [Stray(4711, "netns of slot 3")])
        assert find_leaks(plant.ports) == [
            Leak("process", "4711", "outside every cgroup of ours, and it pins netns of slot 3")
        ]

    play(script)


def test_what_cannot_be_removed_is_said_and_tried_again() -> None:
    async def script(plant: Plant) -> None:
        await asyncio.sleep(0.5)  # the pools are full
        plant.kernel.cgroups["sb-ix"] = False
        plant.faults.stuck.add("cgroup remove")
        sweeper = Sweeper(plant.ports, step_within_s=2.0)
        (leak,) = await sweeper.sweep()
        assert (leak.kind, leak.name) == ("cgroup", "sb-ix")
        assert "not removed" in leak.why
        plant.faults.stuck.clear()
        assert await sweeper.sweep() == []

    play(script)


def test_a_sweep_that_cannot_look_says_so_and_harms_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    async def script(plant: Plant) -> None:
        def fails(self: object) -> set[str]:
            raise OSError(24, "Too many open files")

        with monkeypatch.context() as patched:
            patched.setattr(type(plant.ports.cgroups), "list_names", fails)
            (leak,) = await Sweeper(plant.ports, step_within_s=2.0).sweep()
        assert leak.kind == "sweep"
        assert "Too many open files" in leak.why

    play(script)


def test_a_record_of_nothing_and_nobody_goes_at_the_second_look_and_an_unreadable_one_stays() -> None:
    async def script(plant: Plant) -> None:
        sandbox = await plant.ready()
        await asyncio.sleep(0.5)  # the pools are full
        kernel = plant.kernel
        kernel.records["slot99"] = [encode(Pooled(kind="slot", number=99))]
        kernel.records["ix"] = [b'{"k":"born","v":999}', b"{}"]
        await plant.node.sweep()
        assert "slot99" in kernel.records, "it may have been between its record and its object"
        assert await plant.node.sweep() == {"record": 1}
        assert "slot99" not in kernel.records
        assert {"ix", sandbox} <= set(kernel.records)
        assert [leak.name for leak in plant.node.leaks] == ["ix"]
        del kernel.records["ix"]

    play(script)

"""After the daemon's death: what lives is taken up, what was half done is finished, doubt harms nobody."""

from __future__ import annotations

import asyncio

import pytest

from penstock.model.sandbox import EgressRules, KillReason, Phase
from penstock.node.record import Due, encode
from penstock.sim.guests import Manner
from tests.unit.node.plant import Plant, play


def test_a_ready_sandbox_lives_on_and_obeys_the_next_daemon() -> None:
    async def script(plant: Plant) -> None:
        sandbox = await plant.ready()
        before = plant.statuses.get(sandbox)
        assert before is not None
        await plant.restart()
        (pid,) = plant.processes_of(sandbox)
        assert pid == before.pid
        rules = EgressRules(internet=False)
        revision = await plant.change(sandbox, egress=rules)
        after = await plant.statuses.wait_for(
            sandbox, lambda seen: seen is not None and seen.spec_revision >= revision, within_s=5
        )
        assert after is not None
        assert (after.phase, after.pid, after.slot, after.address) == (
            Phase.READY,
            pid,
            before.slot,
            before.address,
        )
        assert (after.guest_socket, after.started_at) == (before.guest_socket, before.started_at)
        assert plant.kernel.slots[before.slot] == rules
        await plant.stop(sandbox)
        await plant.ended(sandbox)
        assert plant.left_of(sandbox) == []

    play(script)


def test_rules_changed_while_no_daemon_ran_are_put_in_force() -> None:
    async def script(plant: Plant) -> None:
        sandbox = await plant.ready()
        status = plant.statuses.get(sandbox)
        assert status is not None
        await plant.kill_daemon()
        await plant.change(sandbox, egress=EgressRules(internet=False))
        await plant.start_node()
        await asyncio.sleep(0.5)
        assert plant.kernel.slots[status.slot] == EgressRules(internet=False)

    play(script)


def test_what_ready_slots_and_disks_were_left_is_destroyed_and_made_anew() -> None:
    async def script(plant: Plant) -> None:
        await asyncio.sleep(0.5)
        assert len(plant.kernel.slots) == 2
        await plant.restart()
        await asyncio.sleep(0.5)
        assert len(plant.kernel.slots) == 2
        assert len(plant.kernel.disks) == 2
        assert plant.node.leaks == ()

    play(script)


@pytest.mark.parametrize("appends", range(1, 14))
def test_a_start_cut_off_between_any_two_lines_is_undone_and_answered_once(appends: int) -> None:
    async def script(plant: Plant) -> None:
        await asyncio.sleep(0.5)  # pools are full: from here on every append is the sandbox's
        plant.life._appends_left = appends
        sandbox = await plant.create()
        await asyncio.sleep(0.1)
        before = plant.statuses.get(sandbox)
        was_ready = before is not None and before.phase is Phase.READY
        await plant.restart()
        status = await plant.reach(sandbox, Phase.READY, Phase.FAILED)
        if status.phase is Phase.FAILED:
            assert not was_ready
            assert plant.left_of(sandbox) == []
        else:
            assert plant.processes_of(sandbox)
            await plant.stop(sandbox)
            await plant.ended(sandbox)
        await asyncio.sleep(1.0)
        assert plant.left_of(sandbox) == []
        assert plant.node.leaks == ()

    play(script)


@pytest.mark.parametrize("appends", range(1, 8))
def test_an_end_cut_off_between_any_two_lines_is_finished(appends: int) -> None:
    async def script(plant: Plant) -> None:
        sandbox = await plant.ready()
        await asyncio.sleep(0.5)
        plant.life._appends_left = appends
        await plant.stop(sandbox)
        await asyncio.sleep(0.1)
        await plant.restart()
        status = await plant.ended(sandbox)
        assert (status.phase, status.kill_reason) == (Phase.STOPPED, KillReason.REQUEST)
        assert plant.left_of(sandbox) == []

    play(script)


def test_one_that_died_while_no_daemon_ran_is_released() -> None:
    async def script(plant: Plant) -> None:
        sandbox = await plant.ready()
        await plant.kill_daemon()
        for proc in list(plant.kernel.processes.values()):
            plant.kernel.end_process(proc)
        await plant.start_node()
        status = await plant.ended(sandbox)
        assert (status.phase, status.kill_reason) == (Phase.STOPPED, KillReason.CRASHED)
        assert plant.left_of(sandbox) == []

    play(script)


def test_one_whose_time_came_while_no_daemon_ran_ends_at_once() -> None:
    async def script(plant: Plant) -> None:
        sandbox = await plant.ready(lives_s=20.0)
        await plant.kill_daemon()
        await asyncio.sleep(30.0)
        await plant.start_node()
        status = await plant.ended(sandbox, within_s=1.0)
        assert status.kill_reason is KillReason.TIMEOUT

    play(script)


def test_another_boot_means_gone_and_its_files_are_cleared() -> None:
    async def script(plant: Plant) -> None:
        sandbox = await plant.ready()
        await plant.restart(reboot=True)
        status = await plant.ended(sandbox)
        assert (status.phase, status.kill_reason) == (Phase.STOPPED, KillReason.REBOOT)
        assert "anew" in status.because
        assert plant.left_of(sandbox) == []

    play(script)


def test_doubt_is_said_and_kills_nobody_until_somebody_orders_it() -> None:
    async def script(plant: Plant) -> None:
        sandbox = await plant.ready()
        (pid,) = plant.processes_of(sandbox)
        await plant.kill_daemon()
        plant.kernel.processes[pid].cgroup = None
        await plant.start_node()
        status = await plant.reach(sandbox, Phase.UNKNOWN)
        assert "outside its cgroup" in status.because
        await asyncio.sleep(60.0)
        assert plant.processes_of(sandbox) == [pid]
        await plant.stop(sandbox)
        await plant.ended(sandbox)
        assert plant.left_of(sandbox) == []

    play(script)


def test_doubt_ends_when_the_kernel_can_tell_again() -> None:
    async def script(plant: Plant) -> None:
        sandbox = await plant.ready()
        (pid,) = plant.processes_of(sandbox)
        await plant.kill_daemon()
        plant.kernel.processes[pid].cgroup = None
        await plant.start_node()
        await plant.reach(sandbox, Phase.UNKNOWN)
        plant.kernel.processes[pid].cgroup = f"sb-{sandbox}"
        status = await plant.reach(sandbox, Phase.READY, within_s=60)
        assert status.pid == pid
        await plant.stop(sandbox)
        await plant.ended(sandbox)

    play(script)


@pytest.mark.parametrize("line", [b'{"k":"due","v":99,"end_at":1.0}', b"{not json"])
def test_a_record_nobody_understands_pins_everything_it_may_name(line: bytes) -> None:
    async def script(plant: Plant) -> None:
        sandbox = await plant.ready()
        status = plant.statuses.get(sandbox)
        assert status is not None
        (pid,) = plant.processes_of(sandbox)
        await plant.kill_daemon()
        plant.kernel.records[sandbox] += [line, encode(Due(end_at=1.0))]
        before = list(plant.kernel.records[sandbox])
        await plant.start_node()
        unknown = await plant.reach(sandbox, Phase.UNKNOWN)
        assert "cannot be read" in unknown.because
        await asyncio.sleep(120.0)
        assert plant.processes_of(sandbox) == [pid]
        assert plant.kernel.records[sandbox] == before
        assert status.slot in plant.kernel.slots
        others = [await plant.ready(f"o{number}") for number in range(3)]
        assert status.slot not in {plant.statuses.get(other).slot for other in others}  # type: ignore[union-attr]
        assert any("cannot be read" in leak.why for leak in plant.node.leaks)
        # An operator decides: the record goes, and with the next daemon everything it named.
        del plant.kernel.records[sandbox]
        await plant.restart()
        await asyncio.sleep(1.0)
        assert plant.left_of(sandbox) == []
        assert (await plant.ended(sandbox)).phase is Phase.STOPPED

    play(script)


def test_what_an_earlier_daemon_ran_without_leaving_a_record_is_over_and_not_started_again() -> None:
    async def script(plant: Plant) -> None:
        sandbox = await plant.ready()
        await plant.kill_daemon()
        plant.kernel.reboot()
        plant.kernel.records.clear()
        await plant.start_node()
        assert (await plant.ended(sandbox)).phase is Phase.STOPPED
        assert plant.processes_of(sandbox) == []

    play(script)


def test_a_start_that_still_waited_for_its_turn_is_started_by_the_next_daemon() -> None:
    async def script(plant: Plant) -> None:
        plant.nursery.manner = Manner.SLOW
        sandboxes = [await plant.create(f"s{number}") for number in range(12)]
        await asyncio.sleep(0.1)
        await plant.restart()
        phases = [(await plant.reach(sandbox, Phase.READY, Phase.FAILED, within_s=60)).phase for sandbox in sandboxes]
        assert phases[-1] is Phase.FAILED or phases.count(Phase.FAILED) == 8

    play(script)

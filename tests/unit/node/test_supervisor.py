"""One sandbox's life on its node, from the spec to nothing left."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from penstock.core.deadlines import DeadlinePassed
from penstock.model.ids import BuildId
from penstock.model.sandbox import EgressRules, KillReason, Limits, Phase
from penstock.node import serve
from penstock.node.supervisor import Supervisor
from penstock.sim.guests import Manner
from tests.unit.node.plant import SETTINGS, Plant, play


def test_a_bound_sandbox_becomes_ready_with_everything_it_needs() -> None:
    async def script(plant: Plant) -> None:
        rules = EgressRules(internet=False)
        sandbox = await plant.ready(egress=rules, env={"MINE": "1"})
        status = plant.statuses.get(sandbox)
        assert status is not None
        (pid,) = plant.processes_of(sandbox)
        proc = plant.kernel.processes[pid]
        assert (status.pid, status.start_ticks, status.boot_id) == (pid, proc.start_ticks, plant.kernel.boot_id)
        assert (status.slot, status.address) == (proc.order.slot.number, proc.order.slot.address)
        assert status.guest_socket == f"{proc.order.run_dir}/guest.sock"
        assert status.started_at == pytest.approx(plant.clock.wall(), abs=1)
        assert list(status.steps_ms) == ["run_dir", "slot", "disk", "cgroup", "rules", "process", "launch.hello"]
        assert plant.kernel.slots[status.slot] == rules
        assert proc.order.guest.env == {"FROM": "build", "MINE": "1"}
        assert proc.order.guest.access_token
        assert proc.order.layers == ("/layers/0",)
        assert plant.node.living()[0].id == sandbox

    play(script)


def test_a_kill_leaves_nothing_and_is_quick() -> None:
    async def script(plant: Plant) -> None:
        sandbox = await plant.ready()
        began = plant.clock.monotonic()
        await plant.stop(sandbox)
        status = await plant.ended(sandbox)
        assert (status.phase, status.kill_reason, status.because) == (
            Phase.STOPPED,
            KillReason.REQUEST,
            "stopped by test",
        )
        assert plant.left_of(sandbox) == []
        assert plant.clock.monotonic() - began < 0.05
        statistics = plant.node.statistics()
        assert statistics.ended_total == {"request": 1}
        assert statistics.sandboxes == {}
        assert len(statistics.released_ms) == 1

    play(script)


def test_another_disk_size_is_made_on_demand() -> None:
    async def script(plant: Plant) -> None:
        sandbox = await plant.ready(limits=Limits(disk_bytes_max=5 * 1024**3))
        assert plant.kernel.disks[sandbox].disk_bytes_max == 5 * 1024**3
        assert plant.node.disk_name(sandbox) == sandbox
        other = await plant.ready("b")
        assert plant.node.disk_name(other).startswith("disk")
        await plant.stop(sandbox)
        await plant.ended(sandbox)
        assert sandbox not in plant.kernel.disks

    play(script)


@pytest.mark.parametrize("step", ["cgroup create", "rules of slot", "launch", "disk create", "slot create"])
def test_a_start_that_fails_half_way_leaves_nothing(step: str) -> None:
    async def script(plant: Plant) -> None:
        plant.faults.failing.add(step)
        sandbox = await plant.create()
        status = await plant.ended(sandbox)
        assert status.phase is Phase.FAILED
        assert status.kill_reason is KillReason.START_FAILED
        assert step in status.because
        assert plant.left_of(sandbox) == []
        plant.faults.failing.clear()
        await plant.ready("b")

    play(script, msgspec.structs.replace(SETTINGS, slots_ready=0, disks_ready=0))


@pytest.mark.parametrize(("manner", "why"), [(Manner.DEAF, "guest hello"), (Manner.STILLBORN, "pid 1 ended")])
def test_a_guest_that_never_answers_is_a_failed_start(manner: Manner, why: str) -> None:
    async def script(plant: Plant) -> None:
        plant.nursery.manner = manner
        sandbox = await plant.create()
        status = await plant.ended(sandbox)
        assert status.phase is Phase.FAILED
        assert why in status.because
        assert plant.left_of(sandbox) == []

    play(script)


def test_a_kill_does_not_wait_for_a_deaf_guest() -> None:
    async def script(plant: Plant) -> None:
        plant.nursery.manner = Manner.DEAF
        sandbox = await plant.create()
        await plant.reach(sandbox, Phase.STARTING)
        await asyncio.sleep(0.1)
        began = plant.clock.monotonic()
        await plant.stop(sandbox)
        status = await plant.ended(sandbox)
        assert (status.phase, status.kill_reason) == (Phase.FAILED, KillReason.REQUEST)
        assert plant.clock.monotonic() - began < 0.5
        assert plant.left_of(sandbox) == []

    play(script)


def test_a_build_that_is_not_here_is_a_failed_start() -> None:
    async def script(plant: Plant) -> None:
        sandbox = await plant.create(build=BuildId("elsewhere"))
        status = await plant.ended(sandbox)
        assert status.phase is Phase.FAILED
        assert "elsewhere" in status.because

    play(script)


def test_the_death_of_the_first_process_ends_the_sandbox() -> None:
    async def script(plant: Plant) -> None:
        plant.nursery.manner = Manner.MORTAL
        sandbox = await plant.ready()
        status = await plant.ended(sandbox)
        assert (status.phase, status.kill_reason) == (Phase.STOPPED, KillReason.CRASHED)
        assert plant.left_of(sandbox) == []

    play(script)


def test_starts_beyond_the_concurrency_wait_in_order_and_are_not_refused() -> None:
    async def script(plant: Plant) -> None:
        plant.nursery.manner = Manner.SLOW
        sandboxes = [await plant.create(f"s{number}") for number in range(6)]
        began = [(await plant.reach(sandbox, Phase.READY)).started_at for sandbox in sandboxes]
        assert began == sorted(began)
        assert plant.clock.monotonic() > 3 * 2.0
        assert plant.node.statistics().refused_total == {}

    play(script, msgspec.structs.replace(SETTINGS, starts_running_max=2))


def test_beyond_the_queue_a_start_is_refused_with_a_reason_and_taken_when_asked_again() -> None:
    async def script(plant: Plant) -> None:
        plant.nursery.manner = Manner.SLOW
        sandboxes = [await plant.create(f"s{number}") for number in range(3)]
        status = await plant.reach(sandboxes[2], Phase.PENDING)
        assert "refused" in status.because
        assert "1 run and 1 wait" in status.because
        assert plant.left_of(sandboxes[2]) == []
        await plant.reach(sandboxes[1], Phase.READY)
        await plant.change(sandboxes[2])
        await plant.reach(sandboxes[2], Phase.READY)
        assert plant.node.statistics().refused_total == {"breaker_full": 1}

    play(script, msgspec.structs.replace(SETTINGS, starts_running_max=1, starts_waiting_max=1))


def test_all_slots_in_use_is_a_clear_failure() -> None:
    async def script(plant: Plant) -> None:
        await plant.ready("a")
        await plant.ready("b")
        status = await plant.ended(await plant.create("c"))
        assert status.phase is Phase.FAILED
        assert "no free slot" in status.because
        assert "all 2 are in use" in status.because

    play(script, msgspec.structs.replace(SETTINGS, slot_count=2))


def test_new_egress_rules_are_in_force_when_the_status_says_so() -> None:
    async def script(plant: Plant) -> None:
        sandbox = await plant.ready()
        rules = EgressRules(allow=("198.51.100.7",), internet=False)
        revision = await plant.change(sandbox, egress=rules)
        status = await plant.statuses.wait_for(
            sandbox, lambda seen: seen is not None and seen.spec_revision >= revision, within_s=5
        )
        assert status is not None
        assert plant.kernel.slots[status.slot] == rules

    play(script)


def test_rules_that_cannot_be_applied_are_not_reported_and_tried_again() -> None:
    async def script(plant: Plant) -> None:
        sandbox = await plant.ready()
        plant.faults.failing.add("rules of slot")
        rules = EgressRules(internet=False)
        revision = await plant.change(sandbox, egress=rules)
        await asyncio.sleep(2.0)
        status = plant.statuses.get(sandbox)
        assert status is not None
        assert status.spec_revision < revision
        plant.faults.failing.clear()
        await plant.statuses.wait_for(
            sandbox, lambda seen: seen is not None and seen.spec_revision >= revision, within_s=30
        )
        assert plant.kernel.slots[status.slot] == rules

    play(script)


def test_the_node_ends_it_by_itself_while_everything_above_is_away() -> None:
    async def script(plant: Plant) -> None:
        sandbox = await plant.ready(lives_s=10.0)
        end_at = plant.node.explain(sandbox).end_at  # type: ignore[union-attr]
        plant.log.delay_s = 1e6  # the store takes nothing any more, so no report and no order passes
        await asyncio.sleep(end_at - plant.clock.wall() - 0.1)
        assert plant.processes_of(sandbox)
        await asyncio.sleep(1.1)
        assert plant.left_of(sandbox) == []

    with pytest.raises(ExceptionGroup) as caught:
        play(script)
    assert caught.group_contains(DeadlinePassed, match="the last reports")


@pytest.mark.parametrize("step_s", [3600.0, -3600.0])
def test_a_step_of_the_wall_clock_moves_ends_with_it(step_s: float) -> None:
    async def script(plant: Plant) -> None:
        sandbox = await plant.ready(lives_s=60.0)
        plant.clock.jump(step_s)
        await asyncio.sleep(1.0)
        assert bool(plant.processes_of(sandbox)) == (step_s < 0)
        await asyncio.sleep(60.0)
        assert bool(plant.processes_of(sandbox)) == (step_s < 0)

    play(script)


def test_a_later_end_is_kept_and_a_nearer_one_too() -> None:
    async def script(plant: Plant) -> None:
        sandbox = await plant.ready(lives_s=5.0)
        await plant.change(sandbox, end_at=plant.clock.wall() + 60.0)
        await asyncio.sleep(30.0)
        assert plant.processes_of(sandbox)
        await plant.change(sandbox, end_at=plant.clock.wall() + 2.0)
        await asyncio.sleep(3.0)
        status = await plant.ended(sandbox)
        assert status.kill_reason is KillReason.TIMEOUT

    play(script)


def test_a_release_that_stays_busy_is_quarantined_pins_what_lies_beneath_and_is_reaped() -> None:
    async def script(plant: Plant) -> None:
        sandbox = await plant.ready()
        status = plant.statuses.get(sandbox)
        assert status is not None
        plant.faults.stuck.add("cgroup remove")
        await plant.stop(sandbox)
        quarantined = await plant.reach(sandbox, Phase.QUARANTINED)
        assert "cgroup remove" in quarantined.because
        assert plant.node.statistics().quarantined == 1
        explained = plant.node.explain(sandbox)
        assert explained is not None
        assert explained.holds == ("run_dir", "slot", "disk", "cgroup")
        await asyncio.sleep(20.0)
        assert status.slot in plant.kernel.slots, "a slot is not given up while its cgroup is not verified gone"
        plant.faults.stuck.clear()
        assert (await plant.ended(sandbox, within_s=60)).phase is Phase.STOPPED
        assert plant.left_of(sandbox) == []

    play(script)


def test_a_removed_spec_ends_the_sandbox() -> None:
    async def script(plant: Plant) -> None:
        sandbox = await plant.ready()
        await plant.remove(sandbox)
        await asyncio.sleep(1.0)
        assert plant.left_of(sandbox) == []

    play(script)


def test_what_ended_before_it_ran_is_reported_without_being_started() -> None:
    async def script(plant: Plant) -> None:
        sandbox = await plant.create(lives_s=-1.0)
        status = await plant.ended(sandbox)
        assert (status.phase, status.kill_reason) == (Phase.STOPPED, KillReason.TIMEOUT)
        assert not any("process made" in line for line in plant.trace.tail().splitlines())

    play(script)


def test_after_a_bug_a_sandbox_is_taken_up_again_from_its_record(monkeypatch: pytest.MonkeyPatch) -> None:
    original = serve._conform

    async def raises_once(one: Supervisor) -> None:
        monkeypatch.setattr(serve, "_conform", original)
        raise RuntimeError("a bug")

    async def script(plant: Plant) -> None:
        sandbox = await plant.ready()
        (pid,) = plant.processes_of(sandbox)
        monkeypatch.setattr(serve, "_conform", raises_once)
        rules = EgressRules(internet=False)
        await plant.change(sandbox, egress=rules)
        await asyncio.sleep(3.0)
        assert plant.processes_of(sandbox) == [pid]
        status = plant.statuses.get(sandbox)
        assert status is not None
        assert status.phase is Phase.READY
        assert plant.kernel.slots[status.slot] == rules
        assert "a bug" in plant.node.statistics().bugs[0]
        await plant.stop(sandbox)
        await plant.ended(sandbox)

    play(script)

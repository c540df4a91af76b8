"""Pausing on one node: frozen, parked, checkpointed; through crashes, drains and full disks nothing is lost."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from penstock.model import keys
from penstock.model.drain import Disposition, Fate
from penstock.model.ids import SandboxId, SnapshotId
from penstock.model.sandbox import Checkpoint, EgressRules, KillReason, OnTimeout, Phase, SandboxStatus
from penstock.model.snapshot import Snapshot, SnapshotKind
from penstock.sim.guests import Manner
from tests.unit.node.plant import Plant, play
from tests.unit.node.test_drain import Operator

S1 = SnapshotId("s1")


def snapshots(plant: Plant) -> dict[str, Snapshot]:
    listing = plant.store.list(keys.SNAPSHOT)
    return {found.id: found for found in (msgspec.json.decode(each.value, type=Snapshot) for each in listing.records)}


def frozen(plant: Plant, sandbox: str) -> bool:
    return plant.kernel.cgroups[f"sb-{sandbox}"]


def status_of(plant: Plant, sandbox: SandboxId) -> SandboxStatus:
    found = plant.statuses.get(sandbox)
    assert found is not None
    return found


def test_paused_it_stands_still_past_its_end_and_resumed_it_goes_on() -> None:
    async def script(plant: Plant) -> None:
        sandbox = await plant.ready(lives_s=5.0)
        (pid,) = plant.processes_of(sandbox)
        await plant.change(sandbox, frozen=True)
        paused = await plant.reach(sandbox, Phase.PAUSED)
        assert frozen(plant, sandbox)
        assert paused.durable_up_to > 0
        await asyncio.sleep(60.0)
        assert status_of(plant, sandbox).phase is Phase.PAUSED
        await plant.change(sandbox, frozen=False, end_at=plant.clock.wall() + 10.0)
        await plant.reach(sandbox, Phase.READY)
        assert not frozen(plant, sandbox)
        assert plant.processes_of(sandbox) == [pid]
        ended = await plant.ended(sandbox)
        assert ended.kill_reason is KillReason.TIMEOUT

    play(script)


def test_one_that_pauses_at_its_end_is_never_killed_by_it() -> None:
    async def script(plant: Plant) -> None:
        sandbox = await plant.ready(lives_s=3.0, on_timeout=OnTimeout.PAUSE)
        await plant.reach(sandbox, Phase.PAUSED)
        assert "time was over" in status_of(plant, sandbox).because
        await plant.change(sandbox, end_at=plant.clock.wall() + 5.0)
        await plant.reach(sandbox, Phase.READY)
        await plant.reach(sandbox, Phase.PAUSED)
        await plant.stop(sandbox)
        assert (await plant.ended(sandbox)).kill_reason is KillReason.REQUEST

    play(script)


@pytest.mark.parametrize("on_timeout", [OnTimeout.PAUSE, OnTimeout.PARK])
def test_an_end_that_came_while_no_daemon_ran_still_means_a_pause(on_timeout: OnTimeout) -> None:
    """The daemon that comes back knows the record before it has seen the spec: it must not take the end for a kill."""

    async def script(plant: Plant) -> None:
        sandbox = await plant.ready(lives_s=5.0, on_timeout=on_timeout)
        await plant.kill_daemon()
        await asyncio.sleep(30.0)
        await plant.start_node()
        if on_timeout is OnTimeout.PAUSE:
            await plant.reach(sandbox, Phase.PAUSED)
        else:
            assert (await plant.ended(sandbox)).kill_reason is KillReason.PAUSED
            assert [each.sandbox for each in snapshots(plant).values()] == [sandbox]

    play(script)


def test_parked_its_disk_is_an_image_and_everything_else_is_given_back() -> None:
    async def script(plant: Plant) -> None:
        sandbox = await plant.ready()
        await plant.change(sandbox, park=S1)
        ended = await plant.ended(sandbox)
        assert (ended.phase, ended.kill_reason) == (Phase.STOPPED, KillReason.PAUSED)
        assert plant.left_of(sandbox) == []
        assert set(plant.kernel.images) == {S1}
        kept = snapshots(plant)[S1]
        assert (kept.kind, kept.sandbox, kept.memory) == (SnapshotKind.PAUSED, sandbox, False)
        assert kept.durable_up_to > 0
        assert (kept.spec.node, kept.spec.park, kept.spec.stop) == (None, None, None)

    play(script)


def test_a_resume_begins_with_the_image_and_keeps_it_until_somebody_drops_it() -> None:
    async def script(plant: Plant) -> None:
        sandbox = await plant.ready()
        await plant.change(sandbox, park=S1)
        await plant.ended(sandbox)
        await plant.remove(sandbox)
        await asyncio.sleep(0.1)
        again = await plant.create(snapshot=S1)
        assert again == sandbox
        await plant.reach(sandbox, Phase.READY)
        assert f"disk {sandbox}" in plant.left_of(sandbox)
        assert set(plant.kernel.images) == {S1}
        await plant.store.delete(keys.SNAPSHOT + S1, by="control")
        await asyncio.sleep(0.1)
        assert not plant.kernel.images

    play(script)


def test_killed_while_it_is_parked_the_snapshot_is_there_all_the_same() -> None:
    async def script(plant: Plant) -> None:
        sandbox = await plant.ready()
        await plant.change(sandbox, park=S1)
        await asyncio.sleep(0.001)
        await plant.stop(sandbox)
        await plant.ended(sandbox)
        assert set(snapshots(plant)) == set(plant.kernel.images) == {S1}

    play(script)


@pytest.mark.parametrize("crash_after", range(1, 14))
def test_a_daemon_that_dies_at_any_write_of_a_park_leaves_a_sandbox_or_a_snapshot(crash_after: int) -> None:
    async def script(plant: Plant) -> None:
        sandbox = await plant.ready()
        plant.life._appends_left = crash_after
        await plant.change(sandbox, park=S1)
        await asyncio.sleep(3.0)
        if plant.life.dead:
            await plant.restart()
        ended = await plant.ended(sandbox)
        assert ended.kill_reason is KillReason.PAUSED
        assert set(snapshots(plant)) == set(plant.kernel.images) == {S1}
        assert plant.left_of(sandbox) == []

    play(script)


def test_a_snapshot_the_store_cannot_take_yet_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    async def script(plant: Plant) -> None:
        sandbox = await plant.ready()
        original = plant.node._reporter.keep

        async def fails(snapshot: Snapshot) -> None:
            raise OSError(28, "No space left on device")

        plant.node._reporter.keep = fails  # type: ignore[method-assign]
        await plant.change(sandbox, park=S1)
        await plant.reach(sandbox, Phase.QUARANTINED)
        assert "No space left" in status_of(plant, sandbox).because
        assert set(plant.kernel.images) == {S1}
        plant.node._reporter.keep = original  # type: ignore[method-assign]
        await plant.ended(sandbox, within_s=60.0)
        assert set(snapshots(plant)) == {S1}

    play(script)


def test_a_park_that_fails_keeps_the_disk_until_it_succeeds() -> None:
    async def script(plant: Plant) -> None:
        sandbox = await plant.ready()
        plant.faults.stuck.add("disk keep")
        await plant.change(sandbox, park=S1)
        await plant.reach(sandbox, Phase.QUARANTINED)
        assert plant.kernel.disks, "what could not be kept is not removed either"
        plant.faults.stuck.clear()
        await plant.ended(sandbox, within_s=60.0)
        assert set(snapshots(plant)) == set(plant.kernel.images) == {S1}

    play(script)


def test_a_freeze_that_fails_leaves_it_running_and_is_tried_again() -> None:
    async def script(plant: Plant) -> None:
        sandbox = await plant.ready()
        plant.faults.failing.add("freeze")
        await plant.change(sandbox, frozen=True)
        await asyncio.sleep(0.5)
        assert "cannot be paused" in status_of(plant, sandbox).because
        assert not frozen(plant, sandbox)
        plant.faults.failing.clear()
        await plant.reach(sandbox, Phase.PAUSED, within_s=60.0)

    play(script)


def test_a_daemon_that_died_before_the_freezer_finishes_the_pause() -> None:
    async def script(plant: Plant) -> None:
        sandbox = await plant.ready()
        await plant.change(sandbox, frozen=True)
        await plant.reach(sandbox, Phase.PAUSED)
        await plant.kill_daemon()
        plant.kernel.cgroups[f"sb-{sandbox}"] = False
        await plant.start_node()
        await asyncio.sleep(0.5)
        assert frozen(plant, sandbox)

    play(script)


def test_a_kill_ends_a_frozen_one() -> None:
    async def script(plant: Plant) -> None:
        sandbox = await plant.ready()
        await plant.change(sandbox, frozen=True)
        await plant.reach(sandbox, Phase.PAUSED)
        await plant.restart()
        await plant.stop(sandbox)
        await plant.ended(sandbox, within_s=2.0)
        assert plant.left_of(sandbox) == []

    play(script)


def test_a_checkpoint_copies_and_the_sandbox_goes_on() -> None:
    async def script(plant: Plant) -> None:
        sandbox = await plant.ready()
        await plant.change(sandbox, checkpoint=Checkpoint(id=S1, name="mine"))
        while status_of(plant, sandbox).checkpoint_done != S1:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert status_of(plant, sandbox).checkpoint_failed == ""
        kept = snapshots(plant)[S1]
        assert (kept.kind, kept.name) == (SnapshotKind.CHECKPOINT, "mine")
        assert not frozen(plant, sandbox)
        await plant.stop(sandbox)
        await plant.ended(sandbox)
        await asyncio.sleep(60.0)
        assert set(plant.kernel.images) == {S1}, "it outlives its sandbox, and the sweeps"
        other = await plant.ready("other", snapshot=S1)
        assert f"disk {other}" in plant.left_of(other)

    play(script)


def test_a_checkpoint_outlives_the_daemon_that_made_it() -> None:
    """The next one has the order before its eyes still: copying again over what exists would fail, and remove it."""

    async def script(plant: Plant) -> None:
        sandbox = await plant.ready()
        await plant.change(sandbox, checkpoint=Checkpoint(id=S1))
        while status_of(plant, sandbox).checkpoint_done != S1:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        kept = snapshots(plant)
        await plant.kill_daemon()
        await plant.start_node()
        await asyncio.sleep(5.0)
        assert set(plant.kernel.images) == {S1}
        assert snapshots(plant) == kept, "it was taken again, later than its caller was told"
        assert status_of(plant, sandbox).checkpoint_failed == ""

    play(script)


def test_a_checkpoint_whose_daemon_died_before_it_could_answer_is_answered_by_the_next() -> None:
    async def script(plant: Plant) -> None:
        sandbox = await plant.ready()
        await plant.change(sandbox, checkpoint=Checkpoint(id=S1))
        while S1 not in plant.kernel.images:  # noqa: ASYNC110
            await asyncio.sleep(0.0001)
        await plant.kill_daemon()
        assert not snapshots(plant), "this proves nothing: it had answered already"
        await plant.start_node()
        while status_of(plant, sandbox).checkpoint_done != S1:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert status_of(plant, sandbox).checkpoint_failed == ""
        assert S1 in snapshots(plant)
        assert not frozen(plant, sandbox)

    play(script)


def test_a_checkpoint_that_fails_says_so_thaws_and_leaves_no_image() -> None:
    async def script(plant: Plant) -> None:
        sandbox = await plant.ready()
        plant.faults.failing.add("disk copy")
        await plant.change(sandbox, checkpoint=Checkpoint(id=S1))
        while status_of(plant, sandbox).checkpoint_done != S1:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert "disk copy" in status_of(plant, sandbox).checkpoint_failed
        assert not frozen(plant, sandbox)
        assert not plant.kernel.images
        assert not snapshots(plant)

    play(script)


def test_a_checkpoint_holds_the_gate_from_first_to_last_so_a_drain_waits_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def script(plant: Plant) -> None:
        operator = Operator(plant)
        sandbox = await plant.ready()
        plant.faults.delay_s = lambda usual_s: 2.0 if usual_s == 0.02 else usual_s  # type: ignore[method-assign]
        await plant.change(sandbox, checkpoint=Checkpoint(id=S1))
        await asyncio.sleep(0.2)
        await operator.drain(soft_s=0.0, hard_s=100.0)
        await asyncio.sleep(0.5)
        assert operator.report().starts == 1
        await operator.ended(30.0)
        assert set(snapshots(plant)) == {S1}
        assert operator.fates() == {sandbox: Fate.STOP}

    play(script)


def test_a_draining_node_makes_no_new_checkpoint_and_says_why() -> None:
    async def script(plant: Plant) -> None:
        operator = Operator(plant)
        sandbox = await plant.ready()
        await operator.drain()
        await plant.reach(sandbox, Phase.DRAINING)
        await plant.change(sandbox, checkpoint=Checkpoint(id=S1))
        await asyncio.sleep(0.5)
        assert "drains" in status_of(plant, sandbox).checkpoint_failed
        assert not plant.kernel.images

    play(script)


def test_a_thaw_is_no_start_and_a_frozen_one_counts_as_live() -> None:
    async def script(plant: Plant) -> None:
        operator = Operator(plant)
        sandbox = await plant.ready()
        await plant.change(sandbox, frozen=True)
        await plant.reach(sandbox, Phase.PAUSED)
        await operator.drain(soft_s=30.0)
        await asyncio.sleep(1.0)
        assert operator.report().live == 1
        await plant.change(sandbox, frozen=False)
        await plant.reach(sandbox, Phase.DRAINING, within_s=1.0)
        await asyncio.sleep(0.1)
        assert plant.kernel.notices[sandbox], "the notice it could not hear is given when it can"
        await operator.ended(60.0)
        assert operator.fates() == {sandbox: Fate.STOP}

    play(script)


def test_a_drain_parks_who_is_to_be_parked_also_frozen_ones() -> None:
    async def script(plant: Plant) -> None:
        operator = Operator(plant)
        running = await plant.ready("running", on_drain=Disposition.PARK)
        still = await plant.ready("still", on_drain=Disposition.PARK)
        stopped = await plant.ready("stopped")
        await plant.change(still, frozen=True)
        await plant.reach(still, Phase.PAUSED)
        await operator.drain(soft_s=2.0, hard_s=60.0)
        report = await operator.ended(30.0)
        assert operator.fates() == {running: Fate.PARK, still: Fate.PARK, stopped: Fate.STOP}
        assert report.succeeded
        assert {each.sandbox for each in snapshots(plant).values()} == {running, still}
        assert len(plant.kernel.images) == 2

    play(script)


def test_what_cannot_be_parked_is_stopped_and_the_hard_deadline_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    async def script(plant: Plant) -> None:
        operator = Operator(plant)
        plant.nursery.manner = Manner.STUBBORN
        sandbox = await plant.ready(on_drain=Disposition.PARK)

        async def cannot(one: object, snapshot: str, because: str) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("penstock.node.pause.park", cannot)
        await operator.drain(soft_s=2.0, hard_s=20.0)
        await operator.ended(30.0)
        assert operator.fates() == {sandbox: Fate.FORCE}

    play(script)


def test_a_daemon_that_comes_back_after_the_soft_deadline_parks_what_is_to_be_parked() -> None:
    """It acts on the drain before it has seen any spec: by the record, or it would stop what was to be kept."""

    async def script(plant: Plant) -> None:
        operator = Operator(plant)
        sandbox = await plant.ready(on_drain=Disposition.PARK)
        await operator.drain(soft_s=5.0, hard_s=60.0)
        await asyncio.sleep(1.0)
        await plant.kill_daemon()
        await asyncio.sleep(10.0)
        await plant.start_node()
        await operator.ended(30.0)
        assert operator.fates() == {sandbox: Fate.PARK}

    play(script)


@pytest.mark.parametrize("drains", [False, True])
def test_a_daemon_that_dies_while_it_copies_leaves_nobody_standing_still(drains: bool) -> None:
    """Also when the next one refuses the checkpoint, because its node drains: it thaws before anything else."""

    async def script(plant: Plant) -> None:
        operator = Operator(plant)
        sandbox = await plant.ready()
        plant.faults.delay_s = lambda usual_s: 2.0 if usual_s == 0.02 else usual_s  # type: ignore[method-assign]
        await plant.change(sandbox, checkpoint=Checkpoint(id=S1))
        await asyncio.sleep(0.5)
        assert frozen(plant, sandbox)
        if drains:
            await operator.drain()
        await plant.kill_daemon()
        assert frozen(plant, sandbox), "what the kernel was told stands"
        plant.faults.delay_s = lambda usual_s: usual_s  # type: ignore[method-assign]
        await plant.start_node()
        await asyncio.sleep(1.0)
        assert not frozen(plant, sandbox)
        assert bool(status_of(plant, sandbox).checkpoint_failed) is drains

    play(script)


def test_a_thaw_that_fails_after_a_checkpoint_is_tried_until_it_succeeds() -> None:
    async def script(plant: Plant) -> None:
        sandbox = await plant.ready()
        plant.faults.failing.add("thaw")
        await plant.change(sandbox, checkpoint=Checkpoint(id=S1))
        await asyncio.sleep(0.1)
        assert frozen(plant, sandbox)
        plant.faults.failing.clear()
        await asyncio.sleep(3.0)
        assert not frozen(plant, sandbox)
        assert status_of(plant, sandbox).phase is Phase.READY
        assert set(snapshots(plant)) == {S1}

    play(script)


def test_a_freeze_given_up_half_way_leaves_nobody_standing_still() -> None:
    async def script(plant: Plant) -> None:
        sandbox = await plant.ready()
        plant.faults.stuck.update({"freeze", "thaw"})
        await plant.change(sandbox, frozen=True)
        await asyncio.sleep(0.5)
        plant.kernel.cgroups[f"sb-{sandbox}"] = True  # the attempt got that far
        await plant.change(sandbox, frozen=False)
        await asyncio.sleep(6.0)
        plant.faults.stuck.clear()
        await asyncio.sleep(5.0)
        assert status_of(plant, sandbox).phase is Phase.READY
        assert not frozen(plant, sandbox)

    play(script)


def test_a_resume_that_comes_with_other_rules_has_them_too() -> None:
    """One poke stands for several wishes: what comes second must not wait for a poke that may never come."""

    async def script(plant: Plant) -> None:
        sandbox = await plant.ready()
        await plant.change(sandbox, frozen=True)
        await plant.reach(sandbox, Phase.PAUSED)
        await asyncio.sleep(1.0)
        rules = EgressRules(internet=False)
        revision = await plant.change(sandbox, frozen=False, egress=rules)
        await plant.reach(sandbox, Phase.READY)
        await asyncio.sleep(1.0)
        status = status_of(plant, sandbox)
        assert plant.kernel.slots[status.slot] == rules
        assert status.spec_revision >= revision

    play(script)

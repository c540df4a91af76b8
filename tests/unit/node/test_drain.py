"""The drain of a node, as an operator orders it through the store: who is asked, who is forced, what is said."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from penstock.core.gate import GateClosed
from penstock.model import keys
from penstock.model.drain import DrainOrder, DrainReport, DrainStage, Fate, Outcome
from penstock.model.node import NodeSpec, NodeStatus, drain, undrain
from penstock.model.sandbox import EgressRules, KillReason, Phase
from penstock.node.node import Closing
from penstock.sim.guests import Manner
from tests.unit.node.plant import NODE, SETTINGS, Plant, play


class Operator:
    """Writes the node's spec as the front door does, and reads what the node says."""

    def __init__(self, plant: Plant) -> None:
        self.plant = plant

    @property
    def spec(self) -> NodeSpec:
        record = self.plant.store.get(keys.NODE_SPEC + NODE)
        return NodeSpec(id=NODE) if record is None else msgspec.json.decode(record.value, type=NodeSpec)

    async def write(self, spec: NodeSpec) -> None:
        await self.plant.store.put(keys.NODE_SPEC + NODE, msgspec.json.encode(spec), by="api")

    async def drain(
        self, *, soft_s: float | None = None, hard_s: float | None = None, force: int = 0, propagation_s: float = 0.0
    ) -> None:
        now = self.plant.clock.wall()
        order = DrainOrder(
            at=now,
            reason="upgrade",
            soft_at=None if soft_s is None else now + soft_s,
            hard_at=None if hard_s is None else now + hard_s,
            force_number=force,
            propagation_s=propagation_s,
        )
        await self.write(drain(self.spec, order, now=now))

    async def undrain(self) -> None:
        await self.write(undrain(self.spec, now=self.plant.clock.wall()))

    def report(self) -> DrainReport:
        record = self.plant.store.get(keys.NODE_STATUS + NODE)
        assert record is not None
        found = msgspec.json.decode(record.value, type=NodeStatus).drain
        assert found is not None
        return found

    def fates(self, epoch: int = 1) -> dict[str, Fate]:
        listing = self.plant.store.list(keys.drain(NODE, epoch) + "/")
        found = [msgspec.json.decode(record.value, type=Outcome) for record in listing.records]
        return {each.sandbox: each.fate for each in found}

    async def ended(self, within_s: float, *stages: DrainStage) -> DrainReport:
        until = self.plant.clock.monotonic() + within_s
        while True:
            record = self.plant.store.get(keys.NODE_STATUS + NODE)
            status = None if record is None else msgspec.json.decode(record.value, type=NodeStatus)
            if (
                status is not None
                and status.drain is not None
                and status.drain.stage in (stages or (DrainStage.ENDED,))
            ):
                return status.drain
            assert self.plant.clock.monotonic() < until, status
            await asyncio.sleep(0.02)


def test_nothing_is_admitted_once_the_order_is_seen_and_those_who_live_go_on() -> None:
    async def script(plant: Plant) -> None:
        operator = Operator(plant)
        living = await plant.ready("living")
        await operator.drain()
        await asyncio.sleep(0.1)
        late = await plant.create("late")
        await plant.reach(late, Phase.PENDING)
        status = plant.statuses.get(late)
        assert status is not None
        assert "drains" in status.because
        await asyncio.sleep(100.0)
        alive = plant.statuses.get(living)
        assert alive is not None
        assert alive.phase is Phase.DRAINING, "notice, and no more: the order has no deadline"
        assert operator.report().stage is DrainStage.LIVE
        await plant.stop(living)
        report = await operator.ended(2.0)
        assert report.succeeded is True
        assert operator.fates() == {living: Fate.FINISH}

    play(script)


def test_a_start_under_way_is_waited_for_and_a_queued_one_goes_elsewhere() -> None:
    async def script(plant: Plant) -> None:
        operator = Operator(plant)
        plant.nursery.manner = Manner.SLOW
        starting = await plant.create("starting")
        await plant.reach(starting, Phase.STARTING)
        queued = await plant.create("queued")
        await asyncio.sleep(0.01)
        await operator.drain(soft_s=0.0, hard_s=60.0)
        await plant.reach(queued, Phase.PENDING, within_s=1.0)
        await asyncio.sleep(0.1)
        assert operator.report().stage is DrainStage.STARTS
        assert operator.report().starts == 1
        await operator.ended(30.0)
        assert operator.fates() == {starting: Fate.STOP}

    play(script, msgspec.structs.replace(SETTINGS, starts_running_max=1))


def test_a_drain_never_sees_a_moment_with_neither_start_nor_sandbox() -> None:
    """A create that becomes ready during a drain is held from its first step to its last."""

    async def script(plant: Plant) -> None:
        operator = Operator(plant)
        plant.nursery.manner = Manner.SLOW
        starting = await plant.create("starting")
        await plant.reach(starting, Phase.STARTING)
        await operator.drain()
        empty = 0
        while (status := plant.statuses.get(starting)) is None or status.phase is not Phase.DRAINING:
            empty += plant.node.gate.empty
            await asyncio.sleep(0.0005)
        assert empty == 0
        assert operator.report().stage in (DrainStage.STARTS, DrainStage.LIVE)

    play(script)


def test_the_deaf_end_by_the_hard_deadline_and_each_fate_is_written() -> None:
    async def script(plant: Plant) -> None:
        operator = Operator(plant)
        polite = await plant.ready("polite")
        leaving = await plant.ready("leaving", lives_s=5.0)
        plant.nursery.manner = Manner.STUBBORN
        deaf = await plant.ready("deaf")
        began = plant.clock.monotonic()
        await operator.drain(soft_s=20.0, hard_s=40.0)
        report = await operator.ended(60.0)
        assert 40.0 <= plant.clock.monotonic() - began <= 42.0
        assert operator.fates() == {polite: Fate.STOP, leaving: Fate.FINISH, deaf: Fate.FORCE}
        assert report.fates == {"stop": 1, "finish": 1, "force": 1}
        assert report.succeeded is True
        ended = plant.statuses.get(deaf)
        assert ended is not None
        assert ended.kill_reason is KillReason.NODE_SHUTDOWN

    play(script)


def test_sigterm_comes_ten_seconds_before_the_kill_at_the_latest() -> None:
    async def script(plant: Plant) -> None:
        operator = Operator(plant)
        polite = await plant.ready("polite")
        began = plant.clock.monotonic()
        await operator.drain(hard_s=60.0)
        await plant.ended(polite, within_s=70.0)
        assert 50.0 <= plant.clock.monotonic() - began <= 50.5

    play(script)


def test_readers_get_their_time_before_anybody_is_asked() -> None:
    async def script(plant: Plant) -> None:
        operator = Operator(plant)
        polite = await plant.ready("polite")
        await operator.drain(soft_s=0.0, propagation_s=15.0)
        await asyncio.sleep(14.0)
        status = plant.statuses.get(polite)
        assert status is not None
        assert status.phase is Phase.READY
        assert plant.node.gate.cordoned, "starts are refused at once all the same"
        await plant.ended(polite, within_s=2.0)

    play(script)


def test_undrain_spares_who_was_not_asked_yet_and_admits_again() -> None:
    async def script(plant: Plant) -> None:
        operator = Operator(plant)
        living = await plant.ready("living")
        await operator.drain(soft_s=100.0)
        await plant.reach(living, Phase.DRAINING)
        await operator.undrain()
        await plant.reach(living, Phase.READY, within_s=0.2)
        assert operator.report().stage is DrainStage.UNDONE
        assert operator.fates() == {living: Fate.SPARED}
        await asyncio.sleep(200.0)
        status = plant.statuses.get(living)
        assert status is not None
        assert status.phase is Phase.READY, "the old deadline means nothing any more"
        await plant.ready("next")
        await operator.drain(soft_s=0.0)
        await operator.ended(30.0)
        assert operator.fates(epoch=3)[living] is Fate.STOP

    play(script)


def test_deadlines_can_be_moved_and_force_ends_a_patient_drain() -> None:
    async def script(plant: Plant) -> None:
        operator = Operator(plant)
        plant.nursery.manner = Manner.STUBBORN
        deaf = await plant.ready("deaf")
        await operator.drain(soft_s=5.0, hard_s=20.0)
        await asyncio.sleep(18.0)
        await operator.drain(soft_s=5.0, hard_s=500.0)
        await asyncio.sleep(100.0)
        status = plant.statuses.get(deaf)
        assert status is not None
        assert status.phase is Phase.DRAINING
        await operator.drain(hard_s=500.0, force=1)
        report = await operator.ended(2.0)
        assert (report.forced_number, report.force_errors) == (1, ())
        assert operator.fates() == {deaf: Fate.FORCE}

    play(script)


def test_a_failed_force_says_so_and_the_next_one_tries_again() -> None:
    """A force that is consumed by its failure would answer "done" to the next one, and leave what it could not end."""

    async def script(plant: Plant) -> None:
        operator = Operator(plant)
        stuck = await plant.ready("stuck")
        plant.faults.stuck.add(f"cgroup remove sb-{stuck}")
        await operator.drain(force=1)
        await plant.reach(stuck, Phase.QUARANTINED)
        report = await operator.ended(60.0)
        while report.forced_number < 1:
            await asyncio.sleep(0.1)
            report = operator.report()
        assert report.succeeded is False
        assert report.quarantined == 1
        assert len(report.force_errors) == 1
        assert stuck in report.force_errors[0]
        assert operator.fates() == {stuck: Fate.QUARANTINE}
        plant.faults.stuck.clear()
        await operator.drain(force=2)
        while operator.report().forced_number < 2:  # noqa: ASYNC110 - the store tells a reader, and this is one
            await asyncio.sleep(0.05)
        report = operator.report()
        assert (report.force_errors, report.succeeded, report.quarantined) == ((), True, 0)
        assert plant.left_of(stuck) == []

    play(script)


def test_force_waits_for_starts_under_way_before_it_is_done() -> None:
    async def script(plant: Plant) -> None:
        operator = Operator(plant)
        plant.nursery.manner = Manner.DEAF
        starting = await plant.create("starting")
        await plant.reach(starting, Phase.STARTING)
        await operator.drain(force=1)
        await operator.ended(1.0)  # long before the launch itself gives up
        assert plant.left_of(starting) == []

    play(script)


def test_a_restarted_daemon_goes_on_with_the_drain_and_admits_nothing() -> None:
    async def script(plant: Plant) -> None:
        operator = Operator(plant)
        first = await plant.ready("first", lives_s=3.0)
        plant.nursery.manner = Manner.STUBBORN
        deaf = await plant.ready("deaf")
        await operator.drain(soft_s=5.0, hard_s=20.0)
        await plant.ended(first)
        await asyncio.sleep(5.0)
        await plant.restart()
        late = await plant.create("late")
        await plant.reach(late, Phase.PENDING)
        report = await operator.ended(30.0)
        assert operator.fates() == {first: Fate.FINISH, deaf: Fate.FORCE}
        assert report.fates == {"finish": 1, "force": 1}

    play(script)


def test_one_that_ends_when_asked_while_no_daemon_ran_is_no_crash() -> None:
    async def script(plant: Plant) -> None:
        operator = Operator(plant)
        plant.nursery.manner = Manner.STUBBORN
        sandbox = await plant.ready("a")
        await operator.drain(soft_s=0.0, hard_s=100.0)
        await asyncio.sleep(1.0)
        await plant.kill_daemon()
        for process in list(plant.kernel.processes.values()):
            plant.kernel.end_process(process)
        await plant.start_node()
        await operator.ended(5.0)
        assert operator.fates() == {sandbox: Fate.STOP}

    play(script)


def test_a_build_is_waited_for_and_its_nested_starts_are_admitted_until_force() -> None:
    async def script(plant: Plant) -> None:
        operator = Operator(plant)
        await plant.ready("living", lives_s=2.0)
        build = plant.node.gate.hold("build", "b1")
        await operator.drain(soft_s=0.0)
        await asyncio.sleep(10.0)
        assert operator.report().stage is DrainStage.BUILDS
        nested = build.child("layer 2", kind="start")
        nested.release()
        build.release()
        released_at = plant.clock.monotonic()
        await operator.ended(60.0)
        assert plant.clock.monotonic() - released_at >= SETTINGS.build_grace_s, "pollers read the result"

    play(script)


def test_a_drain_without_sandboxes_ends_at_once() -> None:
    async def script(plant: Plant) -> None:
        operator = Operator(plant)
        await operator.drain()
        began = plant.clock.monotonic()
        await operator.ended(1.0)
        assert plant.clock.monotonic() - began < 0.1

    play(script)


def test_a_stop_ends_no_later_than_the_drain_under_way() -> None:
    async def script(plant: Plant) -> None:
        operator = Operator(plant)
        plant.nursery.manner = Manner.STUBBORN
        deaf = await plant.ready("deaf")
        await operator.drain(hard_s=12.0)
        await asyncio.sleep(1.0)
        began = plant.clock.monotonic()
        outcomes = await plant.node.close(Closing.DRAIN, within_s=600.0)
        assert plant.clock.monotonic() - began < 13.0
        assert [(each.sandbox, each.fate) for each in outcomes] == [(deaf, Fate.FORCE)]

    play(script)


def test_a_daemon_that_dies_between_the_record_and_the_signal_asks_again() -> None:
    async def script(plant: Plant) -> None:
        operator = Operator(plant)
        sandbox = await plant.ready()
        await operator.drain(soft_s=2.0, hard_s=100.0)
        await asyncio.sleep(1.0)
        plant.life._appends_left = 1  # dies right after the line that says "asked to end"
        await asyncio.sleep(3.0)
        assert plant.life.dead
        assert plant.processes_of(sandbox), "it was never asked"
        await plant.restart()
        await operator.ended(5.0)
        assert operator.fates() == {sandbox: Fate.STOP}

    play(script)


def test_one_that_is_freed_from_quarantine_has_its_real_fate_in_the_receipt() -> None:
    async def script(plant: Plant) -> None:
        operator = Operator(plant)
        sandbox = await plant.ready()
        plant.faults.stuck.add(f"cgroup remove sb-{sandbox}")
        began = plant.clock.monotonic()
        await operator.drain(soft_s=0.0, hard_s=12.0)
        report = await operator.ended(30.0)
        assert plant.clock.monotonic() - began <= 14.0
        assert (report.succeeded, operator.fates()) == (False, {sandbox: Fate.QUARANTINE})
        plant.faults.stuck.clear()
        await plant.ended(sandbox, within_s=60.0)
        await asyncio.sleep(0.1)
        assert (operator.report().succeeded, operator.fates()) == (True, {sandbox: Fate.STOP})

    play(script)


def test_a_release_that_fails_once_is_no_quarantine() -> None:
    async def script(plant: Plant) -> None:
        sandbox = await plant.ready()
        plant.faults.failing.add(f"cgroup remove sb-{sandbox}")
        asyncio.get_running_loop().call_later(0.5, plant.faults.failing.clear)
        seen: set[Phase] = set()
        plant.statuses.subscribe(lambda _, status: seen.add(status.phase) if status is not None else None)
        await plant.stop(sandbox)
        await plant.ended(sandbox)
        assert Phase.QUARANTINED not in seen

    play(script)


def test_a_new_build_and_new_starts_are_refused_while_builds_are_waited_for() -> None:
    """The gate closes first, for every producer of work, not after the builds have ended."""

    async def script(plant: Plant) -> None:
        operator = Operator(plant)
        build = plant.node.gate.hold("build", "b1")
        await operator.drain()
        await asyncio.sleep(0.1)
        with pytest.raises(GateClosed, match="drains"):
            plant.node.gate.hold("build", "b2")
        late = await plant.create("late")
        await plant.reach(late, Phase.PENDING)
        assert operator.report().stage is DrainStage.BUILDS
        build.release()
        await operator.ended(60.0)

    play(script)


def test_changes_pauses_and_kills_are_taken_while_it_drains() -> None:
    async def script(plant: Plant) -> None:
        operator = Operator(plant)
        changed, paused, killed = await plant.ready("changed"), await plant.ready("paused"), await plant.ready("killed")
        await operator.drain()
        await plant.reach(killed, Phase.DRAINING)
        rules = EgressRules(internet=False)
        revision = await plant.change(changed, egress=rules)
        await plant.change(paused, frozen=True)
        await plant.stop(killed)
        await plant.ended(killed)
        await plant.reach(paused, Phase.PAUSED)
        await asyncio.sleep(0.5)
        status = plant.statuses.get(changed)
        assert status is not None
        assert status.spec_revision >= revision
        assert plant.kernel.slots[status.slot] == rules

    play(script)


def test_force_errors_are_kept_in_order_and_told_once_each() -> None:
    async def script(plant: Plant) -> None:
        operator = Operator(plant)
        stuck = [await plant.ready(name) for name in ("a", "b", "c")]
        fine = await plant.ready("fine")
        for sandbox in stuck:
            plant.faults.stuck.add(f"cgroup remove sb-{sandbox}")
        await operator.drain(force=1)
        while (record := plant.store.get(keys.NODE_STATUS + NODE)) is None or operator_forced(record.value) < 1:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        errors = operator.report().force_errors
        assert [error.split(":")[0] for error in errors] == stuck
        assert operator.fates()[fine] is Fate.FORCE
        plant.faults.stuck.clear()

    play(script)


def test_a_sandbox_is_known_until_its_last_resource_is_released() -> None:
    async def script(plant: Plant) -> None:
        operator = Operator(plant)
        sandbox = await plant.ready()
        slot = plant.statuses.get(sandbox)
        assert slot is not None
        plant.faults.stuck.add(f"slot destroy {slot.slot}")
        await operator.drain(force=1)
        await plant.reach(sandbox, Phase.QUARANTINED)
        explained = plant.node.explain(sandbox)
        assert explained is not None
        assert explained.holds, "and what it still holds is said"
        assert sandbox in plant.kernel.records
        plant.faults.stuck.clear()
        await plant.ended(sandbox, within_s=60.0)
        assert plant.node.explain(sandbox) is None

    play(script)


def operator_forced(value: bytes) -> int:
    report = msgspec.json.decode(value, type=NodeStatus).drain
    return 0 if report is None else report.forced_number

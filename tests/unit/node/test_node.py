"""Opening and closing a node: keep, drain, force."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from penstock.model import keys
from penstock.model.node import NodeStatus
from penstock.model.sandbox import KillReason, Phase
from penstock.node.node import Closing
from penstock.sim.guests import Manner
from tests.unit.node.plant import NODE, SETTINGS, Plant, play


def test_it_says_what_it_is() -> None:
    async def script(plant: Plant) -> None:
        await asyncio.sleep(0.1)
        record = plant.store.get(keys.NODE_STATUS + NODE)
        assert record is not None
        status = msgspec.json.decode(record.value, type=NodeStatus)
        assert (status.boot_id, status.sandboxes_max) == (plant.kernel.boot_id, SETTINGS.slot_count)

    play(script)


def test_keeping_leaves_sandboxes_and_takes_the_ready_slots_along() -> None:
    async def script(plant: Plant) -> None:
        sandbox = await plant.ready()
        await plant.node.close(Closing.KEEP)
        assert plant.processes_of(sandbox)
        assert len(plant.kernel.slots) == 1, "only the sandbox's own slot stays"
        await plant.start_node()
        await plant.stop(sandbox)
        await plant.ended(sandbox)

    play(script)


def test_keeping_lets_a_start_under_way_finish_and_leaves_the_waiting_bound() -> None:
    async def script(plant: Plant) -> None:
        plant.nursery.manner = Manner.SLOW
        first, second = await plant.create("a"), await plant.create("b")
        await plant.reach(first, Phase.STARTING)
        await plant.node.close(Closing.KEEP)
        status = plant.statuses.get(first)
        assert status is not None
        assert status.phase is Phase.READY
        assert plant.statuses.get(second) is None
        await plant.start_node()
        await plant.reach(second, Phase.READY)

    play(script, msgspec.structs.replace(SETTINGS, starts_running_max=1))


def test_draining_asks_first_and_forces_the_stubborn() -> None:
    async def script(plant: Plant) -> None:
        polite = await plant.ready("polite")
        plant.nursery.manner = Manner.STUBBORN
        stubborn = await plant.ready("stubborn")
        closing = plant.crew.spawn(plant.node.close(Closing.DRAIN, within_s=5.0), name="close")
        await plant.reach(polite, Phase.STOPPED)
        await asyncio.sleep(1.0)
        status = plant.statuses.get(stubborn)
        assert status is not None
        assert status.phase is Phase.DRAINING
        await closing
        ended = plant.statuses.get(stubborn)
        assert ended is not None
        assert (ended.phase, ended.kill_reason) == (Phase.STOPPED, KillReason.NODE_SHUTDOWN)
        assert not plant.kernel.processes
        assert not plant.kernel.slots

    play(script)


def test_a_drain_can_be_turned_into_force() -> None:
    async def script(plant: Plant) -> None:
        plant.nursery.manner = Manner.STUBBORN
        await plant.ready()
        closing = plant.crew.spawn(plant.node.close(Closing.DRAIN, within_s=600.0), name="close")
        await asyncio.sleep(1.0)
        assert not closing.done()
        plant.node.force()
        await asyncio.sleep(1.0)
        assert closing.done()
        await closing

    play(script)


def test_forcing_ends_everything_now_starts_included() -> None:
    async def script(plant: Plant) -> None:
        ready = await plant.ready("a")
        plant.nursery.manner = Manner.DEAF
        starting, waiting = await plant.create("b"), await plant.create("c")
        await plant.reach(starting, Phase.STARTING)
        began = plant.clock.monotonic()
        await plant.node.close(Closing.FORCE)
        assert plant.clock.monotonic() - began < 1.0
        for sandbox in (ready, starting, waiting):
            status = plant.statuses.get(sandbox)
            assert status is not None
            assert status.kill_reason is KillReason.NODE_SHUTDOWN
            assert plant.left_of(sandbox) == []
        assert not plant.kernel.slots
        assert not plant.kernel.disks
        assert not plant.kernel.records

    play(script, msgspec.structs.replace(SETTINGS, starts_running_max=1))


def test_every_part_is_left_whatever_another_one_raises() -> None:
    """An error in one closer must not leave another one's client, process or pool behind."""

    async def script(plant: Plant) -> None:
        await plant.ready()
        closed: list[str] = []

        async def fails(within_s: float) -> None:
            closed.append("reports")
            raise OSError(5, "Input/output error")

        async def launcher() -> None:
            closed.append("launcher")
            raise RuntimeError("no answer")

        plant.node._reporter.flush = fails  # type: ignore[method-assign]
        plant.node.ports.launcher.close = launcher  # type: ignore[method-assign]
        with pytest.raises(ExceptionGroup) as raised:
            await plant.node.close(Closing.FORCE)
        assert [str(error) for error in raised.value.exceptions] == ["[Errno 5] Input/output error", "no answer"]
        assert closed == ["reports", "launcher"]
        assert not plant.kernel.slots
        assert not plant.kernel.disks

    play(script)


def test_after_closing_new_specs_are_left_alone() -> None:
    async def script(plant: Plant) -> None:
        plant.nursery.manner = Manner.STUBBORN
        await plant.ready("a")
        closing = plant.crew.spawn(plant.node.close(Closing.DRAIN, within_s=2.0), name="close")
        await asyncio.sleep(0.1)
        late = await plant.create("late")
        await closing
        assert plant.statuses.get(late) is None, "it stays bound: the next daemon starts it"

    play(script)


def test_a_failed_open_leaves_no_task_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    async def script(plant: Plant) -> None:
        await plant.kill_daemon()

        def fails(self: object) -> set[str]:
            raise OSError(5, "Input/output error")

        before = len(asyncio.all_tasks())
        with monkeypatch.context() as patched:
            patched.setattr(type(plant.ports.files), "list_records", fails)
            with pytest.raises(OSError, match="Input/output"):
                await plant.start_node()
        assert len(asyncio.all_tasks()) == before
        await plant.start_node()
        await plant.ready()

    play(script)


def test_a_keeping_stop_gives_builds_their_grace_and_then_forces_them_and_keeps_sandboxes() -> None:
    async def script(plant: Plant) -> None:
        sandbox = await plant.ready()
        quick, slow = plant.node.gate.hold("build", "quick"), plant.node.gate.hold("build", "slow")
        forced: list[str] = []

        def force() -> None:
            forced.append("slow")
            slow.release()

        slow.on_force(force)
        quick.on_force(lambda: forced.append("quick"))
        began = asyncio.get_running_loop().time()
        closing = plant.crew.spawn(plant.node.close(Closing.KEEP), name="close")
        await asyncio.sleep(1.0)
        quick.release()
        await closing
        assert forced == ["slow"]
        assert asyncio.get_running_loop().time() - began < SETTINGS.build_stop_s + 1
        assert plant.processes_of(sandbox)

    play(script)

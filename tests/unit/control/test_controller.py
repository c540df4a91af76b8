"""The one loop: binds at once, removes what ended, takes conflicts as a reason to look again."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator

import msgspec
import pytest

from penstock.control.controller import Controller
from penstock.core.clock import SystemClock
from penstock.core.crew import Crew
from penstock.core.deadlines import within
from penstock.feed.local import LocalSource
from penstock.feed.view import View
from penstock.model import keys
from penstock.model.event import decode
from penstock.model.ids import BuildId, NodeId, SandboxId, TeamId
from penstock.model.node import NodeSpec, NodeStatus
from penstock.model.sandbox import KillReason, Limits, Phase, SandboxSpec, SandboxStatus, StopOrder
from penstock.store.memory import MemoryLog
from penstock.store.ops import Put
from penstock.store.store import Store

encode = msgspec.json.encode


class House:
    def __init__(self, store: Store, controller: Controller, specs: View[SandboxSpec]) -> None:
        self.store, self.controller, self.specs = store, controller, specs

    async def node(self, name: str, *, sandboxes_max: int = 100) -> None:
        status = NodeStatus(
            id=NodeId(name), boot_id="b", started_at=0.0, installation="unitun", sandboxes_max=sandboxes_max
        )
        await self.store.put(keys.NODE_STATUS + name, encode(status), by="node")

    async def cordon(self, name: str, *, cordoned: bool) -> None:
        await self.store.put(keys.NODE_SPEC + name, encode(NodeSpec(id=NodeId(name), cordoned=cordoned)), by="api")

    async def create(self, name: str, *, lives_s: float = 300.0, **changes: object) -> SandboxId:
        now = SystemClock().wall()
        spec = SandboxSpec(
            id=SandboxId(name),
            team=TeamId("t"),
            template="base",
            build=BuildId("b"),
            limits=Limits(),
            created_at=now,
            end_at=now + lives_s,
        )
        spec = msgspec.structs.replace(spec, **changes)
        await self.store.create(keys.SANDBOX_SPEC + name, encode(spec), labels={"team": "t"}, by="api")
        return spec.id

    async def say(self, sandbox: SandboxId, phase: Phase, node: str) -> None:
        status = SandboxStatus(
            id=sandbox, phase=phase, node=NodeId(node), team=TeamId("t"), stopped_at=SystemClock().wall()
        )
        labels = {"team": "t", "node": node}
        await self.store.put(keys.SANDBOX_STATUS + sandbox, encode(status), labels=labels, by="node")

    async def bound(self, sandbox: SandboxId, node: str) -> None:
        await self.specs.wait_for(sandbox, lambda spec: spec is not None and spec.node == node, within_s=3)

    async def gone(self, sandbox: SandboxId) -> None:
        await self.specs.wait_for(sandbox, lambda spec: spec is None, within_s=3)


@pytest.fixture
async def house() -> AsyncIterator[House]:
    store = Store(MemoryLog(), SystemClock())
    await store.open()
    async with Crew("test") as crew:
        source = LocalSource(store)
        controller = Controller(store=store, source=source, clock=SystemClock(), rng=random.Random(1), retention_s=0.2)
        await controller.open(crew)
        specs = View(source, keys.SANDBOX_SPEC, msgspec.json.Decoder(SandboxSpec).decode)
        await specs.start(crew)
        yield House(store, controller, specs)


async def test_created_to_bound_costs_less_than_half_a_millisecond(house: House) -> None:
    await house.node("n1", sandboxes_max=10_000)
    took_ms = []
    for number in range(200):
        began = time.perf_counter()
        sandbox = await house.create(f"i{number}")
        await house.bound(sandbox, "n1")
        took_ms.append((time.perf_counter() - began) * 1000)
    median_ms = sorted(took_ms)[len(took_ms) // 2]
    # Measured at 0.2 ms, two commits to a log in memory included; the factor is for machines under load.
    assert median_ms < 2.5, f"{median_ms:.3f} ms"


async def test_two_controllers_of_one_mind_only_meet_conflicts(house: House) -> None:
    async with Crew("second") as crew:
        second = Controller(
            store=house.store,
            source=LocalSource(house.store),
            clock=SystemClock(),
            rng=random.Random(2),
            retention_s=0.2,
        )
        await second.open(crew)
        await house.node("n1")
        for number in range(20):
            await house.bound(await house.create(f"i{number}"), "n1")
        await asyncio.sleep(0.02)
        bound = house.controller.statistics().bound_total + second.statistics().bound_total
        assert bound == 20


async def test_a_full_house_waits_and_the_next_place_goes_to_the_longest_waiting(house: House) -> None:
    await house.node("n1", sandboxes_max=1)
    first, second, third = [await house.create(f"i{number}") for number in range(3)]
    await house.bound(first, "n1")
    await asyncio.sleep(0.02)
    assert house.controller.statistics().pending == 2
    assert "is full (1 of 1)" in house.controller.why(second)[1]
    await house.say(first, Phase.STOPPED, "n1")
    await house.bound(second, "n1")
    waiting = house.specs.get(third)
    assert waiting is not None
    assert waiting.node is None


async def test_a_cordoned_node_gets_nothing_until_it_is_uncordoned(house: House) -> None:
    await house.node("n1")
    await house.cordon("n1", cordoned=True)
    await asyncio.sleep(0.01)
    sandbox = await house.create("ia")
    await asyncio.sleep(0.02)
    waiting = house.specs.get(sandbox)
    assert waiting is not None
    assert waiting.node is None
    await house.cordon("n1", cordoned=False)
    await house.bound(sandbox, "n1")


async def test_refused_on_one_node_it_is_bound_to_another_and_the_refusal_is_cleared(house: House) -> None:
    await house.node("n1", sandboxes_max=10)
    sandbox = await house.create("ia")
    await house.bound(sandbox, "n1")
    await house.node("n2", sandboxes_max=10)
    await house.say(sandbox, Phase.PENDING, "n1")
    await house.bound(sandbox, "n2")
    assert house.store.get(keys.SANDBOX_STATUS + sandbox) is None
    await house.say(sandbox, Phase.CREATING, "n2")  # another node's label: it needs a record of its own


async def test_ended_records_are_removed_and_history_keeps_them(house: House) -> None:
    await house.node("n1")
    sandbox = await house.create("ia")
    await house.bound(sandbox, "n1")
    await house.say(sandbox, Phase.STOPPED, "n1")
    revision = house.store.revision
    await house.gone(sandbox)
    assert house.store.get(keys.SANDBOX_STATUS + sandbox) is None
    then = await house.store.at(revision, keys.SANDBOX_STATUS)
    assert [record.key for record in then.records] == [keys.SANDBOX_STATUS + sandbox]


async def test_a_stopped_sandbox_without_a_node_is_removed(house: House) -> None:
    sandbox = await house.create("ia", stop=StopOrder(reason=KillReason.REQUEST, by="t", at=0.0))
    await house.gone(sandbox)


async def test_one_whose_time_passes_while_it_waits_is_removed(house: House) -> None:
    sandbox = await house.create("ia", lives_s=0.1)
    await house.gone(sandbox)


async def test_a_user_who_writes_meanwhile_is_not_overwritten(house: House) -> None:
    """A bind that raced with another write looks again, and keeps what was written."""
    await house.node("n1")
    names = [f"i{number}" for number in range(50)]
    async with within(5, "fifty races"):
        for name in names:
            sandbox = await house.create(name)
            record = house.store.get(keys.SANDBOX_SPEC + sandbox)
            assert record is not None
            spec = msgspec.structs.replace(msgspec.json.decode(record.value, type=SandboxSpec), metadata={"by": "user"})
            try:
                await house.store.commit([Put(record.key, encode(spec), expect=record.mod_revision)], by="api")
                wrote = True
            except Exception:
                wrote = False
            await house.bound(sandbox, "n1")
            found = house.specs.get(sandbox)
            assert found is not None
            assert (found.metadata == {"by": "user"}) is wrote


async def test_a_conflict_with_a_write_that_is_still_on_its_way_does_not_stall_the_loop() -> None:
    """Decided but not yet kept: the store answers "conflict" at once and shows the old record until then."""
    store = Store(MemoryLog(delay_s=0.2), SystemClock())
    await store.open()
    async with Crew("test") as crew:
        controller = Controller(
            store=store, source=LocalSource(store), clock=SystemClock(), rng=random.Random(1), retention_s=0.2
        )
        await controller.open(crew)
        specs = View(LocalSource(store), keys.SANDBOX_SPEC, msgspec.json.Decoder(SandboxSpec).decode)
        await specs.start(crew)
        house = House(store, controller, specs)
        sandbox = await house.create("ia")
        record = store.get(keys.SANDBOX_SPEC + sandbox)
        assert record is not None
        faster = crew.spawn(store.put(record.key, record.value, by="api"), name="faster")
        await house.node("n1")
        await faster
        await house.bound(sandbox, "n1")
        assert controller.statistics().conflicts_total < 5


def told(house: House, sandbox: SandboxId) -> list[tuple[str, str, int]]:
    """(kind, why, revision) of each line of the event log about it."""
    records = house.store.list(keys.EVENT, labels={"subject": sandbox}).records
    events = [(decode(record.value), record.create_revision) for record in records]
    assert all(event.actor == "control" and event.team == "t" for event, _ in events)
    return [(event.kind, event.because, revision) for event, revision in events]


async def test_each_decision_is_in_the_event_log_at_the_revision_that_made_it(house: House) -> None:
    sandbox = await house.create("ia")
    await asyncio.sleep(0.02)
    await house.node("n1")
    await house.bound(sandbox, "n1")
    bound = house.store.get(keys.SANDBOX_SPEC + sandbox)
    assert bound is not None
    await house.node("n2")
    await house.say(sandbox, Phase.PENDING, "n1")
    await house.bound(sandbox, "n2")
    rebound = house.store.get(keys.SANDBOX_SPEC + sandbox)
    assert rebound is not None
    await house.say(sandbox, Phase.STOPPED, "n2")
    await house.gone(sandbox)
    removed = house.store.revision
    assert [(kind, revision) for kind, _, revision in told(house, sandbox)][1:] == [
        ("sandbox.bound", bound.mod_revision),
        ("sandbox.rebound", rebound.mod_revision),
        ("sandbox.removed", removed),
    ]
    why = [text for _, text, _ in told(house, sandbox)]
    assert told(house, sandbox)[0][0] == "sandbox.waits"
    assert "no node has joined" in why[0]
    assert "n1 refused it just now" in why[2]


async def test_one_that_waits_says_so_once_however_often_it_is_looked_at(house: House) -> None:
    await house.node("n1", sandboxes_max=1)
    first, second = await house.create("ia"), await house.create("ib")
    await house.bound(first, "n1")
    for cordoned in (True, False, True, False):
        await house.cordon("n1", cordoned=cordoned)
        await asyncio.sleep(0.01)
    assert [kind for kind, _, _ in told(house, second)] == ["sandbox.waits"]
    await house.say(first, Phase.STOPPED, "n1")
    await house.bound(second, "n1")
    assert [kind for kind, _, _ in told(house, second)] == ["sandbox.waits", "sandbox.bound"]

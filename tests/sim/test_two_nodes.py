"""Two simulated nodes under one control: what one refuses because it drains is placed on the other, unnoticed."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

import msgspec
import pytest

from penstock.control.controller import Controller
from penstock.core.crew import Crew
from penstock.feed.local import LocalReports, LocalSource
from penstock.model import keys
from penstock.model.drain import DrainOrder
from penstock.model.ids import BuildId, NodeId, SandboxId, TeamId, TemplateId
from penstock.model.node import NodeSpec, drain, undrain
from penstock.model.sandbox import Limits, Phase, SandboxSpec, SandboxStatus
from penstock.model.template import Build, Layer
from penstock.node.facts import Machine
from penstock.node.means import NodeSettings
from penstock.node.node import Closing, Node
from penstock.sim import loop as virtual
from penstock.sim.faults import Faults, Rates
from penstock.sim.guests import Nursery
from penstock.sim.kernel import Kernel, Life
from penstock.sim.trace import Trace
from penstock.store.memory import MemoryLog
from penstock.store.ops import Put
from penstock.store.store import Store

BUILD = Build(
    id=BuildId("b"), template=TemplateId("base"), layers=(Layer(digest="sha256:0", path="/l/0"),), created_at=0.0
)
A, B = NodeId("a"), NodeId("b")


class Cluster:
    """A store, a controller, and nodes `a` and `b`, each with a kernel of its own."""

    def __init__(self, crew: Crew) -> None:
        self.crew, self.clock = crew, virtual.SimClock(asyncio.get_running_loop())
        self.store = Store(MemoryLog(), self.clock)
        self.source = LocalSource(self.store)
        self.nodes: dict[NodeId, Node] = {}
        self.kernels: dict[NodeId, Kernel] = {}

    async def start(self) -> None:
        await self.store.open()
        await self.store.commit([Put(keys.BUILD + BUILD.id, msgspec.json.encode(BUILD))], by="run")
        for number, name in enumerate((A, B)):
            rng = random.Random(number)
            trace = Trace(self.clock.monotonic)
            kernel = Kernel(faults=Faults(rng, Rates()), nursery=Nursery(rng, odd=0.0), trace=trace)
            self.kernels[name] = kernel
            node = self.nodes[name] = Node(
                settings=NodeSettings(id=name, installation="sim000", slot_count=8, slots_ready=2, disks_ready=2),
                ports=kernel.ports(Life(1)),
                source=self.source,
                reports=LocalReports(self.store, by="node", rng=rng),
                clock=self.clock,
                rng=rng,
                machine=Machine(boot_id=f"boot-{name}"),
                token_seed=b"s" * 32,
            )
            await node.open()
        controller = Controller(store=self.store, source=self.source, clock=self.clock, rng=random.Random(7))
        await controller.open(self.crew)
        await asyncio.sleep(0.1)

    async def create(self, name: str) -> SandboxId:
        now = self.clock.wall()
        spec = SandboxSpec(
            id=SandboxId(name),
            team=TeamId("t"),
            template="base",
            build=BUILD.id,
            limits=Limits(),
            created_at=now,
            end_at=now + 600.0,
        )
        await self.store.put(keys.SANDBOX_SPEC + name, msgspec.json.encode(spec), labels={"team": "t"}, by="api")
        return spec.id

    async def ready(self, sandbox: SandboxId, within_s: float = 5.0) -> SandboxStatus:
        until = self.clock.monotonic() + within_s
        while True:
            record = self.store.get(keys.SANDBOX_STATUS + sandbox)
            status = None if record is None else msgspec.json.decode(record.value, type=SandboxStatus)
            if status is not None and status.phase is Phase.READY:
                return status
            assert self.clock.monotonic() < until, status
            await asyncio.sleep(0.01)

    async def drain(self, node: NodeId, **deadlines: float) -> None:
        now = self.clock.wall()
        await self.write(drain(self.spec(node), DrainOrder(at=now, reason="upgrade", **deadlines), now=now))  # type: ignore[arg-type]

    def spec(self, node: NodeId) -> NodeSpec:
        record = self.store.get(keys.NODE_SPEC + node)
        return NodeSpec(id=node) if record is None else msgspec.json.decode(record.value, type=NodeSpec)

    async def write(self, spec: NodeSpec) -> None:
        await self.store.put(keys.NODE_SPEC + spec.id, msgspec.json.encode(spec), by="api")


def play(script: Callable[[Cluster], Awaitable[None]]) -> None:
    async def run() -> None:
        async with Crew("cluster") as crew:
            cluster = Cluster(crew)
            await cluster.start()
            await script(cluster)
            for node in cluster.nodes.values():
                await node.close(Closing.FORCE)
            for kernel in cluster.kernels.values():
                assert not kernel.processes
                assert not kernel.slots
            crew.cancel_all()

    virtual.run(run(), 1)


def test_what_a_draining_node_would_get_goes_to_the_other() -> None:
    async def script(cluster: Cluster) -> None:
        first = await cluster.ready(await cluster.create("first"))
        await cluster.drain(first.node)
        for name in ("second", "third"):
            other = await cluster.ready(await cluster.create(name), within_s=1.0)
            assert other.node != first.node
        await cluster.write(undrain(cluster.spec(first.node), now=cluster.clock.wall()))
        await asyncio.sleep(0.1)
        await cluster.drain(other.node)
        assert (await cluster.ready(await cluster.create("fourth"))).node == first.node

    play(script)


def test_a_start_already_sent_to_a_node_that_begins_to_drain_is_placed_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Control has not heard of the drain yet: the node's gate is the last word, and its refusal is no failure."""

    async def script(cluster: Cluster) -> None:
        first = await cluster.ready(await cluster.create("first"))
        await cluster.drain(first.node)
        await asyncio.sleep(0.1)
        with monkeypatch.context() as late:
            late.setattr(NodeSpec, "why_not", "")
            sandbox = await cluster.create("second")
            await asyncio.sleep(0.005)
        status = await cluster.ready(sandbox, within_s=15.0)
        assert status.node != first.node
        assert status.kill_reason is None

    play(script)


def test_no_start_is_lost_or_done_twice_while_nodes_drain_in_turn() -> None:
    async def script(cluster: Cluster) -> None:
        names: list[SandboxId] = []
        for turn in range(6):
            node = (A, B)[turn % 2]
            names += [await cluster.create(f"s{turn}x{number}") for number in range(2)]
            await cluster.drain(node)
            await asyncio.sleep(0.3)
            await cluster.write(undrain(cluster.spec(node), now=cluster.clock.wall()))
            await asyncio.sleep(0.3)
        for name in names:
            await cluster.ready(name, within_s=30.0)
        running = [proc.order.sandbox for kernel in cluster.kernels.values() for proc in kernel.processes.values()]
        assert sorted(running) == sorted(names)

    play(script)

"""A node on a kernel in memory and a virtual clock; the test plays control and the front door."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

import msgspec

from penstock.core.crew import Crew
from penstock.core.deadlines import within
from penstock.feed.local import LocalReports, LocalSource
from penstock.feed.view import View
from penstock.model import keys
from penstock.model.ids import BuildId, NodeId, SandboxId, TeamId, TemplateId
from penstock.model.sandbox import (
    TERMINAL,
    KillReason,
    Limits,
    Phase,
    SandboxSpec,
    SandboxStatus,
    StopOrder,
)
from penstock.model.template import Build, Layer
from penstock.node.facts import Machine
from penstock.node.means import NodeSettings
from penstock.node.node import Closing, Node
from penstock.sim import loop as virtual
from penstock.sim.faults import Faults, Rates
from penstock.sim.guests import Guest, Manner, Nursery
from penstock.sim.kernel import Kernel, Life
from penstock.sim.trace import Trace
from penstock.store.memory import MemoryLog
from penstock.store.ops import Delete, Put
from penstock.store.store import Store

T = TypeVar("T")
NODE = NodeId("n1")
BUILD = Build(
    id=BuildId("b"),
    template=TemplateId("base"),
    layers=(Layer(digest="sha256:0", path="/layers/0"),),
    created_at=0.0,
    env={"FROM": "build"},
)
SETTINGS = NodeSettings(id=NODE, installation="unitun", slot_count=8, slots_ready=2, disks_ready=2, start_within_s=5.0)


class TestFaults(Faults):
    """No chance, only what the test says: operations that begin with a listed text fail, or stay busy."""

    __test__ = False

    def __init__(self) -> None:
        super().__init__(random.Random(0), Rates())
        self.failing: set[str] = set()
        self.stuck: set[str] = set()

    def delay_s(self, usual_s: float) -> float:
        return usual_s


class TestKernel(Kernel):
    __test__ = False
    faults: TestFaults

    async def step(self, life: Life, what: str, usual_s: float) -> None:
        await super().step(life, what, usual_s)
        if any(what.startswith(text) for text in self.faults.failing):
            raise OSError(5, f"{what} failed (by the test)")

    async def release(self, life: Life, what: str, usual_s: float, within_s: float) -> None:
        async with within(within_s, what):
            if any(what.startswith(text) for text in self.faults.stuck):
                await asyncio.sleep(1e9)
            await self.step(life, what, usual_s)


class OneManner(Nursery):
    """Every guest alike, until the test changes `manner`."""

    def __init__(self) -> None:
        super().__init__(random.Random(0), odd=0.0)
        self.manner = Manner.PROMPT
        self.lives_s = 1.0

    def draw(self) -> Guest:
        hello_s = 2.0 if self.manner is Manner.SLOW else 0.003
        return Guest(manner=self.manner, hello_s=hello_s, lives_s=self.lives_s)


class Plant:
    """Use through `play`. `node` is the present daemon's; `restart` kills it and starts the next."""

    def __init__(self, crew: Crew, settings: NodeSettings) -> None:
        self.crew, self.settings = crew, settings
        loop = asyncio.get_running_loop()
        self.clock = virtual.SimClock(loop)
        self.trace = Trace(loop.time, keep_all=True)
        self.faults, self.nursery = TestFaults(), OneManner()
        self.kernel = TestKernel(faults=self.faults, nursery=self.nursery, trace=self.trace)
        self.log = MemoryLog()
        self.store = Store(self.log, self.clock)
        self.life = Life(0)
        self.statuses: View[SandboxStatus] = self._view()

    async def start(self) -> None:
        await self.store.open()
        if self.store.get(keys.BUILD + BUILD.id) is None:
            await self.store.commit([Put(keys.BUILD + BUILD.id, msgspec.json.encode(BUILD))], by="run")
        await self.statuses.start(self.crew)
        await self.start_node()

    async def start_node(self) -> None:
        self.life = Life(self.life.number + 1)
        self.ports = self.kernel.ports(self.life)
        self.node = Node(
            settings=self.settings,
            ports=self.ports,
            source=LocalSource(self.store),
            reports=LocalReports(self.store, by="node", rng=random.Random(1)),
            clock=self.clock,
            rng=random.Random(2),
            machine=Machine(boot_id=self.kernel.boot_id),
            token_seed=b"s" * 32,
        )
        await self.node.open()

    async def kill_daemon(self) -> None:
        """kill -9: the tasks of the node stop where they are, its ports answer no more."""
        self.life.end()
        self.node._crew._on_error = lambda name, error: None
        await asyncio.sleep(0)  # tasks that were just made take their first step: they hold unawaited coroutines
        await self.node._crew.cancel_all()
        await asyncio.sleep(0.001)

    async def restart(self, *, reboot: bool = False) -> None:
        await self.kill_daemon()
        if reboot:
            self.kernel.reboot()
        await self.start_node()

    # -- control and the front door --

    async def create(self, name: str = "a", *, lives_s: float = 300.0, **changes: object) -> SandboxId:
        now = self.clock.wall()
        spec = SandboxSpec(
            id=SandboxId("i" + name),
            team=TeamId("t"),
            template="base",
            build=BUILD.id,
            limits=Limits(),
            created_at=now,
            end_at=now + lives_s,
            node=NODE,
        )
        spec = msgspec.structs.replace(spec, **changes)
        await self.store.create(keys.SANDBOX_SPEC + spec.id, msgspec.json.encode(spec), labels={"team": "t"}, by="api")
        return spec.id

    async def change(self, sandbox: SandboxId, **changes: object) -> int:
        record = self.store.get(keys.SANDBOX_SPEC + sandbox)
        assert record is not None
        spec = msgspec.structs.replace(msgspec.json.decode(record.value, type=SandboxSpec), **changes)
        return await self.store.put(record.key, msgspec.json.encode(spec), by="api")

    async def stop(self, sandbox: SandboxId) -> None:
        await self.change(sandbox, stop=StopOrder(reason=KillReason.REQUEST, by="test", at=self.clock.wall()))

    async def remove(self, sandbox: SandboxId) -> None:
        ops = [Delete(keys.SANDBOX_SPEC + sandbox), Delete(keys.SANDBOX_STATUS + sandbox)]
        await self.store.commit(ops, by="control")

    async def reach(self, sandbox: SandboxId, *phases: Phase, within_s: float = 30.0) -> SandboxStatus:
        status = await self.statuses.wait_for(
            sandbox, lambda seen: seen is not None and seen.phase in phases, within_s=within_s
        )
        assert status is not None
        return status

    async def ready(self, name: str = "a", **changes: object) -> SandboxId:
        sandbox = await self.create(name, **changes)  # type: ignore[arg-type]
        await self.reach(sandbox, Phase.READY)
        return sandbox

    async def ended(self, sandbox: SandboxId, *, within_s: float = 30.0) -> SandboxStatus:
        return await self.reach(sandbox, *TERMINAL, within_s=within_s)

    # -- the world --

    def left_of(self, sandbox: str) -> list[str]:
        kernel = self.kernel
        lent = f'"owner":"{sandbox}"'.encode()
        return [
            *(f"process {proc.pid}" for proc in kernel.processes.values() if proc.order.sandbox == sandbox),
            *(f"cgroup {name}" for name in kernel.cgroups if name == f"sb-{sandbox}"),
            *(f"disk {name}" for name in kernel.disks if name == sandbox),
            *(f"run dir {name}" for name in kernel.run_dirs if name == sandbox),
            *(
                f"record {name}"
                for name, lines in kernel.records.items()
                if name == sandbox or (lines and lent in lines[-1])
            ),
        ]

    def processes_of(self, sandbox: str) -> list[int]:
        return [proc.pid for proc in self.kernel.processes.values() if proc.order.sandbox == sandbox]

    def _view(self) -> View[SandboxStatus]:
        return View(LocalSource(self.store), keys.SANDBOX_STATUS, msgspec.json.Decoder(SandboxStatus).decode)


def play(script: Callable[[Plant], Awaitable[T]], settings: NodeSettings = SETTINGS) -> T:
    """Run `script` on a fresh plant; afterwards nothing of it may be left when the node is forced closed."""

    async def run() -> T:
        async with Crew("plant") as crew:
            plant = Plant(crew, settings)
            await plant.start()
            result = await script(plant)
            plant.faults.failing.clear()
            plant.faults.stuck.clear()
            if not plant.life.dead and not plant.node.gate.cordoned:
                await plant.node.close(Closing.FORCE)
                kernel = plant.kernel
                assert not kernel.processes
                assert not kernel.slots
                assert not kernel.disks
            return result

    return virtual.run(run(), 1)

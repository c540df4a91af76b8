"""One life of the daemon in a simulated world: store, control and node in one process, as `run` puts them together."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Final

import msgspec

from penstock.control.controller import Controller
from penstock.core.crew import Crew
from penstock.feed.local import LocalReports, LocalSource
from penstock.model import keys
from penstock.model.ids import TemplateId
from penstock.model.records import Batch
from penstock.model.template import Build, Layer
from penstock.node.facts import Machine
from penstock.node.means import NodeSettings
from penstock.node.node import Closing, Node
from penstock.node.samples import Samples
from penstock.sim.machinery import Life
from penstock.sim.workload import BUILD
from penstock.store.log import Image, OnFailed, OnLogged
from penstock.store.ops import Put
from penstock.store.store import Store

if TYPE_CHECKING:
    from penstock.sim.world import World

RETENTION_S: Final = 30.0
TOKEN_SEED: Final = b"sim" * 11
_BUILD: Final = Build(
    id=BUILD,
    template=TemplateId("base"),
    layers=(Layer(digest="sha256:0", path="/sim/layers/0"),),
    created_at=0.0,
)


class Daemon:
    """Constructed for one life; `run` until that is over."""

    def __init__(self, world: World, life: Life, settings: NodeSettings) -> None:
        self._world, self.life = world, life
        self.ports = world.kernel.ports(life)
        self.store = Store(_WatchedLog(world, life), world.clock)
        self.up = False
        self.asked_to_leave = False
        source = LocalSource(self.store)
        self.controller = Controller(
            store=self.store, source=source, clock=world.clock, rng=fork(world.rng), retention_s=RETENTION_S
        )
        self.node = Node(
            settings=settings,
            ports=self.ports,
            source=source,
            reports=LocalReports(self.store, by="node", rng=fork(world.rng)),
            clock=world.clock,
            rng=fork(world.rng),
            machine=Machine(boot_id=world.kernel.boot_id),
            token_seed=TOKEN_SEED,
        )

        self._samples = Samples(
            cgroups=self.ports.cgroups,
            disks=self.ports.disks,
            clock=world.clock,
            living=self.node.living,
            disk_name=self.node.disk_name,
            run_dirs="/sim/run",
        )

    async def run(self) -> None:
        world = self._world
        async with Crew("daemon") as crew:
            await self.store.open()
            if self.store.get(keys.BUILD + BUILD) is None:
                await self.store.commit([Put(keys.BUILD + BUILD, msgspec.json.encode(_BUILD))], by="run")
            await world.serve_beside(self, crew)
            await self.node.open()
            await self.controller.open(crew)
            crew.spawn(self._samples.run(), name="samples")
            self.up = True
            world.daemon = self
            world.checkers.quiet_since = world.clock.monotonic()
            world.drains.anchor()
            world.trace.say("daemon is up")
            world.look_again()
            await self.node.run()

    async def leave(self, closing: Closing) -> None:
        """Close as told, then die. Unless it keeps them or could not verify an end, no sandbox may be left."""
        world = self._world
        try:
            await self.node.close(closing, within_s=1.0)
            if closing is not Closing.KEEP:
                for sandbox in [proc.order.sandbox for proc in world.kernel.processes.values()]:
                    world.checkers.blame(f"{sandbox} lives on after {closing.value}")
        except Exception as error:
            world.trace.say("stop was not clean", error=type(error).__name__)
        self.check_bugs()
        self.life.end()

    def check_bugs(self) -> None:
        bugs = self.node.statistics().bugs
        if bugs:
            self._world.checkers.blame(f"raised: {bugs}")


class _WatchedLog:
    """The log as one life of the daemon sees it; the world sees each revision that was kept, acknowledged or not."""

    def __init__(self, world: World, life: Life) -> None:
        self._world, self._life, self._log = world, life, world.log
        self._waiting: list[Batch] = []

    async def open(self, *, logged: OnLogged, failed: OnFailed) -> None:
        def kept(revision: int) -> None:
            done = [batch for batch in self._waiting if batch.revision <= revision]
            self._waiting = self._waiting[len(done) :]
            for batch in done:
                self._world.on_revision(batch)
            if not self._life.dead:
                logged(revision)

        await self._log.open(logged=kept, failed=failed)

    async def image(self) -> Image:
        return await self._log.image()

    async def read(self, after_revision: int, count_max: int) -> list[Batch]:
        return await self._log.read(after_revision, count_max)

    def append(self, entry: Batch, *, durable: bool) -> None:
        self._life.check()
        self._waiting.append(entry)
        self._log.append(entry, durable=durable)

    def reset(self) -> None:
        self._log.reset()

    def compact(self, revision: int) -> asyncio.Future[None]:
        return self._log.compact(revision)

    async def close(self) -> None:
        if not self._life.dead:
            await self._log.close()


def fork(rng: random.Random) -> random.Random:
    """A generator of its own, so that one party's draws do not move another's."""
    return random.Random(rng.getrandbits(64))

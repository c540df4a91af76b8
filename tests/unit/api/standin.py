"""A node's side of the store, as far as operators see it: it takes orders up, and says what the test tells it to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import msgspec
from tests.unit.api.door import Door

from penstock.core.crew import Crew
from penstock.model import keys
from penstock.model.drain import DrainReport, DrainStage, Fate, Outcome
from penstock.model.event import LoggedEvent
from penstock.model.ids import NodeId, SandboxId
from penstock.model.node import NodeSpec, NodeStatus
from penstock.model.sandbox import Phase, SandboxSpec, SandboxStatus
from penstock.store.store import Put

ID = NodeId("n1")
ADMIN = {"X-Admin-Token": "adm_x"}

encode = msgspec.json.encode


class StandIn:
    """`answers` False: a node that is away. `forcing` is what its next force attempts end with; None: they hang."""

    def __init__(self, door: Door) -> None:
        self.door = door
        self.answers = True
        self.forcing: tuple[str, ...] | None = ()
        self.attempts = 0
        self.report: DrainReport | None = None

    # -- as the node --

    async def say(self, report: DrainReport | None = None, **changes: object) -> None:
        """A new report (changed so), in the status and as head of the receipt."""
        told = report or self.report
        if told is not None:
            self.report = told = msgspec.structs.replace(told, **changes)
        status = NodeStatus(
            id=ID,
            boot_id="b",
            started_at=5.0,
            installation="tests1",
            sandboxes_max=8,
            cpu_count=2,
            memory_bytes=2**30,
            drain=told,
        )
        puts = [Put(keys.NODE_STATUS + ID, encode(status))]
        if told is not None:
            puts.append(Put(keys.drain(ID, told.epoch), encode(told), labels={"node": ID}))
        revision = await self.door.store.commit(puts, by="node")
        await self.door.front.nodes.wait_revision(revision, within_s=5)

    async def tell_fate(self, sandbox: str, fate: Fate) -> None:
        assert self.report is not None
        outcome = Outcome(sandbox=SandboxId(sandbox), fate=fate, at=float(len(self.report.fates)), because="so it went")
        key = f"{keys.drain(ID, self.report.epoch)}/{sandbox}"
        await self.door.store.commit([Put(key, encode(outcome), labels={"node": ID})], by="node")
        fates = dict(self.report.fates)
        fates[fate.value] = fates.get(fate.value, 0) + 1
        await self.say(fates=fates)

    async def run(self) -> None:
        """Acknowledge each order, and attempt each force."""
        async for batch in self.door.store.watch(keys.NODE_SPEC, 0):
            for change in batch.changes:
                spec = msgspec.json.decode(change.record.value, type=NodeSpec)
                if self.answers:
                    await self._take_up(spec)

    async def _take_up(self, spec: NodeSpec) -> None:
        order = spec.drain
        if order is None:
            if self.report is not None and self.report.stage is not DrainStage.UNDONE:
                await self.say(stage=DrainStage.UNDONE, waiting=())
            return
        if self.report is None or self.report.epoch != spec.epoch:
            await self.say(DrainReport(node=ID, epoch=spec.epoch, stage=DrainStage.LIVE, began_at=order.at))
        assert self.report is not None
        if order.force_number > self.report.forced_number:
            self.attempts += 1
            await self.say(stage=DrainStage.FORCING)
            if self.forcing is not None:
                await self.end_attempt(order.force_number, self.forcing)

    async def end_attempt(self, number: int, errors: tuple[str, ...]) -> None:
        await self.say(
            stage=DrainStage.LIVE if errors else DrainStage.ENDED,
            succeeded=None if errors else True,
            forced_number=number,
            force_errors=errors,
        )

    # -- as others --

    async def place(self, sandbox: str, phase: Phase | None = Phase.READY, *, lives_s: float = 3600.0) -> None:
        """A sandbox of this node; without a phase one that has not started."""
        made = await self.door.client.post("/v2/sandboxes", json={"templateID": "base", "timeout": 900})
        record = self.door.store.get(keys.SANDBOX_SPEC + made.json()["sandboxID"])
        assert record is not None
        now = self.door.front.clock.wall()
        like = msgspec.json.decode(record.value, type=SandboxSpec)
        spec = msgspec.structs.replace(like, id=SandboxId(sandbox), node=ID, end_at=now + lives_s)
        status = SandboxStatus(id=spec.id, phase=phase or Phase.READY, node=ID, team=spec.team, because="so it is")
        puts = [Put(keys.SANDBOX_SPEC + sandbox, encode(spec), labels={"team": spec.team})]
        await self.door.store.commit(puts, by="api")
        await asyncio.sleep(0.01)  # the door's own stand-in says READY first
        if phase is not None:
            puts = [Put(keys.SANDBOX_STATUS + sandbox, encode(status), labels={"team": spec.team, "node": ID})]
            await self.door.store.commit(puts, by="node")
        await self.door.client.delete(f"/sandboxes/{like.id}")

    @property
    def spec(self) -> NodeSpec:
        record = self.door.store.get(keys.NODE_SPEC + ID)
        return NodeSpec(id=ID) if record is None else msgspec.json.decode(record.value, type=NodeSpec)

    @property
    def events(self) -> list[LoggedEvent]:
        """What was written about the node."""
        listing = self.door.store.list(keys.EVENT, {"subject": ID})
        return [msgspec.json.decode(record.value, type=LoggedEvent) for record in listing.records]

    async def post(self, path: str, **body: object) -> httpx.Response:
        return await self.door.client.post(f"/nodes/{ID}{path}", json=body, headers=ADMIN)

    async def get(self, path: str = "") -> httpx.Response:
        return await self.door.client.get(f"/nodes/{ID}{path}", headers=ADMIN)


@asynccontextmanager
async def standing_in(door: Door) -> AsyncIterator[StandIn]:
    node = StandIn(door)
    await node.say()
    async with Crew("stand-in") as crew:
        crew.spawn(node.run(), name="node")
        yield node
        await crew.cancel_all()

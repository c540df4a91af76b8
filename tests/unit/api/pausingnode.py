"""A node that can pause, as far as the API sees it, and the real controller behind it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from tests.unit.api.door import Door

from penstock.control.controller import Controller
from penstock.core.crew import Crew
from penstock.feed.local import LocalSource
from penstock.model import keys
from penstock.model.ids import NodeId
from penstock.model.node import NodeSpec, NodeStatus
from penstock.model.sandbox import (
    CAPABILITIES,
    KillReason,
    OnTimeout,
    Phase,
    SandboxSpec,
    SandboxStatus,
    wants_frozen,
    wants_parked,
)
from penstock.model.snapshot import Snapshot, SnapshotKind
from penstock.store.store import Delete, Put

NODE = NodeId("n1")
TEAM = "default"
encode = msgspec.json.encode


class PausingNode:
    """`step_s`: how long each change takes. The rest is what may go wrong."""

    def __init__(self, door: Door) -> None:
        self.door, self.step_s = door, 0.0
        self.deaf = False  # its guests answer no quiesce
        self.stuck = False  # nothing can be frozen
        self.refuses = False  # every start
        self.breaks = ""  # why every checkpoint fails
        self.starts: dict[str, int] = {}
        self.frozen = self.thawed = 0
        self._clock = door.front.clock

    async def say(self, spec: SandboxSpec, phase: Phase, **changes: Any) -> None:
        found = self.door.store.get(keys.SANDBOX_STATUS + spec.id)
        status = SandboxStatus(id=spec.id, phase=phase, node=NODE, team=spec.team, capabilities=CAPABILITIES)
        if found is not None:
            status = msgspec.json.decode(found.value, type=SandboxStatus)
        status = msgspec.structs.replace(status, phase=phase, **changes)
        labels = {"team": spec.team, "node": NODE}
        await self.door.store.commit([Put(keys.SANDBOX_STATUS + spec.id, encode(status), labels=labels)], by="node")

    async def keep(self, spec: SandboxSpec, id: str, kind: SnapshotKind, name: str = "") -> None:
        now = self._clock.wall()
        cleared = msgspec.structs.replace(spec, node=None, stop=None, frozen=False, park=None, checkpoint=None)
        kept = Snapshot(
            id=id,  # type: ignore[arg-type]
            kind=kind,
            sandbox=spec.id,
            team=spec.team,
            node=NODE,
            spec=cleared,
            created_at=now,
            durable_up_to=now,
            name=name,
        )
        labels = {"team": spec.team, "sandbox": spec.id, "kind": kind.value}
        await self.door.store.commit([Put(keys.SNAPSHOT + id, encode(kept), labels=labels)], by="node")

    async def run(self) -> None:
        """Conform to each spec as it changes, and to ends as they come."""
        while True:
            for record in self.door.store.list(keys.SANDBOX_SPEC).records:
                await self._conform(msgspec.json.decode(record.value, type=SandboxSpec))
            await asyncio.sleep(0.001)

    async def _conform(self, spec: SandboxSpec) -> None:
        if spec.node != NODE:
            return
        found = self.door.store.get(keys.SANDBOX_STATUS + spec.id)
        status = msgspec.json.decode(found.value, type=SandboxStatus) if found is not None else None
        now = self._clock.wall()
        if status is None:
            await self._start(spec)
        elif status.phase not in (Phase.READY, Phase.PAUSED):
            return
        elif spec.stop is not None:
            await self.say(spec, Phase.STOPPED, kill_reason=spec.stop.reason, stopped_at=now)
        elif (park := wants_parked(spec, now)) is not None:
            await self.say(spec, Phase.STOPPING, kill_reason=KillReason.PAUSED)
            await asyncio.sleep(self.step_s)
            await self.keep(spec, park, SnapshotKind.PAUSED)
            await self.say(spec, Phase.STOPPED, stopped_at=now)
        elif wants_frozen(spec, now) != (status.phase is Phase.PAUSED):
            await self._turn(spec, status)
        elif spec.on_timeout is OnTimeout.KILL and spec.end_at <= now and not spec.frozen:
            await self.say(spec, Phase.STOPPED, kill_reason=KillReason.TIMEOUT, stopped_at=now)
        elif spec.checkpoint is not None and spec.checkpoint.id != status.checkpoint_done:
            if not self.breaks:
                await self.keep(spec, spec.checkpoint.id, SnapshotKind.CHECKPOINT, spec.checkpoint.name)
            await asyncio.sleep(self.step_s)
            await self.say(spec, status.phase, checkpoint_done=spec.checkpoint.id, checkpoint_failed=self.breaks)

    async def _start(self, spec: SandboxSpec) -> None:
        await asyncio.sleep(self.step_s)
        if self.refuses:
            reason = KillReason.START_REFUSED
            now = self._clock.wall()
            await self.say(spec, Phase.FAILED, kill_reason=reason, because="no descriptor", stopped_at=now)
            return
        self.starts[spec.id] = self.starts.get(spec.id, 0) + 1
        await self.say(spec, Phase.READY, started_at=self._clock.wall())

    async def _turn(self, spec: SandboxSpec, status: SandboxStatus) -> None:
        await asyncio.sleep(self.step_s)
        if status.phase is Phase.PAUSED:
            self.thawed += 1
            await self.say(spec, Phase.READY)
        elif not self.stuck:
            self.frozen += 1
            durable = status.durable_up_to if self.deaf else self._clock.wall()
            await self.say(spec, Phase.PAUSED, durable_up_to=durable)

    # -- as others --

    async def cordon(self, *, cordoned: bool = True) -> None:
        spec = NodeSpec(id=NODE, cordoned=cordoned, cordon_reason="the test said so")
        await self.door.store.commit([Put(keys.NODE_SPEC + NODE, encode(spec), labels={})], by="api")

    async def forget(self, snapshot: str) -> None:
        await self.door.store.commit([Delete(keys.SNAPSHOT + snapshot)], by="control")


@asynccontextmanager
async def pausing_node(door: Door) -> AsyncIterator[PausingNode]:
    door.answer = None  # the door's own stand-in keeps quiet
    node = PausingNode(door)
    status = NodeStatus(
        id=NODE,
        boot_id="b",
        started_at=5.0,
        installation="tests1",
        sandboxes_max=8,
        cpu_count=2,
        memory_bytes=2**36,
    )
    await door.store.commit([Put(keys.NODE_STATUS + NODE, encode(status), labels={})], by="node")
    controller = Controller(
        store=door.store, source=LocalSource(door.store), clock=door.front.clock, rng=random.Random(3)
    )
    async with Crew("pausing node") as crew:
        await controller.open(crew)
        crew.spawn(node.run(), name="node")
        yield node
        await crew.cancel_all()

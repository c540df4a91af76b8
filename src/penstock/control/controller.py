"""The one loop and the one actor: sees through views, plans purely, writes with the revision it saw.

A key (a sandbox id) is never planned twice at once and never lost: views put keys into a queue, workers take them. A
conflict means that somebody else wrote meanwhile: look again, it is no alarm. Views call back at the commit, so a
created sandbox is bound two passes of the loop later.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Final, TypeVar

import msgspec

from penstock.control.placement import NodeSeen
from penstock.control.sandboxes import RETENTION_S, Bind, Drop, Plan, Remove, Seen, plan
from penstock.control.trim import Trimmer
from penstock.core.clock import Clock
from penstock.core.crew import Crew
from penstock.core.keyqueue import KeyQueue
from penstock.feed.source import Source
from penstock.feed.view import View
from penstock.model import keys
from penstock.model.errors import Conflict
from penstock.model.event import EventWriter, LoggedEvent
from penstock.model.ids import NodeId, SandboxId, SnapshotId, mint
from penstock.model.node import NodeSpec, NodeStatus
from penstock.model.sandbox import TERMINAL, Phase, SandboxSpec, SandboxStatus
from penstock.model.snapshot import Snapshot, SnapshotKind
from penstock.store.ops import Delete, Op, Put
from penstock.store.store import Store

WORKERS: Final = 4  # plans are microseconds; a worker waits only for its commit, and commits are grouped
WHY_MAX: Final = 10_000  # sandboxes whose last reasons are kept

T = TypeVar("T")


class ControllerStatistics(msgspec.Struct, frozen=True, kw_only=True):
    planned_total: int
    bound_total: int
    removed_total: int
    conflicts_total: int
    pending: int  # sandboxes that no node could take at the last look


class Controller:
    """Decides for one installation. Exactly one may run per store; a second one would only meet conflicts.

    - `store`: where it writes, as room "control".
    - `source`: what its views follow (`feed.local.LocalSource` over the same store).
    - `clock`: wall time for retention, ends and back-offs.
    - `rng`: jitter of retries.
    - `retention_s`: how long the records of an ended sandbox stay.

    Life: `await open(crew)`; its tasks then run in `crew` until the crew ends.
    """

    def __init__(
        self, *, store: Store, source: Source, clock: Clock, rng: random.Random, retention_s: float = RETENTION_S
    ) -> None:
        self._store, self._clock, self._retention_s = store, clock, retention_s
        self._specs: View[SandboxSpec] = View(source, keys.SANDBOX_SPEC, _decode_spec)
        self._statuses: View[SandboxStatus] = View(source, keys.SANDBOX_STATUS, _decode_status)
        self._node_specs: View[NodeSpec] = View(source, keys.NODE_SPEC, _decode_node_spec)
        self._node_statuses: View[NodeStatus] = View(source, keys.NODE_STATUS, _decode_node_status)
        self._snapshots: View[Snapshot] = View(source, keys.SNAPSHOT, _decode_snapshot)
        self._queue: KeyQueue[str] = KeyQueue(rng=rng)
        self._events = EventWriter("control", mint(rng, 6))
        self._trimmer = Trimmer(store=store, source=source, clock=clock)
        self._placed: dict[str, NodeId] = {}  # live sandboxes by node, our own binds included at once
        self._counts: dict[NodeId, int] = {}
        self._unplaced: dict[str, None] = {}  # waiting for a node, in order
        self._said_waiting: set[str] = set()  # of those, whose waiting is in the event log
        self._refusals: dict[str, tuple[int, float]] = {}  # in a row, and when the last was seen (wall)
        self._why: dict[str, tuple[str, ...]] = {}
        self._planned = self._bound = self._removed = self._conflicts = 0

    async def open(self, crew: Crew) -> None:
        """Fill the views, then start working. Raises what the source raises."""
        self._node_specs.subscribe(lambda node, spec: self._nodes_changed())
        self._node_statuses.subscribe(lambda node, status: self._nodes_changed())
        await self._node_specs.start(crew)
        await self._node_statuses.start(crew)
        self._snapshots.subscribe(lambda _, snapshot: self._on_snapshot(snapshot))
        await self._snapshots.start(crew)
        self._statuses.subscribe(self._on_status)
        self._specs.subscribe(self._on_spec)
        await self._statuses.start(crew)
        await self._specs.start(crew)
        for number in range(WORKERS):
            crew.spawn(self._work(), name=f"control worker {number}")
        self._trimmer.start(crew)

    def why(self, sandbox: str) -> tuple[str, ...]:
        """The reasons of the last plan for it; empty when it was never planned."""
        return self._why.get(sandbox, ())

    def statistics(self) -> ControllerStatistics:
        return ControllerStatistics(
            planned_total=self._planned,
            bound_total=self._bound,
            removed_total=self._removed,
            conflicts_total=self._conflicts,
            pending=len(self._unplaced),
        )

    # -- seeing --

    def _on_spec(self, sandbox: str, spec: SandboxSpec | None) -> None:
        status = self._statuses.get(sandbox)
        ended = status is not None and status.phase in TERMINAL
        self._place(sandbox, None if spec is None or ended else spec.node)
        self._queue.add(sandbox)

    def _on_status(self, sandbox: str, status: SandboxStatus | None) -> None:
        if status is None:
            self._refusals.pop(sandbox, None)
        elif status.phase is Phase.PENDING:
            count, _ = self._refusals.get(sandbox, (0, 0.0))
            self._refusals[sandbox] = (count + 1, self._clock.wall())
        elif status.phase in TERMINAL:
            self._refusals.pop(sandbox, None)
            self._place(sandbox, None)
        elif status.phase is Phase.READY and self._snapshots.by("sandbox", sandbox):
            pass  # what it was paused as is to be dropped
        elif status.phase is not Phase.CREATING:
            return  # Nothing is decided on these; a thousand starts need not be planned three times each.
        self._queue.add(sandbox)

    def _nodes_changed(self) -> None:
        """Whoever waits for a node looks again, in order."""
        waiting, self._unplaced = self._unplaced, {}
        for sandbox in waiting:
            self._queue.add(sandbox)

    def _place(self, sandbox: str, node: NodeId | None) -> None:
        before = self._placed.pop(sandbox, None)
        if before is not None:
            self._counts[before] -= 1
        if node is not None:
            self._placed[sandbox] = node
            self._counts[node] = self._counts.get(node, 0) + 1
        if before is not None and before != node and self._unplaced:
            self._nodes_changed()

    def _nodes(self) -> tuple[NodeSeen, ...]:
        seen = []
        for node, status in sorted(self._node_statuses.items()):
            spec = self._node_specs.get(node)
            seen.append(
                NodeSeen(
                    id=NodeId(node),
                    why_not=spec.why_not if spec is not None else "",
                    placed=self._counts.get(NodeId(node), 0),
                    sandboxes_max=status.sandboxes_max,
                    memory_bytes=status.memory_bytes,
                )
            )
        return tuple(seen)

    # -- planning and acting --

    async def _work(self) -> None:
        while True:
            sandbox = await self._queue.get()
            try:
                await self._look_at(sandbox)
            except Conflict:
                # The write that was faster calls us back when it is kept. Looking again before that would find the same
                # and spin: a conflict is decided without waiting, so nobody else would ever run. The retry is a net.
                self._conflicts += 1
                self._queue.retry(sandbox)
            except Exception as error:
                # Safe: the key comes back with back-off, and plans are made from what is, not from what failed.
                self._why[sandbox] = (f"the last look failed: {error}",)
                self._queue.retry(sandbox)
            else:
                self._queue.done(sandbox)
            await asyncio.sleep(0)  # plans without actions wait for nothing, and a thousand of them are one stall

    async def _look_at(self, sandbox: str) -> None:
        spec, spec_revision = self._read(keys.SANDBOX_SPEC + sandbox, _decode_spec)
        status, status_revision = self._read(keys.SANDBOX_STATUS + sandbox, _decode_status)
        refusals, refused_at = self._refusals.get(sandbox, (0, 0.0))
        seen = Seen(
            id=SandboxId(sandbox),
            spec=spec,
            status=status,
            nodes=self._nodes() if spec is not None and (spec.node is None or status is None or refusals) else (),
            spec_revision=spec_revision,
            status_revision=status_revision,
            refusals=refusals,
            refused_at=refused_at,
            paused=self._paused(sandbox),
        )
        now = self._clock.wall()
        planned = plan(seen, now, retention_s=self._retention_s)
        self._planned += 1
        if self._remember(sandbox, planned, waits=spec is not None and spec.node is None):
            await self._store.commit([self._told("sandbox.waits", sandbox, spec, planned)], by="control")
        for action in planned.actions:
            match action:
                case Bind(node=node):
                    assert spec is not None
                    kind = "sandbox.bound" if spec.node is None else "sandbox.rebound"
                    told = self._told(kind, sandbox, spec, planned, node=node)
                    await self._bind(spec, node, spec_revision, status_revision, told)
                case Remove():
                    told = self._told("sandbox.removed", sandbox, spec or status, planned)
                    await self._remove(sandbox, spec_revision, status_revision, told)
                case Drop(snapshot=snapshot):
                    await self._store.commit([Delete(keys.SNAPSHOT + snapshot)], by="control")
        if planned.wake_at is not None:
            self._queue.add_after(sandbox, max(0.01, planned.wake_at - now))

    def _paused(self, sandbox: str) -> tuple[SnapshotId, ...]:
        found = [each for each in self._snapshots.by("sandbox", sandbox) if each.kind is SnapshotKind.PAUSED]
        return tuple(each.id for each in sorted(found, key=lambda each: (each.created_at, each.id)))

    def _on_snapshot(self, found: Snapshot | None) -> None:
        if found is not None and found.kind is SnapshotKind.PAUSED:
            self._queue.add(found.sandbox)

    def _told(
        self, kind: str, sandbox: str, whose: SandboxSpec | SandboxStatus | None, planned: Plan, *, node: str = ""
    ) -> Put:
        """A decision as a line of the event log, to be written with what it decides."""
        facts = {"node": node} if node else {}
        if isinstance(whose, SandboxSpec) and whose.node is not None and node:
            facts["from"] = whose.node
        event = LoggedEvent(
            at=self._clock.wall(),
            kind=kind,
            subject=sandbox,
            actor="control",
            because="; ".join(planned.because),
            facts=facts,
            team=whose.team if whose is not None else "",
        )
        record = self._events.record(event)
        return Put(record.key, record.value, labels=record.labels)

    async def _bind(self, spec: SandboxSpec, node: NodeId, revision: int, status_revision: int, told: Put) -> None:
        self._place(spec.id, node)
        self._unplaced.pop(spec.id, None)
        value = _encode(msgspec.structs.replace(spec, node=node))
        ops: list[Op] = [Put(keys.SANDBOX_SPEC + spec.id, value, expect=revision), told]
        if status_revision and node != spec.node:
            # The refusal of another node: its labels name that node, and labels never change.
            ops.append(Delete(keys.SANDBOX_STATUS + spec.id, expect=status_revision))
        try:
            await self._store.commit(ops, by="control")
        except BaseException:
            self._place(spec.id, spec.node)
            raise
        self._bound += 1

    async def _remove(self, sandbox: str, spec_revision: int, status_revision: int, told: Put) -> None:
        ops: list[Op] = []
        if spec_revision:
            ops.append(Delete(keys.SANDBOX_SPEC + sandbox, expect=spec_revision))
        if status_revision:
            ops.append(Delete(keys.SANDBOX_STATUS + sandbox, expect=status_revision))
        if ops:
            await self._store.commit([*ops, told], by="control")
            self._removed += 1
        self._why.pop(sandbox, None)
        self._refusals.pop(sandbox, None)

    def _read(self, key: str, decode: Callable[[bytes], T]) -> tuple[T | None, int]:
        """Straight from the store: a plan needs the revision beside the value, and the newest of both."""
        record = self._store.get(key)
        return (None, 0) if record is None else (decode(record.value), record.mod_revision)

    def _remember(self, sandbox: str, planned: Plan, *, waits: bool) -> bool:
        """Whether it has just begun to wait for a node."""
        self._why.pop(sandbox, None)
        self._why[sandbox] = planned.because
        if len(self._why) > WHY_MAX:
            del self._why[next(iter(self._why))]
        if not waits or planned.actions:
            self._unplaced.pop(sandbox, None)
            self._said_waiting.discard(sandbox)
            return False
        self._unplaced[sandbox] = None
        begins = sandbox not in self._said_waiting
        self._said_waiting.add(sandbox)
        return begins


_encode: Final = msgspec.json.Encoder().encode
_decode_spec: Final = msgspec.json.Decoder(SandboxSpec).decode
_decode_status: Final = msgspec.json.Decoder(SandboxStatus).decode
_decode_snapshot: Final = msgspec.json.Decoder(Snapshot).decode
_decode_node_spec: Final = msgspec.json.Decoder(NodeSpec).decode
_decode_node_status: Final = msgspec.json.Decoder(NodeStatus).decode

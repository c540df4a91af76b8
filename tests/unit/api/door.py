"""The front door over a real store in memory, with a node that is ready at once (or never)."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import msgspec
from prometheus_client import CollectorRegistry

from penstock.api.app import build
from penstock.api.front import Front
from penstock.api.keys import new
from penstock.api.roster import Roster
from penstock.control.drains import foresee
from penstock.core.clock import SystemClock
from penstock.core.crew import Crew
from penstock.feed.local import LocalSource
from penstock.feed.view import View
from penstock.model import keys
from penstock.model.ids import BuildId, NodeId, TeamId, TemplateId
from penstock.model.node import NodeStatus
from penstock.model.sandbox import KillReason, Phase, SandboxSpec, SandboxStatus
from penstock.model.snapshot import Snapshot
from penstock.model.team import ApiKey, Team, TeamLimits
from penstock.model.template import Build, Template
from penstock.store.memory import MemoryLog
from penstock.store.store import Put, Store
from penstock.wire import tokens


class NoMeasurements:
    def samples(self, sandbox: Any, *, start: float, end: float) -> list[Any]:
        return []

    def log_lines(self, sandbox: Any, *, count_max: int) -> list[Any]:
        return []


@dataclass
class Door:
    """The application and its world. `client` carries the first key; `answer` says what the node does."""

    client: httpx.AsyncClient
    store: Store
    front: Front
    key: str
    started: list[str] = field(default_factory=list)
    answer: Phase | None = Phase.READY
    because: str = "the test said so"
    reason: KillReason | None = None


def _decode(kind: Any) -> Any:
    return lambda value: msgspec.json.decode(value, type=kind)


async def open_door() -> AsyncIterator[Door]:
    clock = SystemClock()
    store = Store(MemoryLog(), clock)
    await store.open()
    source = LocalSource(store)
    kinds = {
        "specs": (keys.SANDBOX_SPEC, SandboxSpec),
        "statuses": (keys.SANDBOX_STATUS, SandboxStatus),
        "templates": (keys.TEMPLATE, Template),
        "builds": (keys.BUILD, Build),
        "keys": (keys.API_KEY, ApiKey),
        "teams": (keys.TEAM, Team),
        "nodes": (keys.NODE_STATUS, NodeStatus),
        "snapshots": (keys.SNAPSHOT, Snapshot),
    }
    views: dict[str, Any] = {name: View(source, prefix, _decode(kind)) for name, (prefix, kind) in kinds.items()}
    async with Crew("test door") as crew:
        for view in views.values():
            await view.start(crew)
        front = Front(
            store=store,
            roster=Roster(views["specs"], views["statuses"], views["snapshots"]),
            templates=views["templates"],
            builds=views["builds"],
            keys=views["keys"],
            teams=views["teams"],
            nodes=views["nodes"],
            planner=foresee,
            measurements=NoMeasurements(),
            clock=clock,
            rng=random.Random(1),
            seed=b"s" * 32,
            domain="sbx.localhost:1",
            admin_token="adm_x",
            limits=TeamLimits(sandboxes_max=3, timeout_s_max=1000),
            ready_s=0.5,
            answer_s=0.3,
            forced_s=0.3,
            keepalive_s=0.05,
        )
        secret = tokens.new_key()
        await _furnish(store, front, secret)
        app = build(front, CollectorRegistry(), ready=lambda: True)
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://door") as client:
            client.headers["X-API-Key"] = secret
            made = Door(client, store, front, secret)
            crew.spawn(_node(made), name="node")
            yield made
        crew.cancel_all()
    await store.close()


async def _furnish(store: Store, front: Front, secret: str) -> None:
    encode = msgspec.json.encode
    build_ = Build(id=BuildId("b1"), template=TemplateId("base"), layers=(), created_at=1.0)
    template = Template(id=TemplateId("base"), names=("base",), build=build_.id, created_at=1.0)
    key = new(front, TeamId("default"), "first", secret)
    revision = await store.commit(
        [
            Put(keys.BUILD + build_.id, encode(build_), labels={}, expect=0),
            Put(keys.TEMPLATE + template.id, encode(template), labels={"name": "base"}, expect=0),
            Put(keys.API_KEY + key.id, encode(key), labels={"hash": key.hash, "team": key.team}, expect=0),
        ],
        by="run",
    )
    for view in (front.builds, front.templates, front.keys):
        await view.wait_revision(revision, within_s=5)


async def _node(door: Door) -> None:
    """A node in ten lines: every new spec gets `door.answer`, every stop order STOPPED."""
    encode = msgspec.json.encode
    async for batch in door.store.watch(keys.SANDBOX_SPEC, 0):
        for change in batch.changes:
            if change.kind != "put":
                continue
            spec = msgspec.json.decode(change.record.value, type=SandboxSpec)
            phase = Phase.STOPPED if spec.stop else door.answer
            if spec.id not in door.started:
                door.started.append(spec.id)
            if phase is None:
                continue
            status = SandboxStatus(
                id=spec.id,
                phase=phase,
                node=NodeId("n1"),
                team=spec.team,
                because=door.because,
                kill_reason=KillReason.REQUEST if spec.stop else door.reason,
                started_at=spec.created_at,
                spec_revision=change.record.mod_revision,
            )
            await door.store.commit(
                [Put(keys.SANDBOX_STATUS + spec.id, encode(status), labels={"team": spec.team, "node": "n1"})],
                by="node",
            )

"""What people do to a world: create, change, kill, forget. Each client sees one sandbox through to its end."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import msgspec

from penstock.model import keys
from penstock.model.drain import Disposition
from penstock.model.ids import BuildId, SandboxId, SnapshotId, TeamId, mint_sandbox_id
from penstock.model.sandbox import (
    DISK_BYTES_DEFAULT,
    TERMINAL,
    EgressRules,
    KillReason,
    Limits,
    OnTimeout,
    Phase,
    SandboxSpec,
    StopOrder,
)
from penstock.sim.checkers import ANSWERS
from penstock.store.errors import RevisionConflict

if TYPE_CHECKING:
    from penstock.sim.world import World

ANSWER_S: Final = 400.0  # queue, deaf guests, dead daemons and back-offs included
END_S: Final = 400.0
IN_FORCE_S: Final = 120.0
TEAM: Final = TeamId("default")
BUILD: Final = BuildId("build0")

_encode = msgspec.json.Encoder().encode


class Client:
    """One person with one sandbox."""

    def __init__(self, world: World, rng: random.Random) -> None:
        self._world, self._rng = world, rng
        self.sandbox: SandboxId = mint_sandbox_id(rng)

    async def live(self) -> None:
        await self._world.sleep(self._rng.uniform(0.0, 15.0))
        await self._create()
        await self._world.until(self._answered, ANSWER_S, f"an answer for {self.sandbox}")
        for _ in range(self._rng.randint(0, 3)):
            await self._world.sleep(self._rng.uniform(0.0, 4.0))
            if self._ended():
                break
            how = self._rng.choice((self._new_rules, self._extended, self._shortened, self._frozen, self._thawed))
            await self._change(how)
            await self._world.until(self._in_force(), IN_FORCE_S, f"{how.__name__} of {self.sandbox} in force")
        chance = self._rng.random()
        if chance < 0.6:
            await self._change(self._stopped)
        elif chance < 0.75:
            await self._change(self._parked)
        else:
            await self._change(self._thawed)  # a frozen one has no end
        await self._world.until(self._ended, END_S, f"the end of {self.sandbox}")

    def _answered(self) -> bool:
        return self._world.checkers.answer_of(self.sandbox) is not None or self._removed()

    def _in_force(self) -> Callable[[], bool]:
        """As the front door waits before it answers a change."""
        revision = self._world.facts.spec_revisions.get(self.sandbox, 0)

        def check() -> bool:
            status = self._world.facts.statuses.get(self.sandbox)
            if self._ended() or status is None:
                return True
            return status.phase not in (Phase.READY, Phase.STARTING) or status.spec_revision >= revision

        return check

    def _ended(self) -> bool:
        status = self._world.facts.statuses.get(self.sandbox)
        return self._removed() or (status is not None and status.phase in TERMINAL)

    def _removed(self) -> bool:
        return self.sandbox not in self._world.facts.specs

    async def _create(self) -> None:
        rng, now = self._rng, self._world.clock.wall()
        odd_size = rng.random() < 0.2
        spec = SandboxSpec(
            id=self.sandbox,
            team=TEAM,
            template="base",
            build=BUILD if rng.random() < 0.97 else BuildId("no such build"),
            limits=Limits(disk_bytes_max=DISK_BYTES_DEFAULT * (2 if odd_size else 1)),
            created_at=now,
            end_at=now + rng.choice((0.0, 1.0, 5.0, 30.0, 120.0)),
            # By their names, so that they take no draw.
            on_timeout=OnTimeout.PARK if self.sandbox[-3] < "d" else OnTimeout.KILL,
            on_drain=Disposition.PARK if self.sandbox[-4] < "h" else None,
            egress=EgressRules(internet=rng.random() < 0.5),
            # By its name, so that it takes no draw.
            traffic_private=self.sandbox[-1] < "h",
            mask_request_host="app.example:${PORT}" if self.sandbox[-2] < "h" else None,
        )
        self._world.trace.say("create", sandbox=self.sandbox, end_at=spec.end_at)

        def unless_there() -> list[tuple[str, bytes, int | None]]:
            if self.sandbox in self._world.facts.specs:
                return []  # the answer was lost with the daemon, the commit was not
            return [(keys.SANDBOX_SPEC + self.sandbox, _encode(spec), 0)]

        await self._world.write(unless_there, labels={"team": TEAM})

    async def meddle(self, rng: random.Random) -> None:
        """Somebody else changes the same sandbox, and takes his time between looking and writing."""
        for _ in range(rng.randint(0, 3)):
            await self._world.sleep(rng.uniform(1.0, 10.0))
            if self.sandbox in self._world.facts.specs:
                await self._change(self._extended, think_s=rng.uniform(0.0, 2.0))

    async def _change(self, edit: object, *, think_s: float = 0.0) -> None:
        def changed() -> list[tuple[str, bytes, int | None]]:
            spec = self._world.facts.specs.get(self.sandbox)
            if spec is None:
                return []
            new: SandboxSpec = edit(spec)  # type: ignore[operator]
            revision = self._world.facts.spec_revisions[self.sandbox]
            return [(keys.SANDBOX_SPEC + self.sandbox, _encode(new), revision)]

        self._world.trace.say("change", sandbox=self.sandbox, how=getattr(edit, "__name__", "?"))
        for _ in range(20):
            try:
                await self._world.write(changed, think_s=think_s)
            except RevisionConflict:
                await self._world.sleep(0.05)
                continue
            return

    def _new_rules(self, spec: SandboxSpec) -> SandboxSpec:
        return msgspec.structs.replace(spec, egress=EgressRules(allow=(f"198.51.100.{self._rng.randint(1, 9)}",)))

    def _extended(self, spec: SandboxSpec) -> SandboxSpec:
        return msgspec.structs.replace(spec, end_at=spec.end_at + 10.0)

    def _shortened(self, spec: SandboxSpec) -> SandboxSpec:
        return msgspec.structs.replace(spec, end_at=self._world.clock.wall() + self._rng.uniform(-1.0, 2.0))

    def _frozen(self, spec: SandboxSpec) -> SandboxSpec:
        return msgspec.structs.replace(spec, frozen=True)

    def _thawed(self, spec: SandboxSpec) -> SandboxSpec:
        return msgspec.structs.replace(spec, frozen=False, end_at=max(spec.end_at, self._world.clock.wall() + 5.0))

    def _parked(self, spec: SandboxSpec) -> SandboxSpec:
        return msgspec.structs.replace(spec, park=spec.park or SnapshotId(f"s{spec.id}"))

    def _stopped(self, spec: SandboxSpec) -> SandboxSpec:
        if spec.stop is not None:
            return spec
        order = StopOrder(reason=KillReason.REQUEST, by="client", at=self._world.clock.wall())
        return msgspec.structs.replace(spec, stop=order)


__all__ = ["ANSWERS", "BUILD", "TEAM", "Client", "Phase"]

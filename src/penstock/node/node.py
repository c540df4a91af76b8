"""One machine: opens by taking up what lives, runs by following the feed, closes as it is told to.

Stopping the daemon is not draining the node: `close(KEEP)` leaves every sandbox running for the next daemon.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from enum import StrEnum
from typing import Final

import msgspec

from penstock.core.breaker import Breaker
from penstock.core.clock import Clock
from penstock.core.crew import Crew
from penstock.core.deadlines import DeadlinePassed, Pulse, within
from penstock.core.gate import Gate
from penstock.feed.report import Reports
from penstock.feed.source import Source
from penstock.feed.view import View
from penstock.model import keys
from penstock.model.drain import DrainOrder, DrainReport, Fate, Outcome
from penstock.model.node import NodeSpec, NodeStatus
from penstock.model.sandbox import Phase, SandboxSpec, SandboxStatus
from penstock.model.template import Build
from penstock.node.adopt import adopt
from penstock.node.chronicle import Chronicle
from penstock.node.drain import Drain
from penstock.node.expiry import Expiry
from penstock.node.facts import Machine, NodeStatistics, statistics
from penstock.node.images import Images
from penstock.node.life import Explained
from penstock.node.means import Means, NodeSettings
from penstock.node.pools import make_pools
from penstock.node.ports import Ports
from penstock.node.quarantine import Quarantine
from penstock.node.reap import Leak, Sweeper
from penstock.node.report import Reporter
from penstock.node.sync import Sync
from penstock.node.tally import Tally

STATUS_EVERY_S: Final = 5.0


class Closing(StrEnum):
    """What closing does to sandboxes."""

    KEEP = "keep"  # they run on
    DRAIN = "drain"  # notice, then what is left after the grace is forced
    FORCE = "force"  # killed now


class Node:
    """A node of an installation.

    - `settings`: bounds, ids, the claimed block of slot numbers.
    - `ports`: the edges to Linux (`node/linux`) or to a kernel in memory (`sim`).
    - `source`: where specs and builds are read (`feed.local` or `feed.remote`).
    - `reports`: where statuses go, written as room "node".
    - `clock`: wall time for ends and records, monotonic for durations.
    - `rng`: jitter of back-offs only.
    - `machine`: boot id and sizes.
    - `token_seed`: 32 bytes of the data folder; guests' access tokens derive from it.

    Life: `await open()`, `await run()` (until cancelled, or until a part of the node fails), `await close(...)`.
    `close` may be called at any time after `open`, also when `run` failed.
    """

    def __init__(
        self,
        *,
        settings: NodeSettings,
        ports: Ports,
        source: Source,
        reports: Reports,
        clock: Clock,
        rng: random.Random,
        machine: Machine,
        token_seed: bytes,
    ) -> None:
        self.settings, self.ports, self.machine = settings, ports, machine
        self._source, self._clock, self._rng = source, clock, rng
        self._crew = Crew(f"node {settings.id}", on_error=self._on_error)
        self.gate = Gate(f"node {settings.id}")
        self._builds: View[Build] = View(source, keys.BUILD, _decode_build)
        self._specs: View[SandboxSpec] = View(source, keys.SANDBOX_SPEC, _decode_spec)
        self._node_specs: View[NodeSpec] = View(source, keys.NODE_SPEC, _decode_node_spec)
        self._reporter = Reporter(reports, crew=self._crew, rng=rng)
        self._sweeper = Sweeper(ports, step_within_s=settings.step_within_s, owned=self._owned)
        self._images = Images(source, ports.disks, self._reporter, lambda: self._sync.supervisors.values())  # noqa: PLW0108
        self._expiry = Expiry(clock, lambda sandbox: self._sync.on_due(sandbox))  # noqa: PLW0108  made in `open`
        self._tally = Tally()
        self._chronicle = Chronicle(self._reporter, clock, settings.id)
        self._token_seed = token_seed
        self._failed: BaseException | None = None
        self._failure = asyncio.Event()
        self._started_at = 0.0
        self._told: NodeStatus | None = None
        self._drain_report: DrainReport | None = None
        self.leaks: tuple[Leak, ...] = ()

    # -- life --

    async def open(self) -> None:
        """Re-take the network, adopt what lives, sweep what nobody owns, start the pools, follow the feed.

        Raises what the network or the feed raise; nothing of ours is lost by that, the next open finds it.
        """
        self._started_at = self._clock.wall()
        await self.ports.network.open()
        await self._crew.__aenter__()
        try:
            await self._open()
        except BaseException:
            await self._crew.__aexit__(None, None, None)
            raise

    async def _open(self) -> None:
        self._means = self._make_means()
        before = await self._statuses_before()
        self._sync = Sync(
            means=self._means, seen_at=lambda: self._specs.revision, before=before, on_bug=self._tally.bug
        )
        self.drain = Drain(
            self._means,
            supervised=lambda: self._sync.supervisors,
            tell=self._tell_drain,
            tell_outcome=self._tell_outcome,
        )
        self.quarantine = Quarantine(self._means, supervised=lambda: self._sync.supervisors)
        self._crew.spawn(self._expiry.run(), name="expiry")
        self._sync.take_up(adopt(self._means))
        await self.sweep()
        self._means.slots.open()
        self._means.disks.open()
        await self._builds.start(self._crew)
        await self._images.follow(self._crew)
        await self._follow_drains()  # before the first assignment: a draining node takes none
        self._specs.subscribe(self._sync.on_spec)
        await self._specs.start(self._crew)
        self._sync.bury(set(self._specs.ids()))
        self._crew.spawn(self._sweep_now_and_then(), name="sweep")
        self._crew.spawn(self._tell_of_itself(), name="node status")

    async def _follow_drains(self) -> None:
        def on_spec(node: str, spec: NodeSpec | None) -> None:
            if node == self.settings.id:
                self.drain.on_spec(spec)

        self._node_specs.subscribe(on_spec)
        await self._node_specs.start(self._crew)
        spec = self._node_specs.get(self.settings.id)
        listing = await self._source.list(keys.NODE_STATUS + self.settings.id)
        for record in listing.records:
            self._drain_report = self._drain_report or _decode_node_status(record.value).drain
        if spec is not None and spec.drain is not None:
            told = await self._source.list(keys.drain(spec.id, spec.epoch) + "/")
            self.drain.remember([_decode_outcome(record.value) for record in told.records])
        self._crew.spawn(self.drain.run(), name="drain")

    async def run(self) -> None:
        """Until cancelled; raises when a part of the node itself (not a sandbox) failed: the daemon should restart."""
        await self._failure.wait()
        assert self._failed is not None
        raise self._failed

    async def empty(
        self, closing: Closing, *, within_s: float | None = 30.0, propagation_s: float = 0.0
    ) -> tuple[Outcome, ...]:
        """End every sandbox, and admit none: the first half of a close that keeps none, while others can still ask.

        `within_s` bounds a drain until force (None: as long as it takes), after `propagation_s` in which nobody is
        asked to leave; force has its own bound. Returns what was forced or could not be verified gone. If cancelled,
        what was asked of sandboxes stays asked.
        """
        assert closing is not Closing.KEEP, "a close that keeps sandboxes empties nothing"
        self._sync.close()
        self.gate.cordon("the node stops")
        now = self._clock.wall()
        begin = now + propagation_s
        order = DrainOrder(
            at=now,
            epoch=self.drain.epoch + 1,
            reason="the node stops",
            soft_at=None if within_s is None else begin,
            hard_at=None if within_s is None else begin + within_s,
            propagation_s=propagation_s,
            force_number=1 if closing is Closing.FORCE else 0,
        )
        self.drain.stop(order)
        await self.drain.ended()
        return tuple(each for each in self.drain.outcomes if each.fate in (Fate.FORCE, Fate.QUARANTINE))

    async def close(self, closing: Closing, *, within_s: float | None = 30.0) -> tuple[Outcome, ...]:
        """Stop as told; `within_s` as for `empty`, which it does first unless that was done.

        KEEP waits for starts and kills under way (`close_within_s`), gives builds `build_stop_s` and then forces them,
        and leaves. DRAIN and FORCE end every sandbox, then remove pools and router; what cannot be verified gone stays
        recorded for the next open. Idempotent. Returns what was forced or could not be verified gone.
        """
        self._sync.close()
        self.gate.cordon("the node stops")
        forced: tuple[Outcome, ...] = ()
        try:
            if closing is Closing.KEEP:
                await self._settle()
            else:
                forced = await self.empty(closing, within_s=within_s)
        finally:
            await self._leave(closing)
        return forced

    def force(self) -> None:
        """End every sandbox now: turns a stop under way into force. Returns at once; `close` waits for the end."""
        self.drain.force()

    @property
    def draining(self) -> DrainReport | None:
        """How far the drain or the stop under way has got; of the last one when none is."""
        report = self.drain.report
        return None if report is None else msgspec.structs.replace(report, waiting=self.drain.left())

    def living(self) -> list[SandboxSpec]:
        """Specs of the sandboxes that serve here now, as far as their specs were seen."""
        found = (self._sync.spec(sandbox) for sandbox, one in self._sync.supervisors.items() if one.serving)
        return [spec for spec in found if spec is not None]

    def disk_name(self, sandbox: str) -> str:
        """Under which name the disk of a sandbox is known to the port `Disks`."""
        numbers = self._means.disks.owned_by(sandbox)
        return self._means.disks.name(numbers[0]) if numbers else sandbox

    def statistics(self) -> NodeStatistics:
        return statistics(
            self._means,
            self._sync.supervisors.values(),
            reports_waiting=self._reporter.waiting,
            swept_total=dict(self._sweeper.removed),
            leaks=self.leaks,
        )

    def explain(self, sandbox: str) -> Explained | None:
        """What this node knows of a sandbox it supervises."""
        supervisor = self._sync.supervisors.get(sandbox)
        return supervisor.explain() if supervisor is not None else None

    # -- opening --

    def _make_means(self) -> Means:
        settings, ports = self.settings, self.ports
        slots, disks = make_pools(settings, ports, self._crew, self._rng)
        return Means(
            settings=settings,
            ports=ports,
            clock=self._clock,
            rng=self._rng,
            boot_id=self.machine.boot_id,
            token_seed=self._token_seed,
            crew=self._crew,
            gate=self.gate,
            starts=Breaker(settings.starts_running_max, settings.starts_waiting_max, f"starts of node {settings.id}"),
            slots=slots,
            disks=disks,
            expiry=self._expiry,
            reporter=self._reporter,
            chronicle=self._chronicle,
            tally=self._tally,
            changed=Pulse(),
            build=self._builds.get,
        )

    async def _statuses_before(self) -> dict[str, SandboxStatus]:
        """What this node had said of its sandboxes in an earlier life, from CREATING on."""
        listing = await self._source.list(keys.SANDBOX_STATUS)
        found = (_decode_status(record.value) for record in listing.records)
        return {
            status.id: status
            for status in found
            if status.node == self.settings.id and status.phase not in (Phase.PENDING, Phase.BOUND)
        }

    # -- while open --

    def _on_error(self, name: str, error: BaseException) -> None:
        """A task of the crew failed. Sandboxes' own are handled by `Sync`; what comes here is the node's."""
        self._tally.bug(name, error)
        if self._failed is None:
            self._failed = error
            self._failure.set()

    async def _sweep_now_and_then(self) -> None:
        while True:
            await asyncio.sleep(self.settings.sweep_every_s)
            await self.sweep()

    async def sweep(self) -> dict[str, int]:
        """Remove what is ours and dead, as is done now and then. By kind what was removed; `leaks` has what stays."""
        before = self._sweeper.removed.copy()
        if not self._sync.pinned:  # a record that cannot be read may announce an image
            self._sweeper.count("image", self._images.sweep())
        found = await self._sweeper.sweep()
        self.leaks = tuple(leak for leak in found if leak.kind != "record" or not self._owned(leak.name))
        return dict(self._sweeper.removed - before)

    def _owned(self, record: str) -> bool:
        """Somebody here is at work on it: between its record and its objects is where everything begins and ends."""
        pools = (self._means.slots, self._means.disks)
        return record in self._sync.supervisors or any(pool.owns(record) for pool in pools)

    async def _tell_of_itself(self) -> None:
        while True:
            self._tell_status()
            await asyncio.sleep(STATUS_EVERY_S)

    def _tell_status(self) -> None:
        status = NodeStatus(
            id=self.settings.id,
            boot_id=self.machine.boot_id,
            started_at=self._started_at,
            installation=self.settings.installation,
            sandboxes=len(self._sync.supervisors),
            sandboxes_max=self.settings.slot_count,
            starting=len(self.gate.held("start")),
            cpu_count=self.machine.cpu_count,
            memory_bytes=self.machine.memory_bytes,
            isolation=self.machine.isolation,
            drain=self._drain_report,
        )
        if status != self._told:
            self._reporter.say_node(status)
            self._told = status

    def _tell_outcome(self, epoch: int, outcome: Outcome) -> None:
        self._reporter.say_outcome(self.settings.id, epoch, outcome)
        spec = self._sync.spec(outcome.sandbox)
        self._chronicle.outcome(epoch, outcome, team=spec.team if spec is not None else "")

    def _tell_drain(self, report: DrainReport) -> None:
        self._chronicle.drain(report)
        self._drain_report = report
        self._reporter.say_drain(report)
        self._tell_status()

    # -- closing --

    async def _settle(self) -> None:
        """Wait until no start and no end is under way; a start that still waits for its turn stays bound."""
        await self._stop_builds()
        try:
            async with within(self.settings.close_within_s, "starts and ends under way"):
                await self._means.changed.wait_for(
                    lambda: all(one.settled or one.phase is Phase.BOUND for one in self._sync.supervisors.values()),
                    until=None,
                )
        except DeadlinePassed:
            pass  # Safe: what is half made or half gone is recorded, and the next open undoes or finishes it.

    async def _stop_builds(self) -> None:
        """A build does not outlive its daemon: it may end within its grace, then it is forced, and says so itself."""
        try:
            async with within(self.settings.build_stop_s, "builds under way"):
                await self._means.changed.wait_for(lambda: not self.gate.held("build"), until=None)
        except DeadlinePassed:
            await self.gate.expel("build", within_s=self.settings.close_within_s)

    async def _leave(self, closing: Closing) -> None:
        """Give everything of this process back, even when one part fails; then raise what failed."""
        keep = closing is Closing.KEEP
        means, within_s = self._means, self.settings.close_within_s
        errors: list[Exception] = []
        parts: tuple[tuple[str, Callable[[], Awaitable[object]]], ...] = (
            ("reports", lambda: self._reporter.flush(within_s)),
            ("slots", lambda: means.slots.close(within_s=within_s, leave_taken=keep)),
            ("disks", lambda: means.disks.close(within_s=within_s, leave_taken=keep)),
            ("crew", lambda: self._crew.__aexit__(None, None, None)),
            ("launcher", self.ports.launcher.close),
            ("network", lambda: self.ports.network.close(destroy=not keep)),
        )
        for what, leave in parts:
            try:
                await leave()
            except Exception as error:
                error.add_note(f"while leaving {what}")
                errors.append(error)
        if errors:
            raise ExceptionGroup(f"node {self.settings.id} closed with errors", errors)


_decode_spec: Final = msgspec.json.Decoder(SandboxSpec).decode
_decode_status: Final = msgspec.json.Decoder(SandboxStatus).decode
_decode_node_spec: Final = msgspec.json.Decoder(NodeSpec).decode
_decode_node_status: Final = msgspec.json.Decoder(NodeStatus).decode
_decode_outcome: Final = msgspec.json.Decoder(Outcome).decode
_decode_build: Final = msgspec.json.Decoder(Build).decode

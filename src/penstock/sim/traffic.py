"""A world with traffic: the production ingress and guests, joined by a network in memory, and people who use them.

The ingress is a process of its own. It follows the daemon's feed over the feed's own frames, dies and is started again
by itself, and keeps its routes while the daemon is away.
"""

from __future__ import annotations

import asyncio
import os
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from penstock.core.crew import Crew
from penstock.core.deadlines import within
from penstock.core.errors import PenstockError
from penstock.feed.local import LocalSource
from penstock.feed.remote import RemoteSource
from penstock.feed.server import FeedServer
from penstock.ingress.client import Client as IngressClient
from penstock.ingress.dial import PortClosed, SandboxGone
from penstock.ingress.follow import Follower
from penstock.ingress.hub import Hub
from penstock.ingress.sandbox_tokens import Tokens
from penstock.ingress.table import Route, Table
from penstock.model import keys
from penstock.model.sandbox import TERMINAL
from penstock.node.linux.guests import SocketGuests
from penstock.sim import loop as virtual
from penstock.sim.checkers import Violation
from penstock.sim.daemon import TOKEN_SEED, Daemon
from penstock.sim.faults import Rates
from penstock.sim.inhabitants import House, guest_address, port_address
from penstock.sim.judge import Judge
from penstock.sim.machinery import Dead, Machinery
from penstock.sim.net import Net
from penstock.sim.visits import INGRESS, Visit
from penstock.sim.world import WORLD_S, Outcome, World
from penstock.wire.routing import GUEST_PORT

FEED: Final = "unix:/sim/feed.sock"
VISITED_MAX: Final = 8  # sandboxes of one world
VISITORS: Final = 3  # of one sandbox, at once
VISITS_MAX: Final = 6  # of one visitor
SETTLED_S: Final = 2.0  # after a cut of the feed, for both watches to be back
GRACE_S: Final = 1.0

P = TypeVar("P", bound=asyncio.BaseProtocol)


def run(seed: int, *, rates: Rates | None = None, keep_trace: bool = False) -> Outcome:
    """Play world `seed` with traffic. Raises Violation (or what broke) with the end of the trace as notes."""
    before = _descriptors()
    with tempfile.TemporaryDirectory(prefix="penstock-sim-") as folder:
        outcome = virtual.run(_play(seed, rates, keep_trace, Path(folder)), seed)
    if (left := _descriptors() - before) > 0:
        raise Violation(f"seed {seed}: {left} descriptors are left open")
    return outcome


async def _play(seed: int, rates: Rates | None, keep_trace: bool, folder: Path) -> Outcome:
    world = TrafficWorld(random.Random(seed), folder, rates=rates, keep_trace=keep_trace)
    try:
        async with within(WORLD_S, f"the end of world {seed}"):
            await world.play()
    except BaseException as error:
        error.add_note(f"{world.describe()}\nthe trace ends with\n{world.trace.tail()}")
        error.add_note(f"replay with: python -m penstock.sim --traffic --seed {seed}")
        raise
    finally:
        world.house.close()
    return world.outcome(seed)


class TrafficWorld(World):
    """A world whose sandboxes are lived in and visited."""

    def __init__(
        self, rng: random.Random, folder: Path, *, rates: Rates | None = None, keep_trace: bool = False
    ) -> None:
        super().__init__(rng, rates=rates, keep_trace=keep_trace)
        del self._clients[VISITED_MAX:]
        self._dice = random.Random(rng.getrandbits(64))
        self.net = Net(random.Random(rng.getrandbits(64)))
        self.judge = Judge(self.kernel, self.facts, self.blame)
        self.kernel.in_person = SocketGuests(lambda path: self.net.open_streams(guest_address(path)))
        self.house = House(self.net, self.clock, random.Random(rng.getrandbits(64)), folder, self.blame)
        self.descriptors_max = self._dice.choice((12, 60, 1_000))
        self.ingress: Ingress | None = None
        self._ingresses = self._visits = 0
        self._cuts, self._feed_cut_at = 0, -SETTLED_S
        # A world without other faults has none of these either: no ingress ends, no connection is cut.
        calm = self.rates == Rates()
        self._ingress_ends = 0 if calm else self._dice.choice((0, 0, 1, 2))
        self._cuts_wanted = 0 if calm else self._dice.choice((0, 1, 4))
        self.judge.tight = self.descriptors_max < 1_000
        self.judge.ingress_now = lambda: self._ingresses if self.ingress is not None else 0
        self.judge.cuts_now = lambda: self._cuts
        self.judge.feed_now = self._feed_now
        self._told, self.kernel.told = self.kernel.told, self._on_kernel
        self._pids: dict[str, int] = {}

    def outcome(self, seed: int) -> Outcome:
        return msgspec.structs.replace(super().outcome(seed), verdicts=self.judge.verdicts)

    # ---- what visits use

    def blame(self, what: str) -> None:
        self.checkers.blame(what)

    def say(self, what: str, **facts: object) -> None:
        self.trace.say(what, **facts)

    def wall(self) -> float:
        return self.clock.wall()

    # ---- what the world does beside

    def live_beside(self, crew: Crew) -> list[asyncio.Task[object]]:
        self.start(crew, self._keep_ingress(), "ingress's keeper")
        self.start(crew, self._cut_connections(), "cuts")
        for each in self._clients:
            self.start(crew, each.meddle(random.Random(self._dice.getrandbits(64))), f"meddler with {each.sandbox}")
        return [
            self.start(crew, self._visit(each.sandbox), f"visitor {number} of {each.sandbox}")
            for each in self._clients
            for number in range(VISITORS)
        ]

    async def serve_beside(self, daemon: Daemon, crew: Crew) -> None:
        server = FeedServer(LocalSource(daemon.store), Path(FEED), prefixes=(keys.SANDBOX_SPEC, keys.SANDBOX_STATUS))
        self.net.serve_streams(FEED, lambda reader, writer: server.accept(crew, reader, writer))

    def daemon_died(self, process: str) -> None:
        self.net.kill(process)

    async def end(self) -> None:
        """Nobody is left inside, so nothing may be held for anybody."""
        await asyncio.sleep(SETTLED_S)
        ingress = self.ingress
        if ingress is not None:
            if left := ingress.left():
                raise Violation(f"at rest, the ingress holds {left}")
            await ingress.leave(self.net, GRACE_S)
        await super().end()

    def _on_kernel(self, kind: str, name: str, verb: str) -> None:
        self._told(kind, name, verb)
        if kind != "process":
            return
        if verb == "made":
            proc = next(proc for proc in self.kernel.processes.values() if proc.order.sandbox == name)
            self._pids[name] = proc.pid
            self.house.move_in(proc)
        elif verb == "gone":
            pid = self._pids.pop(name)
            self.house.move_out(pid)
            self.judge.on_end(pid)

    def _feed_now(self) -> int:
        daemon, ingress = self.daemon, self.ingress
        away = daemon is None or not daemon.up or ingress is None or not ingress.follower.connected
        if away or self.clock.monotonic() < self._feed_cut_at + SETTLED_S:
            return 0
        assert daemon is not None
        return daemon.life.number

    async def _visit(self, sandbox: str) -> None:
        """Somebody who comes back until the sandbox is gone, and once more."""
        rng = random.Random(self._dice.getrandbits(64))
        await self.until(
            lambda: sandbox in self.facts.statuses or self._removed(sandbox), WORLD_S, f"news of {sandbox}"
        )
        for _ in range(VISITS_MAX):
            await self.until(lambda: self.judge.moment(sandbox).pid > 0 or self._ended(sandbox), WORLD_S, "a guest")
            if self._ended(sandbox) and rng.random() < 0.7:
                return
            self._visits += 1
            visit = Visit(
                self,
                random.Random(rng.getrandbits(64)),
                sandbox,
                self.house.home(sandbox) / f"visit{self._visits:05}",
                seed=TOKEN_SEED,
                private=sandbox[-1] < "h",
            )
            await visit.go()
            if self._ended(sandbox):
                return
            await self.sleep(rng.choice((0.0, 0.1, 2.0)))

    def _ended(self, sandbox: str) -> bool:
        status = self.facts.statuses.get(sandbox)
        return status is None or status.phase in TERMINAL

    def _removed(self, sandbox: str) -> bool:
        """It was asked for, and is not any more."""
        return sandbox in self.facts.spec_revisions and sandbox not in self.facts.specs

    # ---- what goes wrong

    async def _keep_ingress(self) -> None:
        """Start an ingress; end it some time, kindly or not; start the next."""
        ends = self._ingress_ends
        while True:
            self.trace.say("ingress starts")
            ingress = Ingress(self, f"ingress {self._ingresses + 1}")
            await ingress.start(self.net)
            self._ingresses += 1
            self.ingress = ingress
            if ends == 0:
                return
            ends -= 1
            await asyncio.sleep(self._dice.uniform(2.0, 20.0))
            if self._over:
                return
            kind = self._dice.random() < 0.5
            self.trace.say("ingress stops", kind=kind)
            self.ingress = None
            await ingress.leave(self.net, GRACE_S if kind else None)
            await asyncio.sleep(self._dice.uniform(0.0, 2.0))

    async def _cut_connections(self) -> None:
        for _ in range(self._cuts_wanted):
            await asyncio.sleep(self._dice.uniform(1.0, 10.0))
            match self._dice.randrange(4):
                case 0:
                    self._feed_cut_at = self.clock.monotonic()
                    self.trace.say("feed cut", connections=self.net.cut(FEED, 0.6))
                case 1:
                    await self._hide_feed(self._dice.uniform(0.5, 5.0))
                case _:
                    self._cuts += 1
                    self.trace.say("clients cut", connections=self.net.cut(INGRESS, 0.4))

    async def _hide_feed(self, seconds: float) -> None:
        """Nobody gets through to the daemon, which meanwhile gives up its history."""
        self.net.away.add(FEED)
        self._feed_cut_at = self.clock.monotonic() + seconds
        self.trace.say("feed hidden", connections=self.net.cut(FEED, 1.0))
        await asyncio.sleep(seconds)
        daemon = self.daemon
        if daemon is not None and daemon.up:
            try:
                async with within(1.0, "a compaction"):
                    await daemon.store.compact(daemon.store.revision)
            except (PenstockError, Dead):
                pass  # Safe: it dies, or its log does; then nothing is given up.
        self.net.away.discard(FEED)


class Ingress:
    """One life of the ingress, as `run.ingress` puts it together."""

    def __init__(self, world: TrafficWorld, name: str) -> None:
        self._world, self.name = world, name
        self._dice = random.Random(world.rng.getrandbits(64))
        self.table = Table()
        self.follower: Follower
        self.hub: Hub
        self._serving = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self, net: Net) -> None:
        """Returns when it listens."""
        self._task = virtual.start_process(self.name, self._live(net))
        self._task.add_done_callback(self._look)
        await self._serving.wait()

    async def leave(self, net: Net, grace_s: float | None) -> None:
        """SIGTERM; or with None, SIGKILL."""
        assert self._task is not None
        if grace_s is not None:
            self._listener.close()
            await self.hub.stop(grace_s=grace_s)
        net.kill(self.name)
        self._task.cancel("the ingress has ended")
        await asyncio.sleep(0.1)

    def left(self) -> str:
        """What it holds that belongs to no living sandbox; empty is right."""
        held = {
            "clients": len(self.hub.clients),
            "upstreams": len(self.hub.upstreams),
            "kept": len(self.hub.pool),
            "dials": self.hub.pool.dialling,
            "routes": len(self.table.routes),
        }
        return ", ".join(f"{count} {what}" for what, count in held.items() if count)

    async def _live(self, net: Net) -> None:
        world = self._world
        async with Crew("ingress", on_error=self._fault) as crew:
            self.follower = Follower(
                RemoteSource(Path(FEED), rng=self._dice, connect=lambda path: net.open_streams(str(path))),
                self.table,
                on_trouble=lambda trouble: world.blame(f"the follower failed: {trouble!r}"),
            )
            self.hub = Hub(
                loop=asyncio.get_running_loop(),
                table=self.table,
                dialler=SimDialler(net, world.kernel),
                tokens=Tokens(TOKEN_SEED),
                crew=crew,
                descriptors_max=world.descriptors_max,
                catch_up=self.follower.catch_up,
            )
            crew.spawn(self.follower.follow(), name="follower")
            await self.follower.wait_complete(within_s=5.0)
            self._listener = net.listen(INGRESS, lambda: IngressClient(self.hub))
            self._serving.set()
            await asyncio.get_running_loop().create_future()

    def _fault(self, task: str, error: BaseException) -> None:
        self._world.blame(f"a task of the ingress failed: {task}: {error!r}")

    def _look(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            self._world.blame(f"the ingress ended by itself: {task.exception()!r}")
            self._serving.set()


class SimDialler:
    """Connects into sandboxes, by the rules of `LinuxDialler`: the guest by its socket, a port by the namespace."""

    def __init__(self, net: Net, machine: Machinery) -> None:
        self._net, self._machine = net, machine

    async def dial(self, route: Route, port: int, make: Callable[[], P]) -> P:
        guest = port == GUEST_PORT
        address = guest_address(route.guest_socket) if guest else port_address(route.pid, port)
        try:
            _, protocol = await self._net.connect(address, make)
        except ConnectionRefusedError as error:
            proc = self._machine.processes.get(route.pid)
            if guest or proc is None or proc.start_ticks != route.start_ticks:
                raise SandboxGone("nobody is there", which=route.sandbox) from error
            raise PortClosed("nobody listens", which=f"{route.sandbox}:{port}") from error
        return protocol

    def forget(self, route: Route) -> None:
        pass


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))

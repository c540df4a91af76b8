"""A seeded world: the production daemon over a kernel, a log and a clock in memory, with people using it and dying.

`run(seed)` plays one world to its end and raises when an invariant was broken; equal seeds give equal traces. The
daemon may die inside any append to a record (so between any two ledger entries) and be started again; the kernel, the
records and the log live on, or the machine is rebooted with it.
"""

from __future__ import annotations

import asyncio
import inspect
import random
from collections.abc import Callable
from typing import Final

import msgspec

from penstock.core.crew import Crew
from penstock.core.deadlines import Pulse, within
from penstock.model.errors import Unavailable
from penstock.model.ids import NodeId
from penstock.model.records import Batch
from penstock.model.sandbox import TERMINAL
from penstock.node.means import NodeSettings
from penstock.node.node import Closing
from penstock.node.reap import find_leaks
from penstock.sim import loop as virtual
from penstock.sim.checkers import Checkers, Facts, Violation
from penstock.sim.daemon import Daemon, fork
from penstock.sim.faults import Faults, Rates, draw_rates
from penstock.sim.guests import Nursery
from penstock.sim.kernel import Dead, Kernel, Life
from penstock.sim.operator import Drains, Operator
from penstock.sim.trace import Trace
from penstock.sim.workload import Client
from penstock.store.errors import RevisionConflict, StoreFailed
from penstock.store.memory import MemoryLog
from penstock.store.ops import Put

NODE: Final = NodeId("node0")
CLIENTS_MAX: Final = 24
REST_S: Final = 300.0  # for quarantines to be reaped once the faults are over
WORLD_S: Final = 3_000.0  # virtual seconds no world may exceed
WRITE_S: Final = 5.0
LOOK_S: Final = 0.25
ANSWER_S: Final = 400.0
DAEMON: Final = "daemon"  # its processes are called so, and numbered

Writes = list[tuple[str, bytes, int | None]]


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What one world did. `digest` is over the whole trace."""

    seed: int
    digest: str
    lines: int
    virtual_s: float
    sandboxes: int
    crashes: int
    answers: dict[str, int]
    foreseen: int = 0  # fates of drains that went as ordered
    came_true: int = 0
    verdicts: dict[str, int] = {}  # of a world with traffic: how requests were judged


def run(seed: int, *, rates: Rates | None = None, keep_trace: bool = False) -> Outcome:
    """Play world `seed`. Raises Violation (or what broke) with the seed and the end of the trace as notes."""
    return virtual.run(_play(seed, rates, keep_trace), seed)


async def _play(seed: int, rates: Rates | None, keep_trace: bool) -> Outcome:
    world = World(random.Random(seed), rates=rates, keep_trace=keep_trace)
    try:
        async with within(WORLD_S, f"the end of world {seed}"):
            await world.play()
    except BaseException as error:
        error.add_note(f"{world.describe()}\nthe trace ends with\n{world.trace.tail()}")
        error.add_note(f"replay with: python -m penstock.sim --seed {seed}")
        raise
    return world.outcome(seed)


class World:
    """One machine, one daemon after another, a few people."""

    def __init__(self, rng: random.Random, *, rates: Rates | None = None, keep_trace: bool = False) -> None:
        self.rng = rng
        self.rates = rates if rates is not None else draw_rates(rng)
        self.clock = virtual.SimClock(asyncio.get_running_loop())
        self.trace = Trace(self.clock.monotonic, keep_all=keep_trace)
        self.faults = Faults(fork(rng), self.rates)
        self.kernel = Kernel(
            faults=self.faults, nursery=Nursery(fork(rng), odd=self.rates.odd_guests), trace=self.trace
        )
        self.kernel.wall = self.clock.wall
        self.facts = Facts()
        self.checkers = Checkers(self.kernel, self.facts, self.trace, self.clock.wall)
        self.checkers.slack_s = 2.5 if self.rates.slow or self.rates.failure else 0.05
        self.drains = Drains(self)
        self.log = MemoryLog(delay_s=rng.choice((0.0, 0.0005, 0.02)))
        self.daemon: Daemon | None = None
        self.crashes = 0
        self.lives = 0
        self._settings = NodeSettings(
            id=NODE,
            installation="simsim",
            slot_count=rng.choice((4, 12, 64)),
            slots_ready=2,
            disks_ready=2,
            starts_running_max=rng.choice((2, 8)),
            starts_waiting_max=rng.choice((2, 1_000)),
            start_within_s=5.0,
            sweep_every_s=5.0,
        )
        self._clients = [Client(self, fork(rng)) for _ in range(rng.randint(6, CLIENTS_MAX))]
        self._operator = Operator(self, fork(rng))
        self._changed = Pulse()
        self._own: set[asyncio.Task[object]] = set()
        self._over = False

    async def play(self) -> None:
        """Everybody's life, then calm, then rest, then the end of the machine; checked at each step."""
        async with Crew("world") as crew:
            current = asyncio.current_task()
            assert current is not None
            self._own.add(current)
            self.start(crew, self._keep_alive(), "daemon's keeper")
            self.start(crew, self._watch_expiry(), "expiry checker")
            self.start(crew, self._step_clock(), "clock steps")
            self.start(crew, self._stop_as_planned(), "planned stops")
            clients = [self.start(crew, client.live(), f"client {client.sandbox}") for client in self._clients]
            operator = self.start(crew, self._operator.live(), "operator")
            beside = self.live_beside(crew)
            for client in (operator, *clients, *beside):
                await client
            self.faults.calm()
            self.trace.say("calm")
            await self.until(self._at_rest, REST_S, "rest after the faults")
            self._over = True
            await self.end()
            crew.cancel_all()
        self._raise_violations()

    def live_beside(self, crew: Crew) -> list[asyncio.Task[object]]:
        """Start what a world has beside its machine and its clients. What is returned is awaited as clients are."""
        return []

    async def serve_beside(self, daemon: Daemon, crew: Crew) -> None:
        """What a daemon serves to other processes, once its store is open. `crew` is the daemon's."""

    def daemon_died(self, process: str) -> None:
        """What the kernel does for others when that process is no more."""

    # -- what clients use --

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        self._raise_violations()

    async def until(self, condition: Callable[[], bool], within_s: float, what: str) -> None:
        """Wait for a state of the store. Raises Violation when it does not come."""
        until = self.clock.monotonic() + within_s
        came = await self._changed.wait_for(lambda: condition() or bool(self.checkers.violations), until=until)
        self._raise_violations()
        if not came:
            raise Violation(f"{what} did not come within {within_s:g} s")

    async def write(
        self, make: Callable[[], Writes], *, labels: dict[str, str] | None = None, think_s: float = 0.0
    ) -> None:
        """Commit as the front door does, through whichever daemon lives. `make` is asked again for each try.

        `think_s` passes between what `make` saw and the commit: others may be faster.

        Raises RevisionConflict.
        """
        while True:
            await self.until(self._is_up, ANSWER_S, "a daemon")
            writes = make()
            if not writes:
                return
            puts = [Put(key, value, labels=labels, expect=expect) for key, value, expect in writes]
            daemon = self.daemon
            assert daemon is not None
            if think_s:
                await self.sleep(think_s)
            try:
                async with within(WRITE_S, "a commit"):
                    await daemon.store.commit(puts, by="api")
            except RevisionConflict:
                if make():
                    raise
            except (Unavailable, StoreFailed, TimeoutError, Dead):
                await asyncio.sleep(0.1)
                continue
            return

    def blame(self, what: str) -> None:
        """An invariant was seen not to hold."""
        self.checkers.blame(what)

    def look_again(self) -> None:
        """Whoever waits for a state of the world looks at it again."""
        self._changed.fire()

    def on_revision(self, batch: Batch) -> None:
        """A revision was kept."""
        self.facts.apply(batch, self.clock.monotonic())
        self.checkers.on_revision(batch)
        self.drains.on_revision(batch)
        self._changed.fire()

    def outcome(self, seed: int) -> Outcome:
        answers: dict[str, int] = {}
        for client in self._clients:
            answer = self.checkers.answer_of(client.sandbox)
            word = answer.value if answer is not None else "removed"
            answers[word] = answers.get(word, 0) + 1
        return Outcome(
            seed=seed,
            digest=self.trace.digest(),
            lines=self.trace.length,
            virtual_s=self.clock.monotonic(),
            sandboxes=len(self._clients),
            crashes=self.crashes,
            answers=answers,
            foreseen=self.drains.foreseen,
            came_true=self.drains.came_true,
        )

    def describe(self) -> str:
        return f"{len(self._clients)} sandboxes, {self.rates}, {self._settings}"

    # -- the daemon's lives --

    async def _keep_alive(self) -> None:
        """Start a daemon; when it dies, start the next one after a while."""
        while not self._over:
            crash_after = self.rates.crash_after[self.lives] if self.lives < len(self.rates.crash_after) else None
            self.lives += 1
            life = Life(self.lives, crash_after=crash_after, before_write=self.rng.random() < 0.5)
            self.trace.say("daemon starts", life=life.number)
            daemon = Daemon(self, life, self._settings)
            task = virtual.start_process(f"{DAEMON} {life.number}", daemon.run())
            await self._outlive(daemon, life, task)
            self.daemon = None
            if self._over:
                return
            if self.rates.reboot and self.crashes == 1:
                self.kernel.reboot()
            await asyncio.sleep(self.rng.uniform(0.01, 5.0))

    async def _outlive(self, daemon: Daemon, life: Life, task: asyncio.Task[None]) -> None:
        """Until this life is over. A daemon that ends by itself is a violation, unless it was asked to."""
        task.add_done_callback(_seen)
        task.add_done_callback(lambda _: life.died.set())
        await life.died.wait()
        if not life.dead and not self._over and not daemon.asked_to_leave:
            error = None if task.cancelled() else task.exception()
            self.checkers.blame(f"the daemon ended by itself: {error!r}")
            self._changed.fire()
        life.end()
        self.crashes += not (self._over or daemon.asked_to_leave)
        self.trace.say("daemon is dead", life=life.number)
        self.daemon_died(f"{DAEMON} {life.number}")
        await self._drop_tasks()

    async def _drop_tasks(self) -> None:
        """Everything of the dead daemon stops where it is: its tasks are cancelled, and its ports refuse."""
        loop = asyncio.get_running_loop()
        assert isinstance(loop, virtual.VirtualLoop)
        for _ in range(1_000):
            left = [
                task
                for task in loop.tasks()
                if task not in self._own and not task.done() and not _outlives_daemon(loop.process_of(task))
            ]
            if not left:
                return
            for task in reversed(left):
                # One that has not begun yet is given its first step: it holds an unawaited coroutine.
                if inspect.getcoroutinestate(task.get_coro()) != inspect.CORO_CREATED:
                    task.cancel("the daemon was killed")
            await asyncio.sleep(0)
        raise Violation(f"tasks of a dead daemon do not end: {[task.get_name() for task in left]}")

    def _is_up(self) -> bool:
        return self.daemon is not None and self.daemon.up

    # -- what goes on beside --

    def start(self, crew: Crew, coro: object, name: str) -> asyncio.Task[object]:
        task: asyncio.Task[object] = crew.spawn(coro, name=name)  # type: ignore[arg-type]
        self._own.add(task)
        return task

    async def _watch_expiry(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            if self._is_up():
                self.checkers.check_expiry(self.clock.monotonic())
                self.drains.check(self.clock.monotonic())
                if self.checkers.violations:
                    self._changed.fire()

    async def _stop_as_planned(self) -> None:
        """Ask the daemon to leave, as an operator does; the keeper then starts the next one."""
        for how in self.rates.stops:
            await asyncio.sleep(self.rng.uniform(2.0, 12.0))
            daemon = self.daemon
            if daemon is None or not daemon.up or self.faults.is_calm:
                continue
            self.trace.say("daemon stops", how=how)
            daemon.asked_to_leave, daemon.up = True, False
            closing = asyncio.get_running_loop().create_task(daemon.leave(Closing(how)), name=f"stop {how}")
            await daemon.life.died.wait()
            closing.add_done_callback(_seen)

    async def _step_clock(self) -> None:
        for _ in range(self.rates.clock_jumps):
            await asyncio.sleep(self.rng.uniform(2.0, 20.0))
            seconds = self.rng.choice((-60.0, -3.0, 3.0, 60.0))
            self.trace.say("clock step", seconds=seconds)
            self.clock.jump(seconds)
            self.checkers.quiet_since = self.clock.monotonic()

    # -- the end --

    def _at_rest(self) -> bool:
        return self._is_up() and not [
            sandbox
            for sandbox in self.facts.specs
            if sandbox not in self.facts.statuses or self.facts.statuses[sandbox].phase not in TERMINAL
        ]

    async def end(self) -> None:
        """No leaks beside the living pools; then force the node closed, and nothing at all may be left."""
        assert self.daemon is not None
        leaks = [leak for leak in find_leaks(self.daemon.ports) if leak.kind != "record"]
        if leaks:
            raise Violation(f"at rest, leaks: {leaks}")
        self.daemon.check_bugs()
        await self.daemon.node.close(Closing.FORCE)
        if self.kernel.boots == 1:
            self.drains.compare()
        kernel = self.kernel
        for what, left in (
            ("processes", kernel.processes),
            ("cgroups", kernel.cgroups),
            ("slots", kernel.slots),
            ("disks", kernel.disks),
            ("folders", kernel.run_dirs),
            ("records", kernel.records),
            ("unnamed images", set(kernel.images) - set(self.facts.snapshots)),
            ("snapshots without an image", set(self.facts.snapshots) - set(kernel.images)),
        ):
            if left:
                raise Violation(f"after the end, {what} are left: {sorted(left)}")

    def _raise_violations(self) -> None:
        if self.checkers.violations:
            raise Violation("; ".join(self.checkers.violations))


def _outlives_daemon(process: str) -> bool:
    """Whether tasks of this process are nobody's business when a daemon is killed: ingress and guests live on."""
    return process != "" and not process.startswith(DAEMON)


def _seen(task: asyncio.Task[None]) -> None:
    """What a dead daemon's task ended with is looked at where it matters; nobody else needs to hear of it."""
    if not task.cancelled():
        task.exception()

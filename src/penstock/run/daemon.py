"""The daemon of one machine: store, control, node, API, and the two processes beside it (zygote, ingress).

Built top to bottom in `start`, closed bottom to top in `stop`; every closer runs whatever the one before it raised,
and all their errors come back as one group. Nothing here decides: it chooses adapters and owns lifetimes.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, Final, TypeVar, cast

from prometheus_client import CollectorRegistry
from structlog import get_logger

from penstock import __version__
from penstock.api import pausing
from penstock.api.app import build
from penstock.api.front import Front
from penstock.api.roster import Roster
from penstock.control.controller import Controller
from penstock.control.drains import foresee
from penstock.core.clock import SystemClock
from penstock.core.crew import Crew
from penstock.feed.local import LocalReports, LocalSource
from penstock.feed.server import FeedServer
from penstock.model import keys
from penstock.model.drain import Fate, Outcome
from penstock.model.errors import Unavailable
from penstock.model.ids import NodeId
from penstock.model.sandbox import Isolation
from penstock.model.team import TeamLimits
from penstock.node.facts import Machine
from penstock.node.means import NodeSettings
from penstock.node.node import Closing, Node
from penstock.node.samples import Samples
from penstock.run import children, furnish, metrics, progress
from penstock.run.closing import CLOSER_S, Closers, Stopped, describe
from penstock.run.datafolder import DataFolder
from penstock.run.edges import Edges
from penstock.run.floor import DiskFloor
from penstock.run.front_server import FrontServer
from penstock.run.journal import STARTED, STOPPING, Journal
from penstock.run.settings import OnStop, Settings, host_port
from penstock.run.views import open_views
from penstock.store.sqlite import SqliteLog
from penstock.store.store import Store

log = get_logger("daemon")

T = TypeVar("T")
Say = Callable[[str], None]

NODE: Final = NodeId("local")
FEED_PREFIXES: Final = (keys.SANDBOX_SPEC, keys.SANDBOX_STATUS)  # what the ingress may read
NODE_S: Final = 90.0  # bound of closing the node beyond its drain: two pools, the network, and their threads
BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


class Daemon:
    """`say` gets a line of progress at a time. After `start` the addresses are in `api_url` and `ingress_url`."""

    def __init__(self, settings: Settings, folder: DataFolder, say: Say) -> None:
        self.settings, self.folder, self._say = settings, folder, say
        self.api_url = self.ingress_url = self.tls_url = self.ca_file = ""
        self.failed = asyncio.Event()  # a part of the daemon itself ended: stop, keeping sandboxes, and restart
        self._failure: BaseException | None = None
        self._node: Node | None = None
        self._api: Front | None = None
        self._ready = self._journaled = False
        self._inherited = True  # until we know better
        self.stopping = False
        self._floor = DiskFloor(folder.path, settings.disk_free_min)
        self._clock = SystemClock()
        self._rng = random.SystemRandom()
        self._registry = CollectorRegistry()
        self._crew = Crew("daemon", on_error=self._part_failed)
        self._outcomes: dict[str, Outcome] = {}  # of sandboxes that a stop had to force, or could not end
        self._keepers: list[asyncio.Task[None]] = []
        self._closers: Closers[OnStop] = Closers()
        self._closes = self._closers.add
        self._stopped: asyncio.Future[Stopped] | None = None

    async def start(self, *, serve: bool = True) -> None:
        """Everything up, or an error with everything closed again, as `abandon` does.

        Without `serve` only what owns sandboxes comes up, no API and no ingress: enough to clear what was left.
        """
        try:
            await self._start_owner(serve=serve)
            if serve:
                await self._start_faces()
        except BaseException:
            await self.abandon()
            raise

    async def abandon(self) -> None:
        """Close after a start that failed: what an earlier daemon left runs on, else nothing is left."""
        await self.stop(OnStop.KEEP if self._inherited else OnStop.FORCE)

    async def _start_owner(self, *, serve: bool) -> None:
        self.folder.lock()
        self._closes("lock", lambda _: _done(self.folder.unlock))
        self._inherited = self.folder.in_use
        if serve:  # before anything that takes time, so that a taken address is told at once
            self._front = FrontServer(*host_port(self.settings.api, field="api"))
            self.api_url = self._front.url
            self._closes("address of the API", lambda _: self._front.stop())
        # A dead daemon's ingress is ours to end, also when we never start one.
        self._ingress = self.folder.ingress()
        self._closes("ingress", self._close_ingress)
        self._store = Store(SqliteLog(self.folder.store), self._clock)
        await self._store.open()
        self._closes("store", lambda _: self._store.close())
        self._journal = Journal(self._store, self._clock, self._rng, subject=NODE)
        before = self._journal.how_the_last_one_ended()
        await self._crew.__aenter__()
        self._closes("tasks", lambda _: self._end_tasks())
        self._source = LocalSource(self._store)

        if serve:
            layer = await furnish.base_layer(self.folder, self._say)
            await furnish.first_records(self._store, self._clock, self._rng, self.folder, layer, self._journal)

        self._edges = Edges(self.settings, self.folder)
        self._closes("zygote and edges", self._close_edges)
        await self._edges.open(self._say)
        self._keep("zygote", self._edges.keep(self._journal.teller(self._crew, "zygote.replaced", log.warning)))
        await self._start_node()
        assert self._node is not None
        taken_up = sum(self._node.statistics().sandboxes.values())
        await self._journal.write(STARTED, before, version=__version__, sandboxes=str(taken_up))
        self._journaled = True

    async def _tell_stopping(self, on_stop: OnStop) -> None:
        why = f", because a part of it failed: {self._failure}" if self._failure is not None else ""
        await self._journal.write(STOPPING, f"{on_stop.value}{why}")

    async def _start_faces(self) -> None:
        self._closes("API", lambda _: self._front.stop())
        controller = Controller(store=self._store, source=self._source, clock=self._clock, rng=self._rng)
        await controller.open(self._crew)
        await self._start_ingress()
        await self._start_front(controller)
        self._announce()
        self._ready = True

    async def stop(self, on_stop: OnStop) -> Stopped:
        """Empty the node, unless sandboxes are kept, and close everything, last opened first, each bounded.

        While sandboxes end the API answers on: creates with 503, and `forceStop` ends the waiting. Raises nothing of
        what failed: it is in what is returned. A second call joins the first. If cancelled, what is left is forced and
        every closer runs all the same, before the cancellation goes on.
        """
        if self._stopped is not None:
            return cast(Stopped, await asyncio.shield(self._stopped))
        stopped = self._stopped = asyncio.get_running_loop().create_future()
        self._ready, self.stopping = False, True
        errors: list[Exception] = []
        try:
            if self._journaled:
                await self._tell_stopping(on_stop)
            if self._node is not None and on_stop is not OnStop.KEEP:
                await self._empty(self._node, on_stop)
        except asyncio.CancelledError:
            self._end(stopped, await self._close(OnStop.KEEP if on_stop is OnStop.KEEP else OnStop.FORCE))
            raise
        except Exception as error:
            error.add_note("while sandboxes were to end")
            errors.append(error)
        return self._end(stopped, [*errors, *await self._close(on_stop)])

    async def _close(self, on_stop: OnStop) -> list[Exception]:
        for keeper in self._keepers:  # first of all: what we end now must not be started anew
            keeper.cancel()
        return await self._closers.run(on_stop)

    def _end(self, stopped: asyncio.Future[Stopped], errors: list[Exception]) -> Stopped:
        outcomes = self._outcomes.values()
        told = Stopped(
            forced=tuple(f"{each.sandbox}: {each.because}" for each in outcomes if each.fate is not Fate.QUARANTINE),
            stuck=tuple(f"{each.sandbox}: {each.because}" for each in outcomes if each.fate is Fate.QUARANTINE),
            errors=tuple(describe(error) for error in errors),
        )
        stopped.set_result(told)
        return told

    async def _empty(self, node: Node, on_stop: OnStop) -> None:
        telling = self._crew.spawn(progress.tell(lambda: node.draining, self._say, self._clock), name="progress")
        try:
            outcomes = await node.empty(
                Closing(on_stop.value),
                within_s=self.settings.drain_s or None,
                propagation_s=self.settings.drain_propagation_s,
            )
            self._outcomes = {each.sandbox: each for each in outcomes}
        finally:
            telling.cancel()

    def escalate(self) -> None:
        """Turn a drain under way into force. A no-op otherwise."""
        if self._node is not None:
            self._node.force()

    async def reap(self) -> dict[str, int]:
        """Remove what is ours and dead; how many, by kind."""
        return {} if self._node is None or self.stopping else await self._node.sweep()

    def _check_room(self) -> None:
        if self.stopping:
            why, now = "the node stops", "retry when it is back"
            raise Unavailable("no sandbox is started here", which=NODE, why=why, now=now, retry_after_s=5.0)
        self._floor.check()

    @property
    def failure(self) -> BaseException | None:
        return self._failure

    # ---- parts --------------------------------------------------------------------------------------------------

    async def _start_node(self) -> None:
        settings = self.settings
        node = Node(
            settings=NodeSettings(
                id=NODE,
                installation=self.folder.installation,
                slot_count=settings.slots_max,
                slots_ready=settings.slots_ready,
                disks_ready=settings.slots_ready,
                starts_running_max=settings.starts_max,
                starts_waiting_max=settings.starts_waiting_max,
            ),
            ports=self._edges.ports,
            source=self._source,
            reports=LocalReports(self._store, by="node", rng=self._rng),
            clock=self._clock,
            rng=self._rng,
            machine=Machine(
                boot_id=BOOT_ID.read_text().strip(),
                cpu_count=os.cpu_count() or 1,
                memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
                isolation=(Isolation.NAMESPACE.value,),
            ),
            token_seed=self.folder.seed,
        )
        await node.open()
        self._node = node
        self._closes("node", self._close_node, within_s=NODE_S)
        self._crew.spawn(self._watch("node", node.run()), name="node")
        metrics.NodeCollector(self._registry, node.statistics)
        self._crew.spawn(metrics.measure_lag(self._registry), name="loop lag")

    async def _start_front(self, controller: Controller) -> None:
        views = await open_views(self._source, self._crew)
        roster = Roster(views["specs"], views["statuses"], views["snapshots"])
        assert self._node is not None
        samples = Samples(
            cgroups=self._edges.ports.cgroups,
            disks=self._edges.ports.disks,
            clock=self._clock,
            living=self._node.living,
            disk_name=self._node.disk_name,
            run_dirs=str(self.folder.run / "sb"),
        )
        self._crew.spawn(samples.run(), name="samples")
        front = self._api = Front(
            store=self._store,
            roster=roster,
            templates=views["templates"],
            builds=views["builds"],
            keys=views["keys"],
            teams=views["teams"],
            nodes=views["nodes"],
            planner=foresee,
            measurements=samples,
            reasons=controller,
            holdings=self._node,
            quarantine=self._node.quarantine,
            clock=self._clock,
            rng=self._rng,
            seed=self.folder.seed,
            domain=self._domain(),
            admin_token=self.folder.admin_token,
            check_room=self._check_room,
            limits=TeamLimits(
                sandboxes_max=self.settings.team_sandboxes_max, timeout_s_max=self.settings.team_timeout_s_max
            ),
        )
        self._front.start(build(front, self._registry, ready=lambda: self._ready), self._crew)

    async def _start_ingress(self) -> None:
        self._feed = FeedServer(self._source, self.folder.feed_socket, prefixes=FEED_PREFIXES, meet=self._wake)
        await self._feed.serve(self._crew)
        self._closes("feed", lambda _: _done(lambda: self.folder.feed_socket.unlink(missing_ok=True)))
        if self._ingress is not None and not self.folder.ingress_file.exists():
            self._say("the ingress that runs cannot say any more where it listens; ending it")
            await asyncio.to_thread(children.end, self._ingress, term_s=CLOSER_S)
            self._ingress = None
        if self._ingress is None:
            self._say("starting the ingress")
            self._ingress = await self._run_ingress(self.settings.ingress, self.settings.tls)
        else:
            self._say(f"taking over the running ingress, {self._ingress}")
        told = json.loads(self.folder.ingress_file.read_text())
        self.ingress_url, self.tls_url = told["url"], told.get("tls_url", "")
        self.ca_file = told.get("ca_file", "")
        for name, url in (("ingress", self.ingress_url), ("tls", self.tls_url)):
            asked, given = getattr(self.settings, name), url.rpartition("//")[2]
            if asked != given and not asked.endswith(":0"):
                # It carries connections of running sandboxes: moving it would break them.
                self._say(f"{name} stays on {given}, not {asked}: to move it, stop with penstock down --drain first")
        if told.get("domain", self.settings.domain) != self.settings.domain:
            self._say(f"its certificate stays that of {told['domain']}: stop with penstock down --drain to change it")
        says = self._journal.teller(self._crew, "ingress.replaced", log.warning)
        self._keep("ingress", children.keep(self._ingress, self._restart_ingress, log=says))

    async def _wake(self, sandbox: str) -> None:
        """The ingress has a request for a sandbox that is paused."""
        if self._api is None:
            raise Unavailable("the API is starting", retry_after_s=1)
        await pausing.for_traffic(self._api, sandbox)

    async def _restart_ingress(self) -> children.Child:
        """At the addresses it had: clients and printed variables name them."""
        plain, secure = (url.rpartition("//")[2] for url in (self.ingress_url, self.tls_url))
        self._ingress = await self._run_ingress(plain, secure)
        return self._ingress

    async def _run_ingress(self, listen: str, tls: str) -> children.Child:
        settings = self.settings
        argv = ["--data", str(self.folder.path), "--listen", listen, "--tls", tls, "--domain", settings.domain]
        if settings.tls_cert:
            argv += ["--cert", settings.tls_cert, "--key", settings.tls_key]
        return await children.start(
            "ingress",
            children.module("penstock.run.ingress", *argv),
            pid_file=self.folder.ingress_file,
            log=self.folder.ingress_log,
        )

    def _domain(self) -> str:
        """The domain that SDKs append to `<port>-<id>.`, with the TLS listener's port unless it is 443."""
        _, _, port = self.tls_url.rpartition(":")
        return self.settings.domain if port in ("", "443") else f"{self.settings.domain}:{port}"

    def _announce(self) -> None:
        # Ours to take away only once it is ours: a start that is refused must not make a running daemon unfindable.
        self._closes("announcement", lambda _: _done(lambda: self.folder.daemon_file.unlink(missing_ok=True)))
        children.announce(
            self.folder.daemon_file,
            version=__version__,
            installation=self.folder.installation,
            api_url=self.api_url,
            ingress_url=self.ingress_url,
            tls_url=self.tls_url,
        )

    # ---- closers ------------------------------------------------------------------------------------------------

    def _keep(self, name: str, keeping: Coroutine[Any, Any, None]) -> None:
        self._keepers.append(self._crew.spawn(keeping, name=f"keep the {name}"))

    async def _close_ingress(self, on_stop: OnStop) -> None:
        if on_stop is not OnStop.KEEP and self._ingress is not None:
            await asyncio.to_thread(children.end, self._ingress, term_s=CLOSER_S)
            self.folder.ingress_file.unlink(missing_ok=True)

    async def _close_node(self, on_stop: OnStop) -> None:
        assert self._node is not None
        # Sandboxes were ended before, but for those of a start that failed or a stop that was cancelled.
        outcomes = await self._node.close(Closing(on_stop.value), within_s=self.settings.drain_s or None)
        self._outcomes = {each.sandbox: each for each in outcomes}

    async def _close_edges(self, on_stop: OnStop) -> None:
        await self._edges.close(destroy=on_stop is not OnStop.KEEP)

    async def _end_tasks(self) -> None:
        self._crew.cancel_all()
        await self._crew.__aexit__(None, None, None)

    async def _watch(self, name: str, part: Awaitable[None]) -> None:
        try:
            await part
        except Exception as error:
            self._part_failed(name, error)

    def _part_failed(self, name: str, error: BaseException) -> None:
        """A task ended by an error, so the daemon is not whole any more: answering on would be 503 for ever."""
        log.error("a part of the daemon failed", part=name, exc_info=error)
        self._failure = error
        self.failed.set()


async def _done(function: Callable[[], None]) -> None:
    function()

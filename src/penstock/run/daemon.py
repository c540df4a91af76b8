"""The daemon of one machine: store, control, node, API, and the two processes beside it (zygote, ingress).

Built top to bottom in `start`, closed bottom to top in `stop`; every closer runs whatever the one before it raised,
and all their errors come back as one group. Nothing here decides: it chooses adapters and owns lifetimes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
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
from penstock.core.deadlines import within
from penstock.feed.local import LocalReports, LocalSource
from penstock.feed.server import FeedServer
from penstock.feed.view import View
from penstock.model import keys
from penstock.model.errors import Unavailable
from penstock.model.ids import NodeId
from penstock.model.node import NodeStatus
from penstock.model.sandbox import Isolation, SandboxSpec, SandboxStatus
from penstock.model.snapshot import Snapshot
from penstock.model.team import ApiKey, Team, TeamLimits
from penstock.model.template import Build, Template
from penstock.node.facts import Machine
from penstock.node.means import NodeSettings
from penstock.node.node import Closing, Node
from penstock.node.samples import Samples
from penstock.run import children, furnish, metrics
from penstock.run.datafolder import DataFolder
from penstock.run.edges import Edges
from penstock.run.floor import DiskFloor
from penstock.run.front_server import FrontServer
from penstock.run.journal import STARTED, STOPPING, Journal
from penstock.run.settings import OnStop, Settings, host_port
from penstock.store.sqlite import SqliteLog
from penstock.store.store import Store

log = get_logger("daemon")

T = TypeVar("T")
Say = Callable[[str], None]

NODE: Final = NodeId("local")
FEED_PREFIXES: Final = (keys.SANDBOX_SPEC, keys.SANDBOX_STATUS)  # what the ingress may read
CLOSER_S: Final = 20.0  # bound of each closer but the drain, which has its own
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
        self._ready = False
        self._inherited = True  # until we know better
        self.stopping = False
        self._clock = SystemClock()
        self._rng = random.SystemRandom()
        self._registry = CollectorRegistry()
        self._crew = Crew("daemon", on_error=self._part_failed)
        self._forced: list[str] = []
        self._keepers: list[asyncio.Task[None]] = []
        self._closers: list[tuple[str, Callable[[OnStop], Awaitable[None]]]] = []

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
        with contextlib.suppress(BaseExceptionGroup):
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
        self._closes("journal", self._tell_stopping)  # first of all that is closed from here on

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

    async def stop(self, on_stop: OnStop) -> list[str]:
        """Close everything, last opened first, each within its bound. Returns what was forced, a line each.

        Raises one ExceptionGroup with all closers' errors when any failed; the others have run all the same.
        """
        self._ready, self.stopping = False, True
        for keeper in self._keepers:  # first of all: what we end now must not be started anew
            keeper.cancel()
        errors: list[Exception] = []
        while self._closers:
            name, close = self._closers.pop()
            try:
                await close(on_stop)
            except Exception as error:
                error.add_note(f"while closing the {name}")
                errors.append(error)
        if errors:
            raise ExceptionGroup("the daemon did not close cleanly", errors)
        return self._forced

    def escalate(self) -> None:
        """Turn a drain under way into force. A no-op otherwise."""
        if self._node is not None:
            self._node.force()

    @property
    def failure(self) -> BaseException | None:
        return self._failure

    # ---- parts --------------------------------------------------------------------------------------------------

    async def _start_node(self) -> None:
        settings = self.settings
        node = self._node = Node(
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
        self._closes("node", self._close_node)
        self._crew.spawn(self._watch("node", node.run()), name="node")
        metrics.NodeCollector(self._registry, node.statistics)
        self._crew.spawn(metrics.measure_lag(self._registry), name="loop lag")

    async def _start_front(self, controller: Controller) -> None:
        views = await self._views()
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
            clock=self._clock,
            rng=self._rng,
            seed=self.folder.seed,
            domain=self._domain(),
            admin_token=self.folder.admin_token,
            check_room=DiskFloor(self.folder.path, self.settings.disk_free_min).check,
            limits=TeamLimits(
                sandboxes_max=self.settings.team_sandboxes_max, timeout_s_max=self.settings.team_timeout_s_max
            ),
        )
        self._front.start(build(front, self._registry, ready=lambda: self._ready), self._crew)

    async def _views(self) -> dict[str, View[Any]]:
        kinds: dict[str, tuple[str, type[Any]]] = {
            "specs": (keys.SANDBOX_SPEC, SandboxSpec),
            "statuses": (keys.SANDBOX_STATUS, SandboxStatus),
            "templates": (keys.TEMPLATE, Template),
            "builds": (keys.BUILD, Build),
            "keys": (keys.API_KEY, ApiKey),
            "teams": (keys.TEAM, Team),
            "nodes": (keys.NODE_STATUS, NodeStatus),
            "snapshots": (keys.SNAPSHOT, Snapshot),
        }
        views: dict[str, View[Any]] = {}
        for name, (prefix, kind) in kinds.items():
            views[name] = View(self._source, prefix, msgspec.json.Decoder(kind).decode)
            await views[name].start(self._crew)
        return views

    async def _start_ingress(self) -> None:
        self._feed = FeedServer(self._source, self.folder.feed_socket, prefixes=FEED_PREFIXES, meet=self._wake)
        await self._feed.serve(self._crew)
        if self._ingress is not None and not self.folder.ingress_file.exists():
            self._say("the ingress that runs cannot say any more where it listens; ending it")
            await asyncio.to_thread(children.end, self._ingress, term_s=CLOSER_S)
            self._ingress = None
        if self._ingress is None:
            self._say("starting the ingress")
            self._ingress = await self._run_ingress(self.settings.ingress, self.settings.tls)
        else:
            self._say(f"taking over the running ingress, pid {self._ingress.pid}")
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

    def _closes(self, name: str, close: Callable[[OnStop], Awaitable[None]]) -> None:
        self._closers.append((name, close))

    async def _close_ingress(self, on_stop: OnStop) -> None:
        if on_stop is not OnStop.KEEP and self._ingress is not None:
            await asyncio.to_thread(children.end, self._ingress, term_s=CLOSER_S)
            self.folder.ingress_file.unlink(missing_ok=True)

    async def _close_node(self, on_stop: OnStop) -> None:
        assert self._node is not None
        outcomes = await self._node.close(Closing(on_stop.value), within_s=self.settings.drain_s or None)
        self._forced += [f"{each.sandbox}: {each.fate.value}: {each.because}" for each in outcomes]

    async def _close_edges(self, on_stop: OnStop) -> None:
        await self._edges.close(destroy=on_stop is not OnStop.KEEP)

    async def _end_tasks(self) -> None:
        self._crew.cancel_all()
        async with within(CLOSER_S, "the end of the daemon's tasks"):
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

"""What lives inside the sandboxes of a world with traffic: the production guest, and a person's server beside it.

The guest's server, access rules, RPC and file services are the real ones, on a folder of their own per sandbox. Its
processes are not: `Start` tells a short story instead of forking.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

import msgspec

from penstock.core.clock import Clock
from penstock.core.crew import Crew
from penstock.guest import basics, compose, files, filesystem, metrics, notices
from penstock.guest.access import TokenAccess
from penstock.guest.connection import Connection
from penstock.guest.exchange import Exchange, Peer
from penstock.guest.log import Log
from penstock.guest.parts import Parts
from penstock.guest.rpc import Call, Events, Message, Rpc
from penstock.guest.server import Routes, Server
from penstock.guest.settings import Settings
from penstock.guest.users import Users
from penstock.sim import loop as virtual
from penstock.sim.echo import PORTS, Echo, signature
from penstock.sim.guests import Manner
from penstock.sim.machinery import Proc
from penstock.sim.net import Net

USER: Final = "user"
Blame = Callable[[str], None]


def guest_address(socket_path: str) -> str:
    return f"unix:{socket_path}"


def port_address(pid: int, port: int) -> str:
    """A port as seen from the network namespace of the process."""
    return f"inside {pid}:{port}"


class House:
    """All sandboxes of one world. `folder` is a real one: what a guest does to files, it does there."""

    def __init__(self, net: Net, clock: Clock, rng: random.Random, folder: Path, blame: Blame) -> None:
        self._net, self._clock, self._rng, self._folder, self._blame = net, clock, rng, folder, blame
        self._living: dict[int, asyncio.Task[None]] = {}
        self._log_fd = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        (folder / "passwd").write_text(f"{USER}:x:{os.getuid()}:{os.getgid()}::{folder}:/bin/sh\n")
        (folder / "group").write_text(f"{USER}:x:{os.getgid()}:\n")

    def close(self) -> None:
        os.close(self._log_fd)

    def home(self, sandbox: str) -> Path:
        return self._folder / sandbox

    def move_in(self, proc: Proc) -> None:
        """A first process was made. It serves at once, unless it is of those that never say a word."""
        if proc.guest.manner is Manner.DEAF:
            return
        task = virtual.start_process(_name(proc.pid), self._live(proc, random.Random(self._rng.getrandbits(64))))
        task.add_done_callback(self._look)
        self._living[proc.pid] = task

    def move_out(self, pid: int) -> None:
        """It has ended, and everything inside with it."""
        task = self._living.pop(pid, None)
        if task is not None:
            self._net.kill(_name(pid))
            task.cancel("pid 1 has ended")

    def _look(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            self._blame(f"{task.get_name()} ended by itself: {task.exception()!r}")

    async def _live(self, proc: Proc, rng: random.Random) -> None:
        order = proc.order
        async with Crew(f"guest of {order.sandbox}", on_error=self._fault) as crew:
            server, service = self._guest(proc, crew)
            for name, peer in (("guest.sock", Peer.PUBLIC), ("control.sock", Peer.CONTROL)):
                self._net.listen(guest_address(f"{order.run_dir}/{name}"), partial(Connection, server, peer))
            for port in PORTS:
                self._net.listen(port_address(proc.pid, port), partial(_echo, order.sandbox, port, rng))
            try:
                await asyncio.get_running_loop().create_future()
            finally:
                service.close()

    def _guest(self, proc: Proc, crew: Crew) -> tuple[Server, filesystem.Filesystem]:
        """The parts of `guest.main`, put together in the same order."""
        home = self.home(proc.order.sandbox)
        home.mkdir(exist_ok=True)
        config = msgspec.structs.asdict(proc.order.guest) | {"user": USER, "workdir": str(home)}
        settings, users, routes = (
            Settings(config),
            Users(str(self._folder / "passwd"), str(self._folder / "group")),
            Routes(),
        )
        access = TokenAccess(settings, self._clock)
        parts = Parts(
            settings=settings,
            users=users,
            access=access,
            routes=routes,
            rpc=Rpc(routes, users, settings, self._on_fault),
            log=Log(self._log_fd, self._clock),
            clock=self._clock,
            spawn=crew.spawn,
        )
        for service in (basics, files, compose, metrics):
            service.register(parts)
        run = self._folder / f"{proc.order.sandbox}.run"
        run.mkdir(exist_ok=True)
        notices.register(parts, run=str(run))
        routes.add("POST", "/quiesce", partial(_quiesce, self._clock), guarded=False, internal=True)
        found = filesystem.register(parts)
        parts.rpc.server_stream("/process.Process/Start", _Story(proc.order.sandbox).tell)
        parts.log.say("guest starts", sandbox=proc.order.sandbox)
        return Server(routes, access, spawn=crew.spawn, on_fault=self._on_fault), found

    def _on_fault(self, exchange: Exchange, error: BaseException) -> None:
        self._blame(f"the guest failed at {exchange.method} {exchange.path}: {error!r}")

    def _fault(self, task: str, error: BaseException) -> None:
        self._blame(f"a guest's task {task} failed: {error!r}")


class _Story:
    """Stands in for a process: some output, then its end."""

    def __init__(self, sandbox: str) -> None:
        self._sandbox = sandbox

    async def tell(self, call: Call, message: Message, events: Events) -> None:
        lines = int(message.get("lines", 3))
        await events.send({"event": {"start": {"pid": 7}}})
        for number in range(lines):
            await asyncio.sleep(0.3)
            text = signature(self._sandbox).decode() + str(number)
            await events.send({"event": {"data": {"stdout": text}}})
        await events.send({"event": {"end": {"exited": True, "status": "exit status 0"}}})


async def _quiesce(clock: Clock, exchange: Exchange) -> None:
    """Stands in for `guest.quiesce`, which forks."""
    at = clock.wall()
    await asyncio.sleep(0.02)
    await exchange.respond_json(200, {"synced_at": at})


def _echo(sandbox: str, port: int, rng: random.Random) -> Echo:
    return Echo(sandbox, port, random.Random(rng.getrandbits(64)))


def _name(pid: int) -> str:
    return f"sandbox {pid}"

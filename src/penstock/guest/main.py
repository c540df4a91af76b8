"""Pid 1 of a sandbox: serves the guest protocol, reaps, ends everything when told.

`serve` runs in a process forked from a warmed zygote, after the pivot into the sandbox's file system. From then on
nothing may be imported and no codec, NSS or iconv module loaded, because the files those would come from belong to
the sandbox's user. `serve` makes that true instead of hoping: it empties the import machinery first.
"""

from __future__ import annotations

import asyncio
import codecs
import ctypes
import fcntl
import gc
import os
import resource
import signal
import socket
import stat
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from penstock.core.clock import SystemClock
from penstock.core.crew import Crew
from penstock.guest import basics, compose, files, filesystem, guise, metrics, notices, process_api, quiesce
from penstock.guest.access import TokenAccess
from penstock.guest.exchange import Exchange, Peer
from penstock.guest.log import Log
from penstock.guest.loop import ForkedLoop
from penstock.guest.parts import Parts
from penstock.guest.processes import PROCESSES_MAX, Processes
from penstock.guest.program import Surroundings
from penstock.guest.rpc import Rpc
from penstock.guest.server import CONNECTIONS_MAX, Routes, Server
from penstock.guest.settings import Settings
from penstock.guest.users import Users
from penstock.wire.routing import GUEST_PORT

STOP_TERM_S: Final = 4.0  # from SIGTERM to SIGKILL for what runs in the sandbox
STOP_S: Final = 5.0  # from SIGTERM to our own exit
NOFILE_UNLIMITED: Final = 1 << 20
FDS_PER_PROCESS: Final = 4
FDS_OWN: Final = 64  # listeners, epoll, log, cgroups, watches
FACTS_DIR: Final = "/run/e2b"

_SYS_CLOSE_RANGE: Final = 436  # on every architecture; CLOEXEC since Linux 5.11
_CLOSE_RANGE_CLOEXEC: Final = ctypes.c_uint(4)
_FD_HIGHEST: Final = ctypes.c_uint(0xFFFF_FFFF)
_libc: Final = ctypes.CDLL(None, use_errno=True)

_SEALED: Final[list[object]] = []

for _name in ("utf-8", "ascii", "latin-1", "idna", "unicode_escape"):
    codecs.lookup(_name)  # a codec is a module: load it while the files are still ours


@dataclass(frozen=True)
class Budget:
    """How the descriptors are shared out."""

    connections: int
    processes: int


class Unborn:
    """A guest made in the zygote, complete but for what its sandbox is; forks share what lies in its memory.

    Make it in a process with one thread. In a fork of that process, or there and then never again, call `serve`.
    """

    def __init__(self) -> None:
        clock = SystemClock()
        self._log = Log(sys.stderr.fileno(), clock)
        self._guest = Guest(self._log, clock)
        self._loop = ForkedLoop()
        self._loop.set_exception_handler(lambda _, context: _log_loop_fault(self._log, context))

    def serve(
        self,
        config: Mapping[str, Any],
        *,
        listen_fds: Mapping[str, int],
        log_fd: int,
        cgroup_fds: Mapping[str, Sequence[int]] | None = None,
        disk_fd: int = -1,
        ready: Callable[[], None] = lambda: None,
    ) -> NoReturn:
        """Be pid 1 until SIGTERM; never returns.

        `config` has the fields of `node.ports.GuestConfig`. `listen_fds` are bound stream sockets, `public` and
        `control`. `cgroup_fds["user"]` are files every process writes "0" to (v1 `tasks`, v2 `cgroup.procs`);
        `cgroup_fds["guest"]` the same files of the cgroups the guest itself is in. With the latter processes start
        three times faster (`guise`): leave them out only where a move is slow, which is cgroup v2. `disk_fd` is for
        `quiesce`, which fails without. `ready` is called once, when connections are answered.
        Exit status 0 after SIGTERM, 1 when the guest itself failed (its log says why).
        """
        status = 1
        try:
            self._log.move(log_fd)
            _seal_imports()
            _own_descriptors(log_fd)
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Python's handler would raise in the middle of anything
            os.umask(0o022)  # children have it from us
            self._loop.open()
            self._guest.be(config, cgroup_fds or {}, disk_fd=disk_fd)
            self._loop.run_until_complete(self._guest.run(listen_fds, ready))
            status = 0
        except BaseException as error:
            self._log.fault("guest", error)
        finally:
            # Not sys.exit: finalisation runs arbitrary destructors, and a forked interpreter has its parent's.
            os._exit(status)


def serve(config: Mapping[str, Any], **given: Any) -> NoReturn:
    """`Unborn().serve`, for a process in which nothing was prepared."""
    Unborn().serve(config, **given)


class Guest:
    """The parts of one guest, put together. First nobody's: `be` says whose, then `run`."""

    def __init__(self, log: Log, clock: SystemClock) -> None:
        self._log, self._clock = log, clock
        self._settings = Settings({"sandbox_id": "", "template_id": ""})
        self._users = Users()
        self._is_init = False
        self._processes = Processes(self._settings, self._users, log, Surroundings())
        self._crew = Crew("guest", on_error=log.fault, stop_s=STOP_S - STOP_TERM_S)
        self._stop = asyncio.Event()
        self._child_ended = asyncio.Event()
        routes = Routes()
        access = TokenAccess(self._settings, clock)
        self._parts = Parts(
            settings=self._settings,
            users=self._users,
            access=access,
            routes=routes,
            rpc=Rpc(routes, self._users, self._settings, self._on_fault),
            log=log,
            clock=clock,
            spawn=self._crew.spawn,
        )
        for service in (basics, files, compose):
            service.register(self._parts)
        filesystem.register(self._parts)  # its watchers end with this process
        process_api.register(self._parts, self._processes)
        self._server = Server(routes, access, spawn=self._crew.spawn, on_fault=self._on_fault)

    def be(self, config: Mapping[str, Any], cgroup_fds: Mapping[str, Sequence[int]], *, disk_fd: int = -1) -> None:
        """The guest of the sandbox that `config` describes. Once, in the process that is to `run`."""
        budget = _share_descriptors()
        self._settings.take(config)
        self._is_init = os.getpid() == 1
        around = Surroundings(
            cgroup_fds=tuple(cgroup_fds.get("user", ())),
            home_fds=tuple(cgroup_fds.get("guest", ())),
            switch_user=os.geteuid() == 0,
            may_wear=guise.usable(),
        )
        self._processes.settle(around, processes_max=budget.processes)
        self._server.connections_max = budget.connections
        metrics.register(self._parts)
        notices.register(self._parts, run=notices.RUN if self._is_init else None)
        quiesce.register(self._parts, disk_fd)

    async def run(self, listen_fds: Mapping[str, int], ready: Callable[[], None]) -> None:
        """Serve until SIGTERM, then end everything within STOP_S."""
        loop = asyncio.get_running_loop()
        assert isinstance(loop, ForkedLoop)
        loop.on_signal(signal.SIGCHLD, self._reap)
        loop.on_signal(signal.SIGTERM, self._stop.set)
        self._write_facts()
        async with self._crew:
            for name, fd in listen_fds.items():
                await self._server.listen(socket.socket(fileno=fd), Peer(name))
            await self._listen_on_loopback()
            ready()
            await self._stop.wait()
            self._log.say("stopping")
            self._server.stop()
            await self._end_processes()

    def stop(self) -> None:
        """As SIGTERM does."""
        self._stop.set()

    async def _listen_on_loopback(self) -> None:
        """The same service for programs inside (the code interpreter asks it for /envs)."""
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(("127.0.0.1", GUEST_PORT))
            await self._server.listen(sock, Peer.PUBLIC)
        except OSError as error:
            # Safe: everybody outside comes over the unix socket.
            sock.close()
            self._log.say("not listening inside", level="warning", port=GUEST_PORT, why=str(error))

    def _reap(self) -> None:
        self._processes.reap()
        self._child_ended.set()

    async def _end_processes(self) -> None:
        """SIGTERM to all, SIGKILL after STOP_TERM_S to those left; as pid 1 the kernel ends the rest with us."""
        if self._is_init:
            _signal_all(signal.SIGTERM)
            _signal_all(signal.SIGCONT)  # a stopped process cannot act on the first
        self._processes.signal_all(signal.SIGTERM)
        loop = asyncio.get_running_loop()
        timer = loop.call_later(STOP_TERM_S, self._kill_all)
        hopeless = loop.time() + STOP_S - 0.5
        while _has_children() and loop.time() < hopeless:
            self._child_ended.clear()
            tick = loop.call_later(0.5, self._child_ended.set)
            await self._child_ended.wait()
            tick.cancel()
        timer.cancel()

    def _kill_all(self) -> None:
        if self._is_init:
            _signal_all(signal.SIGKILL)
        self._processes.signal_all(signal.SIGKILL)

    def _write_facts(self) -> None:
        """Files by which programs learn that they are in a sandbox, and in which."""
        if not self._is_init:
            return
        try:
            os.makedirs(FACTS_DIR, 0o755, exist_ok=True)
            for name, value in self._settings.identity.items():
                flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
                fd = os.open(f"{FACTS_DIR}/.{name}", flags, 0o644)
                os.write(fd, value.encode())
                os.close(fd)
        except OSError as error:
            # Safe: the same facts are in every process's environment.
            self._log.say("facts not written", level="warning", why=str(error))

    def _on_fault(self, exchange: Exchange, error: BaseException) -> None:
        self._log.fault(f"{exchange.method} {exchange.path}", error)


def _seal_imports() -> None:
    """From here on an import of something not loaded fails, wherever it hides, instead of running a sandbox's file.

    The finders and their caches are kept alive: freeing them would write into 600 KiB of pages shared with the zygote.
    """
    _SEALED.extend((sys.meta_path, sys.path_hooks, sys.path_importer_cache, sys.path))
    sys.meta_path, sys.path_hooks, sys.path_importer_cache, sys.path = [], [], {}, []
    gc.freeze()  # for the same reason: collections must not look at what was there before


def _own_descriptors(log_fd: int) -> None:
    """Nothing we were handed may reach a child by accident."""
    if _libc.syscall(_SYS_CLOSE_RANGE, ctypes.c_uint(3), _FD_HIGHEST, _CLOSE_RANGE_CLOEXEC) < 0:
        raise OSError(ctypes.get_errno(), "descriptors cannot be marked close-on-exec")
    if not stat.S_ISREG(os.fstat(log_fd).st_mode):
        flags = fcntl.fcntl(log_fd, fcntl.F_GETFL)
        fcntl.fcntl(log_fd, fcntl.F_SETFL, flags | os.O_NONBLOCK)


def _share_descriptors() -> Budget:
    """Our soft limit is what children get, so it is left as it is and shared out."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    room = (NOFILE_UNLIMITED if soft == resource.RLIM_INFINITY else soft) - FDS_OWN
    processes = max(8, min(PROCESSES_MAX, room // 2 // FDS_PER_PROCESS))
    return Budget(connections=max(16, min(CONNECTIONS_MAX, room // 4)), processes=processes)


def _signal_all(number: int) -> None:
    """By pid 1: to every other process of the sandbox. Nobody else is success, and says so by an error (kill(2))."""
    try:
        os.kill(-1, number)
    except ProcessLookupError:
        pass


def _has_children() -> bool:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def _log_loop_fault(log: Log, context: dict[str, Any]) -> None:
    error = context.get("exception")
    if isinstance(error, BaseException):
        log.fault(str(context.get("message", "event loop")), error)
    else:
        log.say("fault", level="error", what=str(context.get("message", "event loop")))

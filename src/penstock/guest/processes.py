"""All processes of the sandbox: starting, finding, reaping. Pid 1 reaps its children and everybody's orphans.

Bounds: PROCESSES_MAX alive at once; of those that ended, RETAINED_MAX for RETAINED_S, so that a late Connect learns
how it went.
"""

from __future__ import annotations

import asyncio
import errno
import os
import signal
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Final

from penstock.core.deadlines import within
from penstock.guest import forked, spawn
from penstock.guest.log import Log
from penstock.guest.paths import BadPath, resolve
from penstock.guest.process import Process
from penstock.guest.program import Program, StartFailed, Surroundings, find_program
from penstock.guest.settings import Settings
from penstock.guest.users import User, Users
from penstock.wire.connect import Code, ConnectError

PROCESSES_MAX: Final = 512
RETAINED_S: Final = 30.0
RETAINED_MAX: Final = 256
START_S: Final = 30.0  # from fork to exec: a file system that does not answer
REAP_S: Final = 10.0  # from SIGKILL to the zombie
REAPS_PER_PASS: Final = 256
COLUMNS_DEFAULT: Final = 80
ROWS_DEFAULT: Final = 24


@dataclass(frozen=True, kw_only=True)
class Order:
    """What to start."""

    command: str
    args: list[str]
    env: dict[str, str]
    cwd: str  # as the caller wrote it; empty: the sandbox's default
    user: User
    tag: str | None = None
    stdin: bool = True
    pty_size: tuple[int, int] | None = None  # (columns, rows): run on a terminal


@dataclass(frozen=True)
class Ended:
    """A process that is gone."""

    pid: int
    tag: str | None
    end_event: dict[str, Any]
    at: float  # loop time


class Processes:
    """Call `reap` on every SIGCHLD."""

    def __init__(
        self,
        settings: Settings,
        users: Users,
        log: Log,
        around: Surroundings,
        *,
        processes_max: int = PROCESSES_MAX,
    ) -> None:
        self._settings, self._users, self._log, self._around = settings, users, log, around
        self._processes_max = processes_max
        self._alive: dict[int, Process] = {}  # forked and not ended
        self._started: dict[int, Process] = {}  # of those, the ones that became their program
        self._retained: OrderedDict[int, Ended] = OrderedDict()

    def settle(self, around: Surroundings, *, processes_max: int) -> None:
        """Where processes are started from now on, and how many at once."""
        self._around, self._processes_max = around, processes_max

    # ---- starting ------------------------------------------------------------------------------------------

    async def start(self, order: Order) -> Process:
        """Return when exec has succeeded; at once where children are spawned in our guise. The caller must call
        `Process.begin(self.note_end)` next.

        Raises ConnectError saying what was wrong with the order, or DeadlinePassed after killing what it forked. If
        cancelled, what it forked is killed.
        """
        if len(self._alive) >= self._processes_max:
            raise ConnectError(Code.RESOURCE_EXHAUSTED, f"{self._processes_max} processes run already; end some first")
        program = self._program(order)
        child = self._start(program, order)
        config = {"cmd": order.command, "args": order.args, "envs": order.env, "cwd": os.fsdecode(program.cwd)}
        process = Process(child, config=config, tag=order.tag, user=order.user.name)
        self._alive[process.pid] = process
        try:
            failure = await self._await_exec(child)
        except BaseException:
            process.signal(signal.SIGKILL)
            self._drop(process)
            raise
        if failure is not None:
            self._drop(process)
            raise _explain(failure, order, os.fsdecode(program.cwd))
        spawn.raise_oom_score(process.pid)
        self._started[process.pid] = process
        self._log.say(
            "process started", pid=process.pid, user=order.user.name, cmd=" ".join((order.command, *order.args))
        )
        return process

    def note_end(self, process: Process) -> None:
        """By `Process`: everything of it was delivered."""
        assert process.end_event is not None
        for table in (self._alive, self._started):
            if table.get(process.pid) is process:  # else its number was given away while a grandchild held its pipe
                del table[process.pid]
        now = asyncio.get_running_loop().time()
        self._retained.pop(process.pid, None)
        self._retained[process.pid] = Ended(process.pid, process.tag, process.end_event, now)
        self._forget_old(now)
        self._log.say("process ended", pid=process.pid, user=process.user, status=process.end_event["status"])

    # ---- finding -------------------------------------------------------------------------------------------

    def started(self) -> list[Process]:
        """Those that run, oldest first."""
        return list(self._started.values())

    def get(self, selector: object) -> Process:
        """The running process a ProcessSelector names. Raises ConnectError not_found, invalid_argument."""
        pid, tag = _parse_selector(selector)
        if pid is not None:
            found = self._started.get(pid)
        else:
            found = next((each for each in reversed(self._started.values()) if each.tag == tag), None)
        if found is None:
            raise ConnectError(Code.NOT_FOUND, _not_found(pid, tag))
        return found

    def get_or_ended(self, selector: object) -> Process | Ended:
        """`get`, or one that ended at most RETAINED_S ago."""
        try:
            return self.get(selector)
        except ConnectError as missing:
            if missing.connect_code is not Code.NOT_FOUND:
                raise
            self._forget_old(asyncio.get_running_loop().time())
            pid, tag = _parse_selector(selector)
            for ended in reversed(self._retained.values()):
                if ended.pid == pid or (pid is None and ended.tag == tag):
                    return ended
            raise

    # ---- ending --------------------------------------------------------------------------------------------

    async def kill(self, process: Process) -> None:
        """SIGKILL its session and return when the process was reaped. Raises DeadlinePassed after REAP_S."""
        process.signal(signal.SIGKILL)
        async with within(REAP_S, f"process {process.pid} to die"):
            await asyncio.shield(process.reaped)

    def reap(self) -> None:
        """Collect every child that has exited; orphans too, quietly."""
        for _ in range(REAPS_PER_PASS):
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            process = self._alive.get(pid)
            if process is not None:
                process.note_exit(status)
        asyncio.get_running_loop().call_soon(self.reap)  # a crowd: let others have a turn

    def signal_all(self, number: int) -> None:
        """Every process started here, with what belongs to it."""
        for process in tuple(self._alive.values()):
            process.signal(number)

    def explain(self) -> list[dict[str, object]]:
        return [process.explain() for process in self._alive.values()]

    # ---- private parts -------------------------------------------------------------------------------------

    def _program(self, order: Order) -> Program:
        env = self._settings.process_env(order.user, order.env)
        try:
            cwd = resolve(order.cwd, order.user.home, self._settings.workdir)
            argv = [_bytes(text) for text in (order.command, *order.args)]
            encoded = {_env_name(name): _bytes(value) for name, value in env.items()}
            return Program(
                candidates=find_program(argv[0], encoded.get(b"PATH", b"")),
                argv=argv,
                env=encoded,
                cwd=_bytes(cwd),
                uid=order.user.uid,
                gid=order.user.gid,
                groups=self._users.groups_of(order.user) if self._around.switch_user else (),
            )
        except BadPath as error:
            raise ConnectError(Code.INVALID_ARGUMENT, f"cwd: {error}") from None
        except StartFailed as failure:
            raise _explain(failure, order, order.cwd) from None

    def _start(self, program: Program, order: Order) -> spawn.Child:
        try:
            if order.pty_size is None:
                return spawn.start_on_pipes(program, self._around, stdin=order.stdin)
            columns, rows = order.pty_size
            return spawn.start_on_pty(program, self._around, columns=columns, rows=rows)
        except StartFailed as failure:
            raise _explain(failure, order, os.fsdecode(program.cwd)) from None
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENOSPC):
                why = os.strerror(error.errno)
                raise ConnectError(Code.RESOURCE_EXHAUSTED, f"no process can be started now: {why}") from None
            raise

    async def _await_exec(self, child: spawn.Child) -> StartFailed | None:
        if child.status_fd < 0:
            return None
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[bytes] = loop.create_future()
        loop.add_reader(child.status_fd, _read_report, child.status_fd, ended)
        try:
            async with within(START_S, f"process {child.pid} to become its program"):
                return forked.parse_report(await ended)
        finally:
            loop.remove_reader(child.status_fd)
            os.close(child.status_fd)

    def _drop(self, process: Process) -> None:
        """A child that never became its program; `reap` collects it like an orphan."""
        if self._alive.get(process.pid) is process:
            del self._alive[process.pid]
        process.abandon()

    def _forget_old(self, now: float) -> None:
        while self._retained:
            oldest = next(iter(self._retained.values()))
            if len(self._retained) <= RETAINED_MAX and oldest.at > now - RETAINED_S:
                return
            del self._retained[oldest.pid]


def _read_report(fd: int, ended: asyncio.Future[bytes]) -> None:
    try:
        report = os.read(fd, 128)
    except BlockingIOError:
        return
    if not ended.done():
        ended.set_result(report)


def _explain(failure: StartFailed, order: Order, cwd: str) -> ConnectError:
    """What the caller can do about it, in Connect's words."""
    why = os.strerror(failure.number)
    if failure.step == "cwd":
        if failure.number == errno.ENOENT:
            return ConnectError(Code.INVALID_ARGUMENT, f"cwd '{cwd}' does not exist")
        if failure.number == errno.EACCES:
            return ConnectError(Code.PERMISSION_DENIED, f"cwd '{cwd}' may not be entered by user '{order.user.name}'")
        return ConnectError(Code.INVALID_ARGUMENT, f"cwd '{cwd}' cannot be entered: {why}")
    if failure.step in ("find", "exec"):
        shown = order.command[:256]
        if failure.number == errno.ENOENT:
            return ConnectError(Code.NOT_FOUND, f"command '{shown}' was not found (or its interpreter is missing)")
        if failure.number in (errno.EACCES, errno.EPERM):
            return ConnectError(Code.PERMISSION_DENIED, f"command '{shown}' may not be run: {why}")
        return ConnectError(Code.INVALID_ARGUMENT, f"command '{shown}' cannot be run: {why}")
    return ConnectError(Code.INTERNAL, f"the process could not be set up (step {failure.step}): {why}")


def _parse_selector(selector: object) -> tuple[int | None, str]:
    if isinstance(selector, dict):
        pid, tag = selector.get("pid"), selector.get("tag")
        if isinstance(pid, str) and pid.isascii() and pid.isdigit() and len(pid) < 11:
            pid = int(pid)
        if isinstance(pid, int) and not isinstance(pid, bool):
            return pid, ""
        if isinstance(tag, str) and tag:
            return None, tag
    raise ConnectError(Code.INVALID_ARGUMENT, "process is selected by pid or by tag")


def _not_found(pid: int | None, tag: str) -> str:
    return f"process with pid {pid} not found" if pid is not None else f"process with tag '{tag[:256]}' not found"


def _bytes(text: str) -> bytes:
    try:
        data = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise ConnectError(Code.INVALID_ARGUMENT, "a string of the command is not valid UTF-8") from None
    if b"\0" in data:
        raise ConnectError(Code.INVALID_ARGUMENT, "a string of the command contains a NUL byte")
    return data


def _env_name(name: str) -> bytes:
    if not name or "=" in name:
        raise ConnectError(Code.INVALID_ARGUMENT, f"'{name[:100]}' cannot be the name of an environment variable")
    return _bytes(name)

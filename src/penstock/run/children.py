"""The zygote and the ingress: processes of their own, found again after the daemon's death.

Each is started in its own session, with a pid file that names (pid, start time, sources). A later daemon takes a living
one over; a pid file whose process has died or whose pid now names something else counts as absent. Signals go through
pidfds, so that a re-used pid is never hit.

After an upgrade they run on with what they were started from: a zygote of old would make guests of old for ever. Their
sources tell (`Child.stale`); those of a version that did not write them count as others.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final, NoReturn

import penstock
from penstock.core.deadlines import DeadlinePassed
from penstock.core.errors import PenstockError

START_WITHIN_S: Final = 15.0
RESTART_BASE_S: Final = 0.1
RESTART_CAP_S: Final = 5.0
SOURCES: Final = "PENSTOCK_SOURCES"  # told by the parent: a zygote that hashed would share the pages of a hash library
_POLL_S: Final = 0.01  # the children announce themselves by a file; nobody but us waits for it


class ChildFailed(PenstockError):
    """A process of ours did not start. The message has the end of its log."""

    code = "child_failed"


@dataclass(frozen=True)
class Child:
    """A living process, identified for ever by (pid, start time)."""

    name: str
    pid: int
    start_ticks: int
    sources: str = ""

    @property
    def stale(self) -> bool:
        """Whether it was started from other sources than ours."""
        return self.sources != sources()

    def __str__(self) -> str:
        return f"pid {self.pid}" + (" (of another version; kill it, and it is replaced at once)" if self.stale else "")

    def open(self) -> int | None:
        """A pidfd on it, or None when it has died. The caller closes the descriptor."""
        try:
            pidfd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return None
        if start_ticks(self.pid) == self.start_ticks:
            return pidfd
        os.close(pidfd)
        return None


@cache
def sources() -> str:
    """Names our modules as they are on disk when first asked, and the interpreter. Reads 2 MB, once: some 50 ms."""
    root, digest = Path(penstock.__file__).parent, hashlib.sha256(sys.version.encode())
    for path in sorted(root.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"\0{path.relative_to(root)}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]


def start_ticks(pid: int) -> int:
    """Field 22 of /proc/<pid>/stat: when the process started, in ticks since boot; 0 when it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in ("Z", "X") else int(fields[19])


def find(name: str, pid_file: Path) -> Child | None:
    """The living child that wrote `pid_file`, or None."""
    try:
        told = json.loads(pid_file.read_text())
        child = Child(name, int(told["pid"]), int(told["start_ticks"]), str(told.get("sources", "")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return child if child.start_ticks and start_ticks(child.pid) == child.start_ticks else None


def search(name: str, log: Path) -> Child | None:
    """The living process that was started to write into `log`, found by that descriptor: its pid file may be gone.

    Some 5 µs a process of the host. The oldest, should there be several: a sandbox being born is still like its zygote.
    """
    wanted = {str(log), f"{log} (deleted)"}
    found = (int(pid) for pid in os.listdir("/proc") if pid.isdigit() and _writes_into(pid, wanted))
    children = [Child(name, pid, ticks) for pid in found if (ticks := start_ticks(pid))]
    return min(children, key=lambda child: (child.start_ticks, child.pid), default=None)


def _writes_into(pid: str, names: set[str]) -> bool:
    try:
        return os.readlink(f"/proc/{pid}/fd/1") in names
    except OSError:
        return False  # it has ended, or has no such descriptor


async def start(name: str, argv: list[str], *, pid_file: Path, log: Path) -> Child:
    """Start `argv` detached and wait until it announced itself in `pid_file`.

    Raises ChildFailed with the end of its log; the process is gone by then. If cancelled, likewise.
    """
    pid_file.unlink(missing_ok=True)  # noqa: ASYNC240 - one unlink
    environment = os.environ | {SOURCES: sources()}
    with open(log, "ab", opener=_private) as output:  # noqa: ASYNC230 - one open
        began = output.tell()
        process = subprocess.Popen(  # noqa: ASYNC220 - fork and exec of a fixed argv: about a millisecond, once
            argv,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            close_fds=True,
            env=environment,
        )
    try:
        for _ in range(int(START_WITHIN_S / _POLL_S)):
            if process.poll() is not None:
                raise ChildFailed(
                    f"the {name} ended at its start", why=_tail(log, began), which=f"exit {process.returncode}"
                )
            child = find(name, pid_file)
            if child is not None:
                return child
            await asyncio.sleep(_POLL_S)
        raise ChildFailed(f"the {name} was not ready within {START_WITHIN_S:.0f} s", why=_tail(log, began))
    except BaseException:
        process.kill()
        process.wait()
        raise


async def keep(child: Child, restart: Callable[[], Awaitable[Child]], *, log: Callable[[str], None]) -> NoReturn:
    """Until cancelled: when the process dies, start it anew. Waits on its pidfd, never by looking again and again.

    A start that fails is tried again after a pause that doubles up to RESTART_CAP_S; it never gives up, because
    without this process no sandbox can be reached (ingress) or started (zygote).
    """
    failures = 0
    while True:
        await ended(child)
        log(f"the {child.name}, pid {child.pid}, has died; starting it anew")
        while True:
            try:
                child = await restart()
                failures = 0
                break
            except PenstockError as error:
                failures += 1
                log(f"the {child.name} could not be started: {error}")
                await asyncio.sleep(min(RESTART_CAP_S, RESTART_BASE_S * 2**failures))


async def ended(child: Child) -> None:
    """Return when the process is gone; it is reaped if it was ours."""
    pidfd = child.open()
    if pidfd is None:
        return
    loop = asyncio.get_running_loop()
    gone = loop.create_future()
    loop.add_reader(pidfd, _tell, gone)
    try:
        await gone
        _reap(pidfd)
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)


def _tell(gone: asyncio.Future[None]) -> None:
    if not gone.done():
        gone.set_result(None)


def module(name: str, *arguments: str) -> list[str]:
    """The argv of one of our own processes, in the interpreter that runs us, isolated from the environment."""
    return [sys.executable, "-I", "-m", name, *arguments]


def end(child: Child, *, term_s: float, kill_s: float = 5.0) -> bool:
    """SIGTERM, then after `term_s` SIGKILL. Returns whether force was needed. Absent is success.

    Raises DeadlinePassed when it is still there `kill_s` after SIGKILL. Blocks: call it off the loop.
    """
    pidfd = child.open()
    if pidfd is None:
        return False
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        if _gone(pidfd, term_s):
            return False
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        if not _gone(pidfd, kill_s):
            raise DeadlinePassed(f"end of the {child.name}, pid {child.pid}", within_s=kill_s)
        return True
    except ProcessLookupError:
        return False
    finally:
        os.close(pidfd)


def _gone(pidfd: int, within_s: float) -> bool:
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    gone = bool(poller.poll(within_s * 1000))
    if gone:
        _reap(pidfd)
    return gone


def _reap(pidfd: int) -> None:
    try:
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    except ChildProcessError:
        pass  # an adopted one: its parent is not us, and reaps it


def _tail(log: Path, began: int, size: int = 2000) -> str:
    """The end of what was written since `began`: what an earlier process said does not explain this one."""
    try:
        return log.read_bytes()[began:][-size:].decode(errors="replace").strip()
    except OSError as error:
        return str(error)


def _private(path: str, flags: int) -> int:
    fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
    os.fchmod(fd, 0o600)  # also one that an earlier version made
    return fd


def announce(pid_file: Path, **facts: object) -> None:
    """Write our own pid file, atomically: a reader sees all of it or nothing."""
    told = {"pid": os.getpid(), "start_ticks": start_ticks(os.getpid()), "at": time.time(), **facts}
    told["sources"] = os.environ.get(SOURCES, "")
    part = pid_file.with_suffix(f".{os.getpid()}.part")
    fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w") as file:
        file.write(json.dumps(told))
    part.rename(pid_file)

"""Starting a process on pipes or on a terminal.

Why not `subprocess`: its child joins no v1 cgroup and takes no terminal unless `preexec_fn` forks all of us; and it
imports. Why not a `/bin/sh -c` wrapper: one more exec per start, and the image need not have a shell. `guise` says
why pid 1 does not fork.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import termios
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from penstock.guest import forked
from penstock.guest.guise import Guise
from penstock.guest.program import OOM_SCORE_ADJ, Program, StartFailed, Surroundings

TIOCGPTPEER: Final = 0x5441  # asm-generic/ioctls.h; Linux 4.13
TIOCSPTLCK: Final = 0x40045431
_TRY_NEXT: Final = (errno.ENOENT, errno.ENOTDIR, errno.EACCES)
_NO_ROOM: Final = (errno.EAGAIN, errno.ENOMEM)


@dataclass(kw_only=True)
class Child:
    """A started child and our ends of its pipes, non-blocking; -1 where there is none. The caller owns them."""

    pid: int
    status_fd: int = -1  # of a forked child: reads its failure report (`forked.parse_report`), ends at exec
    stdin_fd: int = -1
    stdout_fd: int = -1
    stderr_fd: int = -1
    pty_fd: int = -1


def start_on_pipes(program: Program, around: Surroundings, *, stdin: bool) -> Child:
    """Start with stdout and stderr on pipes, stdin on a pipe or /dev/null.

    Raises StartFailed when the program cannot be run, OSError when no process can be made; nothing is left then.
    """
    opened: list[int] = []
    try:
        child_in, our_in = _pipe(opened) if stdin else (_open_null(opened), -1)
        our_out, child_out = _pipe(opened)
        our_err, child_err = _pipe(opened)
        pid, status = _start(program, around, (child_in, child_out, child_err), opened, tty=False)
    except BaseException:
        _close_all(opened)
        raise
    ours = [fd for fd in (our_in, our_out, our_err, status) if fd >= 0]
    _keep_only(opened, ours)
    return Child(pid=pid, status_fd=status, stdin_fd=our_in, stdout_fd=our_out, stderr_fd=our_err)


def start_on_pty(program: Program, around: Surroundings, *, columns: int, rows: int) -> Child:
    """Start with a new terminal of that size as stdin, stdout, stderr and controlling terminal. Raises as above."""
    opened: list[int] = []
    try:
        master, slave = _open_pty(opened, program.uid if around.switch_user else -1)
        resize(master, columns, rows)
        pid, status = _start(program, around, (slave, slave, slave), opened, tty=True)
    except BaseException:
        _close_all(opened)
        raise
    _keep_only(opened, [fd for fd in (master, status) if fd >= 0])
    return Child(pid=pid, status_fd=status, pty_fd=master)


def resize(pty_fd: int, columns: int, rows: int) -> None:
    """Set the terminal's size; the kernel tells its foreground processes (SIGWINCH)."""
    fcntl.ioctl(pty_fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def raise_oom_score(pid: int) -> None:
    """Let the kernel kill this process before pid 1. By us and after exec: until then /proc/<pid> belongs to the owner
    of our memory, which is the host's root, and inside a sandbox nobody may write there."""
    try:
        fd = os.open(f"/proc/{pid}/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, OOM_SCORE_ADJ)
        finally:
            os.close(fd)
    except OSError:
        # Safe: it has ended already, or /proc is masked, which costs fairness among the sandbox's own processes only.
        pass


def _start(
    program: Program, around: Surroundings, stdio: tuple[int, int, int], opened: list[int], *, tty: bool
) -> tuple[int, int]:
    """(pid, descriptor of the failure report or -1)."""
    if around.by_guise:
        return _spawn(program, around, stdio, tty), -1
    our_status, child_status = _pipe(opened)
    return forked.fork(program, around, child_status, stdio, stdio[0] if tty else -1), our_status


def _spawn(program: Program, around: Surroundings, stdio: tuple[int, int, int], tty: bool) -> int:
    ids = (program.uid, program.gid, program.groups) if around.switch_user else None
    guise = Guise(ids=ids, cwd=program.cwd, cgroup_fds=around.cgroup_fds, home_fds=around.home_fds)
    actions: list[tuple[Any, ...]] = [(os.POSIX_SPAWN_DUP2, fd, target) for target, fd in enumerate(stdio)]
    if tty:
        # A session leader without a terminal gets the first one it opens; an inherited descriptor does not count.
        actions = [
            (os.POSIX_SPAWN_OPEN, 0, b"/proc/self/fd/%d" % stdio[0], os.O_RDWR, 0),
            (os.POSIX_SPAWN_DUP2, 0, 1),
            (os.POSIX_SPAWN_DUP2, 0, 2),
        ]
    try:
        with guise:
            guise.step = "exec"
            return _spawn_first(program, actions)
    except OSError as error:
        number = error.errno or errno.EIO
        if guise.step == "exec" and number in _NO_ROOM:
            raise
        raise StartFailed(guise.step, number) from None


def _spawn_first(program: Program, actions: list[tuple[Any, ...]]) -> int:
    """The pid. Raises OSError of the last candidate, or EACCES when one was there but forbidden."""
    forbidden: OSError | None = None
    for last, path in enumerate(program.candidates, 1 - len(program.candidates)):
        try:
            return os.posix_spawn(
                path,
                program.argv,
                program.env,
                file_actions=actions,
                setsid=True,
                setsigmask=(),
                setsigdef=forked.RESET_SIGNALS,
            )
        except OSError as error:
            if error.errno == errno.EACCES:
                forbidden = error
            if error.errno not in _TRY_NEXT or last == 0:
                raise forbidden or error from None
    raise AssertionError("no candidate")


# ---- descriptors -----------------------------------------------------------------------------------------------


def _pipe(opened: list[int]) -> tuple[int, int]:
    """A close-on-exec pipe (read end, write end), both above descriptor 3."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    return _keep(opened, reader), _keep(opened, writer)


def _open_null(opened: list[int]) -> int:
    return _keep(opened, os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))


def _keep(opened: list[int], fd: int) -> int:
    """Move `fd` above 3, so that wiring the child's stdio never overwrites a descriptor it still needs."""
    if fd <= 3:
        moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 4)
        os.close(fd)
        fd = moved
    opened.append(fd)
    return fd


def _open_pty(opened: list[int], uid: int) -> tuple[int, int]:
    """(master, slave). By ioctl on the master: no path inside /dev/pts is trusted, and no NSS lookup of group tty."""
    master = _keep(opened, os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))
    fcntl.ioctl(master, TIOCSPTLCK, struct.pack("i", 0))
    slave = _keep(opened, fcntl.ioctl(master, TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))
    if uid >= 0:
        os.fchown(slave, uid, -1)
        os.fchmod(slave, 0o620)
    return master, slave


def _keep_only(opened: Sequence[int], ours: Sequence[int]) -> None:
    """Close the child's ends and set ours non-blocking."""
    for fd in opened:
        if fd in ours:
            os.set_blocking(fd, False)
        else:
            os.close(fd)


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        if fd >= 0:
            os.close(fd)

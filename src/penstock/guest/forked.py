"""The slow way to start a process: fork, become somebody else, exec.

Used where `guise` cannot be: the guest was given no way back from the processes' cgroup (with cgroup v2 each move costs
10 ms of a global lock, which the child can wait out and pid 1 cannot), or the kernel would not protect its memory.

How a failure between fork and exec comes back: the child writes `step errno` into a close-on-exec pipe; an empty pipe
at its end means that exec succeeded.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import termios
from typing import Final, NoReturn

from penstock.guest.program import Program, StartFailed, Surroundings

# Ignored dispositions survive exec (Python ignores the first two), and ours must not run in the child before it.
RESET_SIGNALS: Final = tuple(
    getattr(signal, name) for name in ("SIGPIPE", "SIGXFSZ", "SIGINT", "SIGTERM", "SIGCHLD", "SIGHUP")
)
_FD_CEILING: Final = 1 << 20
_ALL_SIGNALS: Final = frozenset(range(1, 32)) - {signal.SIGKILL, signal.SIGSTOP}


def parse_report(report: bytes) -> StartFailed | None:
    """What the status pipe said until its end; None when exec succeeded."""
    if not report:
        return None
    step, _, number = report.decode("ascii", "replace").partition(" ")
    return StartFailed(step, int(number) if number.isdigit() else errno.EIO)


def fork(program: Program, around: Surroundings, report_fd: int, stdio: tuple[int, int, int], tty: int) -> int:
    """The child's pid. Signals are held back across the fork: one that reached the child while it still has our
    handlers would be written into the wake-up pipe it shares with us, and be taken for ours."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ALL_SIGNALS)
    try:
        pid = os.fork()
        if pid == 0:
            _become(program, around, report_fd, stdio, tty)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return pid


# ---- in the child ---------------------------------------------------------------------------------------------


def _become(program: Program, around: Surroundings, report_fd: int, stdio: tuple[int, int, int], tty: int) -> NoReturn:
    """Runs in the child only; ends in exec or _exit. No allocation worth the name, no import, no lock."""
    step = "session"
    try:
        os.setsid()
        step = "cgroup"
        for fd in around.cgroup_fds:
            os.write(fd, b"0")
        step = "stdio"
        report_fd = _wire_stdio(stdio, report_fd)
        if tty >= 0:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        step = "signals"
        _reset_signals()
        step = "user"
        if around.switch_user:
            os.setgroups(program.groups)
            os.setresgid(program.gid, program.gid, program.gid)
            os.setresuid(program.uid, program.uid, program.uid)
        step = "cwd"
        os.chdir(program.cwd)
        step = "exec"
        os.closerange(4, _FD_CEILING)  # one system call; everything of ours is close-on-exec already
        number = _exec_first(program)
    except OSError as error:
        number = error.errno or errno.EIO
    except BaseException:
        number = errno.EIO
    os.write(report_fd, f"{step} {number}".encode("ascii"))
    os._exit(127)


def _exec_first(program: Program) -> int:
    """Exec the first candidate that works. Returns the errno to report: EACCES when one was there but forbidden."""
    number = errno.ENOENT
    for path in program.candidates:
        try:
            os.execve(path, program.argv, program.env)  # noqa: S606 - that is what this module is for
        except OSError as error:
            if error.errno == errno.EACCES or number != errno.EACCES:
                number = error.errno or errno.EIO
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.EACCES):
                break
    return number


def _wire_stdio(stdio: tuple[int, int, int], report_fd: int) -> int:
    """Put `stdio` on 0, 1, 2 and the report on 3, close-on-exec. Our descriptors are all above 3 (`_keep`)."""
    for target, fd in enumerate(stdio):
        os.dup2(fd, target, inheritable=True)
    os.dup2(report_fd, 3, inheritable=False)
    return 3


def _reset_signals() -> None:
    for number in RESET_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())

"""Starting a process: fork, become somebody else, exec. The only code that runs between is straight system calls.

Why not `subprocess`: its child runs no code of ours before exec unless `preexec_fn` is given, which then costs the
same fork; it cannot join a v1 cgroup, and it imports. Why not a `/bin/sh -c` wrapper: one more exec per start, and the
image need not have a shell.

How a failure between fork and exec comes back: the child writes `step errno` into a close-on-exec pipe; an empty pipe
at its end means that exec succeeded.
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import signal
import stat
import struct
import termios
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NoReturn

CANDIDATES_MAX: Final = 64  # directories of PATH that are looked into
OOM_SCORE_ADJ: Final = b"500"  # the kernel kills the sandbox's processes before it looks at pid 1
TIOCGPTPEER: Final = 0x5441  # asm-generic/ioctls.h; Linux 4.13
TIOCSPTLCK: Final = 0x40045431

# Ignored dispositions survive exec (Python ignores the first two), and ours must not run in the child before it.
_RESET_SIGNALS: Final = tuple(
    getattr(signal, name) for name in ("SIGPIPE", "SIGXFSZ", "SIGINT", "SIGTERM", "SIGCHLD", "SIGHUP")
)
_FD_CEILING: Final = 1 << 20
_ALL_SIGNALS: Final = frozenset(range(1, 32)) - {signal.SIGKILL, signal.SIGSTOP}


class StartFailed(Exception):
    """The child could not become the program. `step` says where, `number` is the errno."""

    def __init__(self, step: str, number: int) -> None:
        self.step, self.number = step, number
        super().__init__(f"{step}: {os.strerror(number)}")


@dataclass(frozen=True, kw_only=True)
class Program:
    """What to run, looked up and encoded before the fork."""

    candidates: Sequence[bytes]  # paths to try in order
    argv: list[bytes]
    env: dict[bytes, bytes]
    cwd: bytes
    uid: int
    gid: int
    groups: Sequence[int]
    umask: int = 0o022


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What every child of this guest gets, whoever it runs as."""

    cgroup_fds: Sequence[int] = ()  # files to write "0" to: v1 `tasks`, v2 `cgroup.procs`
    nofile: tuple[int, int] | None = None  # RLIMIT_NOFILE to put back; the guest raised its own
    switch_user: bool = True  # False: we are not root, the child stays who we are


@dataclass(kw_only=True)
class Child:
    """A forked child and our ends of its pipes; -1 where there is none. The caller owns the descriptors."""

    pid: int
    status_fd: int  # reads the failure report, ends at exec
    stdin_fd: int = -1
    stdout_fd: int = -1
    stderr_fd: int = -1
    pty_fd: int = -1


def find_program(name: bytes, path: bytes) -> list[bytes]:
    """Paths to try for command `name`, in order, as execvp would: itself when it holds a slash, else along `path`.

    Raises StartFailed("find", ENOENT) when nothing executable is there. Directories are looked into as root; the
    child, as the user, skips what it may not run.
    """
    if not name:
        raise StartFailed("find", errno.ENOENT)
    if b"/" in name:
        return [name]
    found = []
    for folder in path.split(b":")[:CANDIDATES_MAX]:
        candidate = (folder or b".") + b"/" + name
        try:
            mode = os.stat(candidate).st_mode
        except OSError:
            continue
        if stat.S_ISREG(mode) and mode & 0o111:
            found.append(candidate)
    if not found:
        raise StartFailed("find", errno.ENOENT)
    return found


def start_on_pipes(program: Program, around: Surroundings, *, stdin: bool) -> Child:
    """Fork with stdout and stderr on pipes, stdin on a pipe or /dev/null. Raises OSError when the fork cannot be done;
    nothing is left open then."""
    opened: list[int] = []
    try:
        child_in, our_in = _pipe(opened) if stdin else (_open_null(opened), -1)
        our_out, child_out = _pipe(opened)
        our_err, child_err = _pipe(opened)
        our_status, child_status = _pipe(opened)
        pid = _fork(program, around, child_status, (child_in, child_out, child_err), tty=-1)
    except OSError:
        _close_all(opened)
        raise
    _close_all((child_in, child_out, child_err, child_status))
    for fd in (our_in, our_out, our_err, our_status):
        if fd >= 0:
            os.set_blocking(fd, False)
    return Child(pid=pid, status_fd=our_status, stdin_fd=our_in, stdout_fd=our_out, stderr_fd=our_err)


def start_on_pty(program: Program, around: Surroundings, *, columns: int, rows: int) -> Child:
    """Fork with a new terminal of that size as stdin, stdout, stderr and controlling terminal. Raises OSError."""
    opened: list[int] = []
    try:
        master, slave = _open_pty(opened, program.uid if around.switch_user else -1)
        resize(master, columns, rows)
        our_status, child_status = _pipe(opened)
        pid = _fork(program, around, child_status, (slave, slave, slave), tty=slave)
    except OSError:
        _close_all(opened)
        raise
    _close_all((slave, child_status))
    os.set_blocking(master, False)
    os.set_blocking(our_status, False)
    return Child(pid=pid, status_fd=our_status, pty_fd=master)


def resize(pty_fd: int, columns: int, rows: int) -> None:
    """Set the terminal's size; the kernel tells its foreground processes (SIGWINCH)."""
    fcntl.ioctl(pty_fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def parse_report(report: bytes) -> StartFailed | None:
    """What the status pipe said until its end; None when exec succeeded."""
    if not report:
        return None
    step, _, number = report.decode("ascii", "replace").partition(" ")
    return StartFailed(step, int(number) if number.isdigit() else errno.EIO)


def _fork(program: Program, around: Surroundings, report_fd: int, stdio: tuple[int, int, int], tty: int) -> int:
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
        step = "oom"
        _set_oom_score()
        step = "stdio"
        report_fd = _wire_stdio(stdio, report_fd)
        if tty >= 0:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        step = "signals"
        _reset_signals()
        if around.nofile is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, around.nofile)
        step = "user"
        if around.switch_user:
            os.setgroups(program.groups)
            os.setresgid(program.gid, program.gid, program.gid)
            os.setresuid(program.uid, program.uid, program.uid)
        os.umask(program.umask)
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


def _set_oom_score() -> None:
    try:
        fd = os.open("/proc/self/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
        os.write(fd, OOM_SCORE_ADJ)
        os.close(fd)
    except OSError:
        # Safe: a /proc that cannot be written costs fairness among the sandbox's own processes, nothing else.
        pass


def _reset_signals() -> None:
    for number in _RESET_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


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


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        if fd >= 0:
            os.close(fd)

"""Pid 1 looks like a process's user for the length of one spawn, so that the child needs no step of its own.

Why: a fork of this interpreter costs 2.6 ms of system time in pid 1 alone (some 700 copy-on-write faults when it runs
on), measured against 0.2 ms for `posix_spawn`, whose child shares our memory until exec. But between that child and
its exec no code of ours can run: identity, directory and cgroup must be inherited.

What makes it safe:
- the saved ids stay 0, so that root comes back; exec overwrites them with the effective ones, so that the program
  cannot (credentials(7)). Capabilities of a non-root user are gone after exec;
- the memory we share with the child for a moment holds secrets, and the child already is the user. Changing the
  effective id makes the memory non-dumpable, so nobody may trace it or read it through /proc (ptrace(2)), unless
  fs.suid_dumpable is 1: then `usable` says no and processes are forked;
- meanwhile the user may signal pid 1 as its own. Signals without a handler do not reach an init; a SIGTERM in that
  third of a millisecond ends the user's own sandbox, which is all it does. A SIGSTOP to the child would hold us up as
  long as its sender likes: also his own sandbox only, and the node's deadlines end it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import TracebackType
from typing import Final

LOST_STATUS: Final = 70  # exit status of a guest that could not become itself again
_SUID_DUMPABLE: Final = "/proc/sys/fs/suid_dumpable"


def usable() -> bool:
    """Whether the kernel protects our memory while we wear another id. False when it cannot be told."""
    try:
        fd = os.open(_SUID_DUMPABLE, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return os.read(fd, 8).strip() in (b"0", b"2")
    finally:
        os.close(fd)


class Guise:
    """`with Guise(...)`: real and effective ids, groups, directory and cgroups are those of the child to be.

    Entering raises OSError with `step` telling what failed (`cgroup`, `user` or `cwd`), everything put back. Leaving
    never fails: a guest that cannot become itself again exits with LOST_STATUS, and the sandbox with it.
    """

    def __init__(
        self,
        *,
        ids: tuple[int, int, Sequence[int]] | None,
        cwd: bytes,
        cgroup_fds: Sequence[int],
        home_fds: Sequence[int],
    ) -> None:
        self._ids, self._cwd = ids, cwd  # ids: (uid, gid, groups); None: keep ours
        self._cgroup_fds, self._home_fds = cgroup_fds, home_fds
        self.step = ""

    def __enter__(self) -> Guise:
        try:
            self.step = "cgroup"
            for fd in self._cgroup_fds:
                os.write(fd, b"0")
            self.step = "user"
            if self._ids is not None:
                uid, gid, groups = self._ids
                os.setgroups(groups)
                os.setresgid(gid, gid, 0)
                os.setresuid(uid, uid, 0)
            self.step = "cwd"
            os.chdir(self._cwd)
        except OSError:
            self._leave()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    def _leave(self) -> None:
        try:
            if self._ids is not None:
                os.setresuid(0, 0, 0)
                os.setresgid(0, 0, 0)
                os.setgroups(())
            os.chdir("/")
            for fd in self._home_fds:
                os.write(fd, b"0")
        except OSError:
            os._exit(LOST_STATUS)

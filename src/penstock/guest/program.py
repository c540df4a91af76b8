"""What to run, and in which surroundings: everything that is looked up and encoded before a process is started."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

CANDIDATES_MAX: Final = 64  # directories of PATH that are looked into
OOM_SCORE_ADJ: Final = b"500"  # the kernel kills the sandbox's processes before it looks at pid 1


class StartFailed(Exception):
    """The child could not become the program. `step` says where, `number` is the errno."""

    def __init__(self, step: str, number: int) -> None:
        self.step, self.number = step, number
        super().__init__(f"{step}: {os.strerror(number)}")


@dataclass(frozen=True, kw_only=True)
class Program:
    candidates: Sequence[bytes]  # paths to try in order
    argv: list[bytes]
    env: dict[bytes, bytes]
    cwd: bytes
    uid: int
    gid: int
    groups: Sequence[int]


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What every child of this guest gets, whoever it runs as."""

    cgroup_fds: Sequence[int] = ()  # files to write "0" to: v1 `tasks`, v2 `cgroup.procs`
    home_fds: Sequence[int] = ()  # the same files of the guest's own cgroups: the way back
    switch_user: bool = True  # False: we are not root, the child stays who we are
    may_wear: bool = True  # `guise.usable`

    @property
    def by_guise(self) -> bool:
        """Whether children are spawned by a guest in their guise, else forked."""
        return self.may_wear and (not self.cgroup_fds or bool(self.home_fds))


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

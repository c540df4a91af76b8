"""Sessions and process groups: what a process started, and how all of it is signalled."""

from __future__ import annotations

import os
import signal
from typing import Final

KILL_PASSES_MAX: Final = 8


def kill_session(session: int) -> None:
    """SIGKILL every process of the session, also those in other process groups (a shell's background jobs).

    Passes over /proc repeat until one finds nothing new, since the found may have forked meanwhile.
    """
    seen: set[int] = set()
    for _ in range(KILL_PASSES_MAX):
        found = [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) not in seen]
        found = [pid for pid in found if _kill_if_in_session(pid, session)]
        if not found:
            return
        seen.update(found)


def _kill_if_in_session(pid: int, session: int) -> bool:
    try:
        if os.getsid(pid) != session:
            return False
        pidfd = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        # Asked again: between the two calls the number may have been given to another process.
        if os.getsid(pid) == session:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except OSError:
        pass
    finally:
        os.close(pidfd)
    return True


def signal_group(pid: int, number: int) -> None:
    """Send a signal to the process group. Gone is success."""
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        pass

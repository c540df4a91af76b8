"""`penstock down`: stop an installation from outside and wait; also when its daemon is dead."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from penstock.core.deadlines import DeadlinePassed
from penstock.run import children, door
from penstock.run.datafolder import DataFolder, FolderInUse
from penstock.run.settings import OnStop, load

WITHIN_S: Final = 24 * 3600.0  # a drain's own bound is the daemon's; ours is only against a hang
EXIT_S: Final = 30.0
BUSY_S: Final = 180.0  # a daemon's first start links a base for seconds; another `down` drains within its settings
DOOR_S: Final = 10.0
PAUSE_S: Final = 0.1


def main(data: Path, mode: str, *, progress: Callable[[str], None]) -> int:
    """Exit code 0: stopped as asked, nothing failed, and nothing was forced unless that was asked.

    With a dead daemon, `drain` and `force` clear what it left.
    While a daemon starts on the folder, or another `down` clears it, this one waits and then does what is left to do.
    Raises NotAnInstallation, or FolderInUse when that takes longer than BUSY_S.
    """
    folder = DataFolder(str(data)).require()
    until, told = time.monotonic() + BUSY_S, False
    while True:
        daemon = children.find("daemon", folder.daemon_file)
        code = _ask(folder, daemon, mode, progress) if daemon is not None else None
        try:
            return _without_daemon(data, mode, progress) if code is None else code
        except FolderInUse as busy:
            if time.monotonic() >= until:
                raise
            if not told:
                progress(f"{busy.why} is at work on this folder; waiting for it")
                told = True
            time.sleep(PAUSE_S)


def _without_daemon(data: Path, mode: str, progress: Callable[[str], None]) -> int:
    if mode == OnStop.KEEP.value:
        folder = DataFolder(str(data))
        folder.lock()  # so that a daemon which is just starting is not overlooked
        folder.unlock()
        progress("the daemon is not running; sandboxes go on running")
        return 0
    return asyncio.run(_clear(data, mode, progress))


def _ask(folder: DataFolder, daemon: children.Child, mode: str, progress: Callable[[str], None]) -> int | None:
    """Tell the living daemon. None when it died meanwhile."""
    pidfd = daemon.open()
    if pidfd is None:
        return None
    code: int | None = None
    try:
        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        asked = False
        for _ in range(int(DOOR_S / PAUSE_S)):
            with contextlib.suppress(door.DoorClosed):  # it has said that it runs, and opens its door a moment later
                for line in door.ask(folder.door_socket, {"stop": mode}, within_s=WITHIN_S):
                    asked = True
                    if "note" in line:
                        progress(line["note"])
                    if "error" in line:
                        progress(f"stop: {line['error']}")
                    code = line.get("done", code)
            if asked or poller.poll(PAUSE_S * 1000):
                break
        if not poller.poll(EXIT_S * 1000):
            raise DeadlinePassed(f"the exit of the daemon, pid {daemon.pid}", within_s=EXIT_S)
    finally:
        os.close(pidfd)
    return code


async def _clear(data: Path, mode: str, progress: Callable[[str], None]) -> int:
    """Be the daemon for a moment: take over what the dead one left, and end it."""
    from penstock.run.daemon import Daemon

    settings = load({"data": str(data), "api": "127.0.0.1:0", "slots_ready": 0})
    folder = DataFolder(str(data)).open()
    folder.lock()
    folder.unlock()
    daemon = Daemon(settings, folder, progress if mode == OnStop.DRAIN.value else lambda _: None)
    progress("the daemon is not running; clearing what it left")
    await daemon.start(serve=False)
    stopped = await daemon.stop(OnStop(mode))
    for line in stopped.lines():
        progress(line)
    if stopped.stuck or stopped.errors:
        progress(f"not everything is verified gone: see penstock leaks --data {data}")
    else:
        progress("stopped. Nothing of this installation is running")
    return stopped.code(force_was_asked=mode == OnStop.FORCE.value)

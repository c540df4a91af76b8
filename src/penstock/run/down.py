"""`penstock down`: stop an installation from outside and wait; also when its daemon is dead."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
from collections.abc import Callable
from pathlib import Path
from typing import Final

from penstock.core.deadlines import DeadlinePassed
from penstock.core.errors import Kind, PenstockError
from penstock.run import children, door
from penstock.run.datafolder import DataFolder, FolderInUse
from penstock.run.settings import OnStop, load

WITHIN_S: Final = 24 * 3600.0  # a drain's own bound is the daemon's; ours is only against a hang
EXIT_S: Final = 30.0


class NotAnInstallation(PenstockError):
    kind = Kind.NOT_FOUND
    code = "not_an_installation"


def main(data: Path, mode: str, *, progress: Callable[[str], None]) -> int:
    """Exit code 0: stopped as asked, nothing failed. With a dead daemon, `drain` and `force` clear what it left."""
    folder = DataFolder(str(data))
    if not folder.exists:
        raise NotAnInstallation("no installation", which=str(data), now="name its folder with --data")
    daemon = children.find("daemon", folder.daemon_file)
    if daemon is not None:
        code = _ask(folder, daemon, mode, progress)
        if code is not None:
            return code
    if mode == OnStop.KEEP.value:
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
        with contextlib.suppress(door.DoorClosed):
            for line in door.ask(folder.door_socket, {"stop": mode}, within_s=WITHIN_S):
                if "note" in line:
                    progress(line["note"])
                if "error" in line:
                    progress(f"stop: {line['error']}")
                code = line.get("done", code)
        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        if not poller.poll(EXIT_S * 1000):
            raise DeadlinePassed(f"the exit of the daemon, pid {daemon.pid}", within_s=EXIT_S)
    finally:
        os.close(pidfd)
    return code


async def _clear(data: Path, mode: str, progress: Callable[[str], None]) -> int:
    """Be the daemon for a moment: take over what the dead one left, and end it."""
    from penstock.run.daemon import Daemon

    settings = load({"data": str(data), "api": "127.0.0.1:0", "slots_ready": 0})
    daemon = Daemon(settings, DataFolder(str(data)).open(), lambda _: None)
    progress("the daemon is not running; clearing what it left")
    try:
        await daemon.start(serve=False)
    except FolderInUse:
        progress("a daemon is starting on this folder; try again")
        return 1
    await daemon.stop(OnStop(mode))
    progress("stopped. Nothing of this installation is running")
    return 0

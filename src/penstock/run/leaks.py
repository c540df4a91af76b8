"""Kernel against records, with a daemon or without: what `penstock leaks` shows."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Final

from penstock.node.reap import Leak, find_leaks
from penstock.run import children
from penstock.run.datafolder import DataFolder
from penstock.run.edges import network_at_rest, read_only_ports

LOOKS: Final = 3
PAUSE_S: Final = 0.3


def look(data: Path) -> list[Leak]:
    """Findings that several looks in a row agree on: a daemon at work has moments between record and object.

    Blocks for milliseconds when there are none, a second when there are. Raises NotAnInstallation.
    """
    folder = DataFolder(str(data)).require()
    ports = read_only_ports(folder)
    found = set(find_leaks(ports)) | set(_of_the_installation(folder))
    for _ in range(LOOKS - 1):
        if not found:
            break
        time.sleep(PAUSE_S)
        found &= set(find_leaks(ports)) | set(_of_the_installation(folder))
    return sorted(found)


def _of_the_installation(folder: DataFolder) -> list[Leak]:
    """What belongs to no sandbox (router, uplink, host table): a leak once nothing of us runs any more.

    A zygote or an ingress whose pid file somebody removed is one itself.
    """
    found, lost = children.find, []
    for name, file, log in (
        ("zygote", folder.zygote_file, folder.zygote_log),
        ("ingress", folder.ingress_file, folder.ingress_log),
    ):
        process = None if file.exists() else children.search(name, log)
        if process is not None:
            lost.append(Leak("process", str(process.pid), f"{name} of this installation, without {file}"))
    if lost:
        return lost
    if any(found(file.stem, file) for file in (folder.daemon_file, folder.zygote_file, folder.ingress_file)):
        return []
    traces, why = network_at_rest(folder).traces(), "no process of this installation runs"
    return [
        *([Leak("router", str(folder.router), why)] if traces.router else []),
        *([Leak("link", traces.uplink, why)] if traces.uplink else []),
        *([Leak("nft table", traces.table, why)] if traces.table else []),
    ]

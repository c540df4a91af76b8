"""Kernel against records, with a daemon or without: what `penstock leaks` shows, and what `--fix` removes."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from penstock.core.errors import PenstockError
from penstock.model import keys
from penstock.model.event import LoggedEvent, decode
from penstock.model.sandbox import SandboxSpec
from penstock.model.snapshot import Snapshot
from penstock.node.ports import Ports
from penstock.node.reap import Leak, Sweeper, find_leaks
from penstock.run import children, door
from penstock.run.datafolder import DataFolder
from penstock.run.edges import network_at_rest, read_only_ports
from penstock.store.glimpse import glimpse

LOOKS: Final = 3
PAUSE_S: Final = 0.3
FIX_S: Final = 60.0
STEP_S: Final = 5.0
HISTORY_MAX: Final = 12  # lines of the record and of the event log, the newest each
NOTHING_RUNS: Final = "no process of this installation runs"


def look(data: Path) -> list[Leak]:
    """Findings that several looks in a row agree on: a daemon at work has moments between record and object.

    Blocks for milliseconds when there are none, a second when there are. Raises NotAnInstallation.
    """
    folder = DataFolder(str(data)).require()
    ports = read_only_ports(folder)
    found = _all(folder, ports)
    for _ in range(LOOKS - 1):
        if not found:
            break
        time.sleep(PAUSE_S)
        found &= _all(folder, ports)
    return sorted(found)


def fix(data: Path, say: Callable[[str], None]) -> list[Leak]:
    """Remove what is ours and dead, and look again. Through the daemon when one lives, else under the folder's lock.

    Never touches a living sandbox, one in doubt, or another installation. Raises FolderInUse when a daemon starts.
    """
    folder = DataFolder(str(data)).require()
    if children.find("daemon", folder.daemon_file) is not None:
        for line in door.ask(folder.door_socket, {"reap": True}, within_s=FIX_S):
            if "note" in line:
                say(line["note"])
        return look(data)
    folder.lock()
    try:
        ports = read_only_ports(folder)
        sweeper = Sweeper(ports, step_within_s=STEP_S, owned=lambda _: False, looks=1)
        asyncio.run(_sweep(sweeper, ports, _images(folder, ports)))
        for path in _stale_sockets(folder):
            Path(path).unlink(missing_ok=True)
    finally:
        folder.unlock()
    say(removed(dict(sweeper.removed)))
    left = look(data)
    if any(leak.why == NOTHING_RUNS for leak in left):
        say(f"what belongs to no sandbox is taken away by: penstock down --force --data {data}")
    return left


def removed(counts: dict[str, int]) -> str:
    told = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()) if count)
    return f"removed: {told or 'nothing'}"


def history(data: Path, leak: Leak) -> list[str]:
    """What is known of a culprit: its record's lines, and its chain in the event log when the store can be read."""
    folder = DataFolder(str(data))
    name = leak.name.removeprefix("sb-")
    subjects = {name}
    lines: list[str] = []
    for record in (name, f"slot{name}"):
        path = folder.path / "records" / f"{record}.log"
        if "/" not in record and path.is_file():
            lines += [
                f"record {record}: {line}" for line in path.read_text(errors="replace").splitlines()[-HISTORY_MAX:]
            ]
    try:
        events = [decode(each.value) for _, each in sorted(glimpse(folder.store, keys.EVENT).items())]
    except (OSError, PenstockError, sqlite3.Error, msgspec.MsgspecError) as error:
        return [*lines, f"the event log cannot be read: {error}"]
    chain = [event for event in events if subjects & {event.subject, *event.related}]
    return lines + [_line(event) for event in chain[-HISTORY_MAX:]]


def _line(event: LoggedEvent) -> str:
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(event.at))
    return f"{at} {event.kind}: {event.because} (by {event.actor})"


async def _sweep(sweeper: Sweeper, ports: Ports, images: list[Leak]) -> None:
    await sweeper.sweep()
    for leak in images:
        if leak.kind == "image":
            ports.disks.remove_image(leak.name)
            sweeper.removed["image"] += 1


def _all(folder: DataFolder, ports: Ports) -> set[Leak]:
    return {*find_leaks(ports), *_images(folder, ports), *_of_the_installation(folder)}


def _images(folder: DataFolder, ports: Ports) -> list[Leak]:
    """Images without a snapshot, and snapshots without their image. A store that cannot be read is a finding, too."""
    kept = ports.disks.list_images()
    try:
        snapshots = glimpse(folder.store, keys.SNAPSHOT)
        specs = glimpse(folder.store, keys.SANDBOX_SPEC) if kept else {}
    except FileNotFoundError:
        return [Leak("sweep", name, "its snapshot cannot be looked up: the store is gone") for name in sorted(kept)]
    except (PenstockError, sqlite3.Error, msgspec.MsgspecError) as error:
        return [Leak("sweep", str(folder.store), f"could not look: {error}")]
    named = {msgspec.json.decode(each.value, type=Snapshot).id for each in snapshots.values()}
    wanted: set[str] = set(named)
    for each in specs.values():
        spec = msgspec.json.decode(each.value, type=SandboxSpec)
        wanted |= {str(spec.park)} | ({spec.checkpoint.id} if spec.checkpoint is not None else set())
    records = folder.path / "records"
    underway = "".join(path.read_text(errors="replace") for path in records.glob("*.log")) if kept - wanted else ""
    return [
        *(Leak("image", name, "no snapshot names it") for name in kept - wanted if f'"{name}"' not in underway),
        *(Leak("snapshot", name, "its image does not exist") for name in named - kept),
    ]


def _of_the_installation(folder: DataFolder) -> list[Leak]:
    """What belongs to no sandbox (router, uplink, host table): a leak once nothing of us runs any more.

    A zygote or an ingress whose pid file somebody removed is one itself, with the ports it listens on.
    """
    found, lost = children.find, []
    for name, file, log in (
        ("zygote", folder.zygote_file, folder.zygote_log),
        ("ingress", folder.ingress_file, folder.ingress_log),
    ):
        process = None if file.exists() else children.search(name, log)
        if process is not None:
            lost.append(Leak("process", str(process.pid), f"{name} of this installation, without {file}"))
            lost += [Leak("port", each, f"listened on by {name}, pid {process.pid}") for each in _ports(process.pid)]
    if lost:
        return lost
    if any(found(file.stem, file) for file in (folder.daemon_file, folder.zygote_file, folder.ingress_file)):
        return []
    traces, why = network_at_rest(folder).traces(), NOTHING_RUNS
    return [
        *([Leak("router", str(folder.router), why)] if traces.router else []),
        *([Leak("link", traces.uplink, why)] if traces.uplink else []),
        *([Leak("nft table", traces.table, why)] if traces.table else []),
        *(Leak("socket", path, why) for path in _stale_sockets(folder)),
    ]


def _stale_sockets(folder: DataFolder) -> list[str]:
    """Of processes that do not run: after kill -9 of the daemon alone its socket is told of by its pid file."""
    if any(folder.path.joinpath("run", name).exists() for name in ("daemon.json", "zygote.json", "ingress.json")):
        return []
    return [str(path) for path in (folder.zygote_socket, folder.feed_socket, folder.door_socket) if path.exists()]


def _ports(pid: int) -> list[str]:
    """HOST:PORT of every IPv4 socket that the process listens on."""
    inodes = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            inodes.add(str(entry.readlink()).removeprefix("socket:[").rstrip("]"))
        except OSError:
            continue  # closed meanwhile
    found = []
    for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A" and fields[9] in inodes:
            host, _, port = fields[1].partition(":")
            found.append(f"{'.'.join(str(byte) for byte in reversed(bytes.fromhex(host)))}:{int(port, 16)}")
    return found

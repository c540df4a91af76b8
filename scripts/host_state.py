#!/usr/bin/env python3
"""What exists on this host, as sets of lines: processes, mounts, cgroups, links, namespaces, nft, loops, files.

Stands on its own (standard library and the machine's tools) so that it can judge Penstock from outside.

    host_state.py take FILE                 write the state of now
    host_state.py diff BEFORE AFTER         print what came and is left; exit code 1 when anything is
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

NAMESPACES = ("mnt", "net", "pid", "user", "uts", "ipc", "cgroup")
WATCHED_FOLDERS = ("/run/penstock", "/var/lib/penstock", "/dev/shm")


def processes() -> set[str]:
    """Processes that bear a sign of Penstock or of any container: a word in their command line or cgroup, or a
    namespace that is not the host's. Other programs of a living host come and go meanwhile and say nothing.
    """
    host = {kind: os.readlink(f"/proc/self/ns/{kind}") for kind in NAMESPACES}
    found = set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) in (os.getpid(), os.getppid()):
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            name = (entry / "comm").read_text().strip()
            words = (entry / "cmdline").read_bytes() + (entry / "cgroup").read_bytes()
            foreign = any(os.readlink(entry / "ns" / kind) != inode for kind, inode in host.items())
        except OSError:
            continue
        if b"penstock" in words or name.startswith("penstock") or foreign:
            found.add(f"{entry.name} started {fields[19]} {name}")
    return found


def mounts() -> set[str]:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return {f"{line.split()[4]} {line.partition(' - ')[2]}" for line in lines}


def cgroups() -> set[str]:
    root = "/sys/fs/cgroup"
    return {folder.removeprefix(root) for folder, _, _ in os.walk(root) if folder != root}


def links() -> set[str]:
    return set(os.listdir("/sys/class/net"))


def namespaces() -> set[str]:
    found = set()
    for kind in NAMESPACES:
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    found.add(os.readlink(entry / "ns" / kind))
                except OSError:
                    continue
    return found


def nft() -> set[str]:
    try:
        ran = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return set()
    return set(ran.stdout.splitlines())


def loops() -> set[str]:
    found = set()
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            found.add(f"{path.parent.parent.name} {path.read_text().strip()}")
        except OSError:
            continue
    return found


def files() -> set[str]:
    found = set()
    for top in WATCHED_FOLDERS:
        for folder, folders, names in os.walk(top):
            found.update(os.path.join(folder, name) for name in (*folders, *names))
    return found


KINDS = {
    "processes": processes,
    "mounts": mounts,
    "cgroups": cgroups,
    "links": links,
    "namespaces": namespaces,
    "nft tables": nft,
    "loop devices": loops,
    "files": files,
}


def take() -> dict[str, list[str]]:
    return {kind: sorted(look()) for kind, look in KINDS.items()}


def diff(before: dict[str, list[str]], after: dict[str, list[str]]) -> dict[str, tuple[list[str], list[str]]]:
    """Per kind: (came, went)."""
    changed = {}
    for kind in KINDS:
        was, now = set(before[kind]), set(after[kind])
        changed[kind] = (sorted(now - was), sorted(was - now))
    return changed


def main(argv: list[str]) -> int:
    if len(argv) == 2 and argv[0] == "take":
        Path(argv[1]).write_text(json.dumps(take()))
        return 0
    if len(argv) == 3 and argv[0] == "diff":
        before, after = (json.loads(Path(name).read_text()) for name in argv[1:])
        left = 0
        for kind, (came, _) in diff(before, after).items():
            # What went away was there before us, hence not ours; only what came is left over.
            print(f"  {kind:13} {len(before[kind]):5} before {len(after[kind]):5} after   {len(came)} left")
            for line in came:
                print(f"      + {line}")
            left += len(came)
        print(f"  {left} left in all")
        return 1 if left else 0
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

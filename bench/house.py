"""An installation of its own for a bench, and what the kernel shows of it."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.installation import Installation

STOP_S = 180.0  # a thousand sandboxes end one after the other


@contextmanager
def installation(*options: str) -> Iterator[Installation]:
    """A running Penstock in a temporary folder, and its variables in our environment. Raises AssertionError when it
    leaves anything behind."""
    with tempfile.TemporaryDirectory(prefix="penstock-bench-") as folder:
        house = Installation(Path(folder) / "data", options)
        try:
            house.up()
            os.environ.update(house.env)
            yield house
        finally:
            house.destroy(within_s=STOP_S)


def record_of(house: Installation, sandbox: str) -> dict[str, Any]:
    """The line of its record that says where its processes and its slot are."""
    for line in (house.data / "records" / f"{sandbox}.log").read_bytes().splitlines():
        found = line[line.find(b"{") :]
        if b'"k":"pid"' in found:
            said: dict[str, Any] = json.loads(found)
            return said
    raise RuntimeError(f"{sandbox} has no process in its record")


def ingress_pid(house: Installation) -> int:
    return int(json.loads((house.data / "run" / "ingress.json").read_text())["pid"])


class Traces:
    """Where one living sandbox shows in the kernel and on the disk, looked up before it is killed: its first process,
    its cgroups, its folder, and the images that loop devices hold."""

    def __init__(self, house: Installation, sandbox: str) -> None:
        self.pid = int(record_of(house, sandbox)["pid"])
        group = f"penstock-{(house.data / 'installation').read_text().strip()}/sb-{sandbox}"
        hierarchies = ["/sys/fs/cgroup", *(entry.path for entry in os.scandir("/sys/fs/cgroup") if entry.is_dir())]
        places = [f"/proc/{self.pid}", f"{house.data}/run/sb/{sandbox}", *(f"{each}/{group}" for each in hierarchies)]
        self._places = [each for each in places if os.path.exists(each)]
        assert len(self._places) >= 3, self._places
        self._image = _image_of(house, sandbox)
        self._inode = os.stat(self._image).st_ino
        self._loop = next(each for each in Path("/sys/block").glob("loop*/loop/backing_file") if self._backs(each))

    def left(self) -> list[str]:
        """What still exists."""
        left = [each for each in self._places if os.path.exists(each)]
        try:
            if os.stat(self._image).st_ino == self._inode:
                left.append(self._image)
        except FileNotFoundError:
            if self._backs(self._loop):
                left.append(str(self._loop))
        return left

    def _backs(self, loop: Path) -> bool:
        try:
            return loop.read_text().startswith(self._image)
        except OSError:
            return False


def _image_of(house: Installation, sandbox: str) -> str:
    """The image of its disk: the pool's records name who has which."""
    for path in (house.data / "records").glob("disk*.log"):
        if sandbox in path.read_text():
            return str(house.data / "disks" / f"{path.stem}.img")
    raise RuntimeError(f"{sandbox} has no disk in any record")

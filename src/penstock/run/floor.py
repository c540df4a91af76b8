"""How much of the host's disk is left alone: below that no sandbox is made, so that those that run keep their room.

Disk images are sparse. A host without free space is an I/O error inside of every sandbox that writes to a block it has
not written before, and ext4 then makes its disk read-only.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from penstock.model.errors import Unavailable
from penstock.model.units import MIB

RETRY_S: Final = 10.0  # sandboxes that end give their images back


class HostDiskFull(Unavailable):
    """Raised to whoever wants another sandbox."""

    code = "host_disk_full"


class DiskFloor:
    """`folder` lies on the disk that counts; at least `free_min` bytes of it stay free."""

    def __init__(self, folder: Path, free_min: int) -> None:
        self._folder, self.free_min = folder, free_min

    def free_bytes(self) -> int:
        """For others than root. One statvfs(2), about a microsecond."""
        state = os.statvfs(self._folder)
        return state.f_bavail * state.f_frsize

    def check(self) -> None:
        """Raises HostDiskFull."""
        free = self.free_bytes()
        if free < self.free_min:
            raise HostDiskFull(
                "the host's disk is full",
                why=f"{free // MIB} MiB are free, and {self.free_min // MIB} MiB are kept for sandboxes that run",
                now="retry when some have ended, or make room on the host",
                retry_after_s=RETRY_S,
            )

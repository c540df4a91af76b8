"""A test seam: the daemon dies, as by kill -9 or a pulled plug, at a chosen write to its records.

Off unless the daemon's environment names a file in `PENSTOCK_FAILPOINT`. The file says at which write from now on, and
at which moment of it: `12 torn`. It is counted down there, so that a test arms it whenever it likes, one count reaches
over a restart, and what is left afterwards tells how many writes there were. Without the file nothing happens.

A write is a line appended to a record, or a record unlinked. `torn` leaves half of a line.
"""

from __future__ import annotations

import os
import signal
import sys
from enum import StrEnum
from typing import Final, NoReturn

VARIABLE: Final = "PENSTOCK_FAILPOINT"


class Moment(StrEnum):
    BEFORE = "before"
    TORN = "torn"
    AFTER = "after"


class Failpoint:
    """Counts writes down in the file at `path`. `None` as the answer of `reach` means: go on."""

    def __init__(self, path: str) -> None:
        self._path = path

    @classmethod
    def of_environment(cls) -> Failpoint | None:
        path = os.environ.get(VARIABLE)
        return cls(path) if path else None

    def reach(self, what: bytes) -> Moment | None:
        """Call before the write of `what`. Does not return when it dies before it; else the moment the caller dies at.

        Raises ValueError when the file says nothing that can be understood.
        """
        try:
            with open(self._path) as file:
                left, moment = file.read().split()
        except FileNotFoundError:
            return None
        count = int(left) - 1
        if count < 0:
            return None
        with open(self._path, "w") as file:
            file.write(f"{count} {moment}")
        if count:
            return None
        print(f"failpoint: {moment} {what.decode()}", file=sys.stderr, flush=True)
        reached = Moment(moment)
        if reached is Moment.BEFORE:
            self.die()
        return reached

    def die(self) -> NoReturn:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("survived SIGKILL")

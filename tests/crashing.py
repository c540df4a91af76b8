"""An installation whose daemon dies at a chosen write to its records, and is up again in a third of a second.

The daemon is forked from a process that has imported it already: 1 s of each start is Python reading modules. All else
is as by `penstock up`, the failpoint's variable apart (`penstock/node/linux/failpoint.py`).
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import re
import signal
import time
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.installation import READY_WITHIN_S, Installation

_spawning = multiprocessing.get_context("forkserver")
_spawning.set_forkserver_preload(["penstock.run.up"])

ADDRESSES = {"api": "127.0.0.1:0", "ingress": "127.0.0.1:0", "tls": "127.0.0.1:0"}


def _run(given: dict[str, str], output: str, failpoint: str) -> None:
    from penstock.run import settings
    from penstock.run.up import main

    os.setsid()
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for number in (1, 2):
        os.dup2(log, number)
    os.environ["PENSTOCK_FAILPOINT"] = failpoint
    raise SystemExit(main(settings.load(given)))


def end_forking() -> None:
    """End the process that forks, which else lives as long as the test run. Another daemon would start it anew."""
    multiprocessing.forkserver._forkserver._stop()  # type: ignore[attr-defined]
    multiprocessing.resource_tracker._resource_tracker._stop()  # type: ignore[attr-defined]


class Forked:
    """What `subprocess.Popen` is to an installation."""

    def __init__(self, process: BaseProcess) -> None:
        self._process = process
        self.pid = process.pid or 0

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        code = self._process.exitcode
        assert code is not None, f"the daemon, pid {self.pid}, still runs after {timeout} s"
        return code

    def kill(self) -> None:
        self._process.kill()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


@dataclass
class Crashing(Installation):
    """`died_at` says at which moment of which write it died, one a death."""

    died_at: list[str] = field(default_factory=list)
    _said: int = 0

    def up(self, *, on_stop: str | None = "drain") -> Crashing:
        """Until it is ready, or died of its failpoint."""
        given = {**ADDRESSES, "data": str(self.data), "on_stop": on_stop or ""}
        self._log.touch(0o600)
        self._said = self._log.stat().st_size
        process = _spawning.Process(target=_run, args=(given, str(self._log), str(self._failpoint)), daemon=True)
        process.start()
        forked: Any = Forked(process)
        self.daemon = forked
        until = time.monotonic() + READY_WITHIN_S
        while "\nready\n" not in self.said():
            if forked.poll() is not None:
                assert self.left == 0, f"it did not come up:\n{self.said()}"
                return self
            assert time.monotonic() < until, f"it is not ready:\n{self.said()}"
            time.sleep(0.01)
        self.env.update(re.findall(r"export (E2B_\w+)=(\S+)", self.said()))
        return self

    def said(self) -> str:
        """By the daemon that was started last."""
        with open(self._log, errors="replace") as file:
            file.seek(self._said)
            return file.read()

    def stop(self, number: int = signal.SIGTERM, within_s: float = 60.0) -> int:
        assert self.daemon is not None
        self.daemon.send_signal(number)
        return self.daemon.wait(timeout=within_s)

    def arm(self, count: int, moment: str) -> None:
        """It dies at the `count`-th write from now."""
        part = self._failpoint.with_suffix(".part")
        part.write_text(f"{count} {moment}")
        part.rename(self._failpoint)

    def disarm(self) -> None:
        self._failpoint.unlink(missing_ok=True)

    @property
    def armed(self) -> bool:
        return self._failpoint.exists()

    @property
    def left(self) -> int:
        """Writes until its death; 0: it dies, or is dead."""
        try:
            return int(self._failpoint.read_text().split()[0])
        except (FileNotFoundError, IndexError):
            return -1

    def dies(self, within_s: float) -> bool:
        """Whether its failpoint was reached, within that time; then it is gone. Once a death."""
        until = time.monotonic() + within_s
        while self.left != 0:
            if time.monotonic() > until:
                return False
            time.sleep(0.01)
        assert self.daemon is not None
        assert self.daemon.wait(timeout=5) == -signal.SIGKILL
        self._note_death()
        return True

    def _note_death(self) -> None:
        self.died_at += re.findall(r"failpoint: (.*)", self.said())

    @property
    def _log(self) -> Path:
        return self.data.with_suffix(".output")

    @property
    def _failpoint(self) -> Path:
        return self.data.with_suffix(".failpoint")

"""A real installation for tests: `penstock up` in its own folder, on free ports, stopped and checked at the end."""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PENSTOCK = str(ROOT / ".venv/bin/penstock")
READY_WITHIN_S = 120.0


@dataclass
class Installation:
    """`env` holds the E2B_* variables it printed; `data` its folder; `output` all it has said."""

    data: Path
    options: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    output: list[str] = field(default_factory=list)
    daemon: subprocess.Popen[str] | None = None
    _lines: queue.SimpleQueue[str | None] = field(default_factory=queue.SimpleQueue)

    def up(self, *, on_stop: str | None = "drain") -> Installation:
        """`on_stop` None: as the environment and the settings say."""
        argv = [PENSTOCK, "up", "--data", str(self.data), *(("--on-stop", on_stop) if on_stop else ())]
        argv += ["--api", "127.0.0.1:0", "--ingress", "127.0.0.1:0", "--tls", "127.0.0.1:0", *self.options]
        self.daemon = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self._lines = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()
        until = time.monotonic() + READY_WITHIN_S
        while time.monotonic() < until:
            line = self._line(1.0)
            if line is None and self.daemon.poll() is not None:
                break
            if line and (found := re.match(r"export (E2B_\w+)=(\S+)", line)):
                self.env[found[1]] = found[2]
            if line and line.startswith("ready"):
                return self
        self.kill()
        raise AssertionError("penstock did not come up:\n" + "".join(self.output))

    def run(self, *arguments: str, check: bool = True, **kwargs: object) -> subprocess.CompletedProcess[str]:
        """`penstock ARGUMENTS --data …`."""
        ran = subprocess.run(
            [PENSTOCK, *arguments],
            capture_output=True,
            text=True,
            timeout=120,
            env=self.environ(),
            **kwargs,  # type: ignore[call-overload]
        )
        if check and ran.returncode != 0:
            raise AssertionError(f"penstock {' '.join(arguments)}: exit {ran.returncode}\n{ran.stdout}{ran.stderr}")
        return ran

    def environ(self) -> dict[str, str]:
        return {**os.environ, **self.env, "PENSTOCK_DATA": str(self.data)}

    def stop(self, number: int = signal.SIGTERM, within_s: float = 60.0) -> int:
        """Signal the daemon and wait. Returns its exit code."""
        assert self.daemon is not None
        self.daemon.send_signal(number)
        code = self.daemon.wait(timeout=within_s)
        while self._line(1.0) is not None:
            pass
        return code

    def kill(self) -> None:
        """kill -9 of the daemon."""
        if self.daemon is not None and self.daemon.poll() is None:
            self.daemon.kill()
            self.daemon.wait()

    def leaks(self) -> subprocess.CompletedProcess[str]:
        return self.run("leaks", "--data", str(self.data), check=False)

    def destroy(self, within_s: float = 60.0) -> None:
        """Whatever state it is in: nothing of it exists afterwards. Raises AssertionError naming what is left."""
        if self.daemon is not None and self.daemon.poll() is None:
            self.stop(within_s=within_s)
        gone = self.run("down", "--data", str(self.data), "--force", check=False)
        left = self.leaks()
        assert left.returncode == 0, f"left over:\n{left.stdout}{left.stderr}\n{gone.stdout}{gone.stderr}"

    def _line(self, within_s: float) -> str | None:
        """The next line it says; None after `within_s` of silence or at its end."""
        try:
            line = self._lines.get(timeout=within_s)
        except queue.Empty:
            return None
        if line is not None:
            self.output.append(line)
        return line

    def _listen(self) -> None:
        """Reads all it says, so that it never blocks on a full pipe; None marks the end."""
        assert self.daemon is not None and self.daemon.stdout is not None
        for line in self.daemon.stdout:
            self._lines.put(line)
        self._lines.put(None)

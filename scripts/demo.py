"""The main job, end to end: start Penstock, drive it with the real `e2b` SDK, stop it, show that nothing is left.

Run by `make demo`. Prints every step with its time. The judge of the last step, `host_state.py`, does not import
penstock; its two snapshots are taken before the start and after the stop.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STARTED_WITHIN_S = 120.0
STOPPED_WITHIN_S = 60.0


class Steps:
    """Prints a line per step with the time it took."""

    def __init__(self) -> None:
        self._at = time.perf_counter()

    def start(self) -> None:
        self._at = time.perf_counter()

    def done(self, text: str) -> None:
        print(f"  {(time.perf_counter() - self._at) * 1000:8.1f} ms  {text}", flush=True)
        self.start()


def snapshot(file: Path) -> None:
    subprocess.run([sys.executable, str(ROOT / "scripts/host_state.py"), "take", str(file)], check=True)


def start(data: str) -> tuple[subprocess.Popen[str], dict[str, str]]:
    """The daemon and the variables it printed. Raises SystemExit with its words when it does not come up."""
    argv = [str(ROOT / ".venv/bin/penstock"), "up", "--data", data, "--on-stop", "drain"]
    argv += ["--api", "127.0.0.1:0", "--ingress", "127.0.0.1:0", "--tls", "127.0.0.1:0"]
    daemon = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert daemon.stdout is not None
    values: dict[str, str] = {}
    timer = threading.Timer(STARTED_WITHIN_S, daemon.kill)
    timer.start()
    for line in daemon.stdout:
        shown = re.sub(r"(e2b_[0-9a-f]{4})[0-9a-f]+", r"\1…", line.rstrip())
        print(f"  | {shown}", flush=True)
        if found := re.match(r"export (E2B_\w+)=(\S+)", line):
            values[found[1]] = found[2]
        if line.startswith("ready"):
            timer.cancel()
            return daemon, values
    timer.cancel()
    raise SystemExit("demo: penstock did not come up")


def drive(values: dict[str, str]) -> None:
    """What a user does first, through the unmodified SDK."""
    os.environ.update(values)
    from e2b import PtySize, Sandbox  # after the variables: the SDK reads them when it is imported

    step = Steps()
    box = Sandbox.create(timeout=120, metadata={"from": "demo"})
    step.done(f"create a sandbox: {box.sandbox_id}")

    heard: list[str] = []
    ran = box.commands.run("for n in 1 2 3; do echo line $n; done; id -un; python3 --version", on_stdout=heard.append)
    step.done(f"run a command, output streamed: {' '.join(''.join(heard).split())!r}, exit {ran.exit_code}")

    box.files.write("/home/user/hello.txt", "hello from outside\n")
    text = box.files.read("/home/user/hello.txt")
    step.done(f"write a file and read it back: {text.strip()!r}")

    screen: list[bytes] = []
    terminal = box.pty.create(PtySize(rows=24, cols=80))
    box.pty.send_stdin(terminal.pid, b"tput cols; exit\n")
    terminal.wait(on_pty=screen.append)
    columns = re.findall(rb"[\r\n](\d+)\r\n", b"".join(screen))
    step.done(f"a terminal of {columns[-1].decode() if columns else '?'} columns")

    web(box, values, step)

    rows = Sandbox.list(query=None).next_items()
    step.done(f"list: {len(rows)} running")
    box.kill()
    step.done("kill, verified gone")


def web(box: Any, values: dict[str, str], step: Steps) -> None:
    box.commands.run("python3 -m http.server 8000 --directory /home/user", background=True)
    host = box.get_host(8000)
    for _ in range(100):
        # `*.localhost` does not resolve everywhere: connect to the ingress and name the host, as a browser would.
        request = urllib.request.Request(values["E2B_SANDBOX_URL"] + "/hello.txt", headers={"Host": host})
        try:
            with urllib.request.urlopen(request, timeout=5) as reply:
                body = reply.read().decode().strip()
            break
        except urllib.error.HTTPError as error:
            if error.code != 502:
                raise
            time.sleep(0.02)  # the server inside has not bound its port yet
    else:
        raise SystemExit("demo: the web server in the sandbox was not reached")
    step.done(f"a web server in it, reached as http://{host}: {body!r}")


def stop(daemon: subprocess.Popen[str]) -> None:
    daemon.send_signal(signal.SIGINT)
    try:
        output, _ = daemon.communicate(timeout=STOPPED_WITHIN_S)
    except subprocess.TimeoutExpired:
        daemon.kill()
        raise SystemExit(f"demo: penstock did not stop within {STOPPED_WITHIN_S:.0f} s") from None
    for line in output.splitlines():
        print(f"  | {line}")


def main() -> int:
    if os.geteuid() != 0:
        raise SystemExit("demo: sandboxes need root on this machine; run: sudo make demo")
    folder = Path(tempfile.mkdtemp(prefix="penstock-demo-"))
    before, after = folder / "before.json", folder / "after.json"
    data = str(folder / "data")
    try:
        print("1. what is on this host before")
        snapshot(before)
        print("2. penstock up")
        daemon, values = start(data)
        try:
            print("3. the e2b SDK")
            drive(values)
        finally:
            print("4. stop")
            stop(daemon)
        print("5. what is left on this host")
        shutil.rmtree(data)
        snapshot(after)
        return subprocess.run(
            [sys.executable, str(ROOT / "scripts/host_state.py"), "diff", str(before), str(after)], check=False
        ).returncode
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())

"""Two thousand sandboxes come and go while everything that can break does: nothing is lost, nothing is left.

    python -m bench.soak [--cycles 2000] [--seconds 600] [--seed N] [--json FILE]

Each cycle creates a sandbox, runs a command in it and kills it. Beside them *keepers* live on: each keeps writing
files, and every write that was acknowledged and synced must be there when it is looked at; so must every API key that
was acknowledged. About every 3 s a fault strikes: kill -9 of the daemon, the zygote, the ingress or a sandbox's first
process; a full disk for a second; a drain that is taken back; a drain with force, before which the keepers are
looked at and after which there are new ones. The data folder lies on a file system of its own. In the end there may be
no leak, no lost write, and no keeper that died but by force. Exit status 0 when so. As root.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from bench.cycles import REQUEST_S, Cycles, answer
from tests.filling import fill
from tests.installation import Installation

from penstock.run.children import start_ticks

FAULTS = ("daemon", "daemon", "zygote", "ingress", "guest", "guest", "full disk", "drain taken back", "drain by force")
KEEPERS = 3
DISK_BYTES = 6 << 30
COMMAND = {"process": {"cmd": "/bin/sh", "args": ["-c", "echo soaked"]}}


@dataclass
class Keeper:
    """A sandbox that lives on, the files it was told are written, and its first process."""

    made: dict[str, str]
    first: str
    written: list[str] = field(default_factory=list)


@dataclass
class Soak(Cycles):
    """`lost` says what was acknowledged and is not there, or who died and should not have."""

    seconds: float = 600.0
    lost: list[str] = field(default_factory=list)
    keepers: list[Keeper] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    longest_quiet_s: float = 0.0  # from the end of one fault to the next

    def __post_init__(self) -> None:
        super().__post_init__()
        self._until = time.monotonic() + self.seconds
        self._kept = threading.Lock()  # held while keepers write, and while they are looked at and replaced
        self._struck_at = time.monotonic()

    def run(self) -> None:
        self._make_keepers()
        writing = threading.Thread(target=self._write)
        writing.start()
        super().run()
        writing.join()

    # ---- load

    def _next(self) -> bool:
        return time.monotonic() < self._until and super()._next()

    def _cycle(self, rng: random.Random) -> None:
        made = self._call("POST", "/v2/sandboxes", {"templateID": "base", "timeout": 60})
        if made.status_code != 201:
            self._count(f"create answered {answer(made)}")
            time.sleep(0.1)
            return
        self._count("created")
        try:
            ran = self._inside(made.json(), "POST", "/process.Process/Start", _framed(COMMAND))
            self._count("ran a command" if b"exit status 0" in ran.content else f"a command answered {ran.status_code}")
        except httpx.HTTPError as error:
            self._count(f"command cut: {type(error).__name__}")
        killed = self._call("DELETE", f"/sandboxes/{made.json()['sandboxID']}")
        self._count(f"kill answered {killed.status_code}")

    def _inside(self, made: dict[str, str], method: str, path: str, content: bytes = b"") -> httpx.Response:
        """A request to the guest, through the ingress."""
        headers = {
            "E2b-Sandbox-Id": made["sandboxID"],
            "E2b-Sandbox-Port": "49983",
            "X-Access-Token": made["envdAccessToken"],
            "Authorization": "Basic cm9vdDo=",
            "Content-Type": "application/connect+json" if path.startswith("/process") else "application/octet-stream",
            "Connect-Protocol-Version": "1",
        }
        url = self.installation.env["E2B_SANDBOX_URL"] + path
        return httpx.request(method, url, headers=headers, content=content, timeout=REQUEST_S)

    # ---- keepers

    def _make_keepers(self) -> None:
        self.keepers = []
        until = time.monotonic() + REQUEST_S
        while len(self.keepers) < KEEPERS:
            with suppress(httpx.HTTPError):
                made = self._call("POST", "/v2/sandboxes", {"templateID": "base", "timeout": 3600})
                if made.status_code == 201:
                    self.keepers.append(Keeper(made.json(), self._first(made.json()["sandboxID"])))
            assert time.monotonic() < until, "no keeper could be made"

    def _first(self, sandbox: str) -> str:
        """Pid and start time of its first process; empty when there is none."""
        for path in self._cgroups():
            if path.name == f"sb-{sandbox}":
                with suppress(OSError, IndexError):
                    pid = (path / "cgroup.procs").read_text().split()[0]
                    return f"{pid} {start_ticks(int(pid))}"
        return ""

    def _write(self) -> None:
        number = 0
        while not self._done.wait(0.1):
            number += 1
            with self._kept, suppress(httpx.HTTPError):
                keeper = self.keepers[number % KEEPERS]
                path = f"/root/kept-{number}"
                wrote = self._inside(keeper.made, "POST", f"/files?path={path}&username=root", str(number).encode())
                sync = {"process": {"cmd": "/bin/sync", "args": [path]}}
                synced = self._inside(keeper.made, "POST", "/process.Process/Start", _framed(sync))
                if wrote.is_success and b"exit status 0" in synced.content:
                    keeper.written.append(path)
                    self._count("acknowledged write")
            with suppress(httpx.HTTPError):
                if number % 10 == 0:
                    made = self._call("POST", "/api-keys", {"name": f"soak {number}"})
                    if made.status_code == 201:
                        self.keys.append(made.json()["id"])
                        self._count("acknowledged key")

    def _look_at_keepers(self) -> None:
        for keeper in self.keepers:
            sandbox = keeper.made["sandboxID"]
            if self._first(sandbox) != keeper.first:
                self.lost.append(f"keeper {sandbox}: was pid {keeper.first}, is {self._first(sandbox) or 'gone'}")
                continue
            for path in keeper.written:
                if not self._holds(keeper, path):
                    self.lost.append(f"keeper {sandbox}: {path}")

    def _holds(self, keeper: Keeper, path: str) -> bool:
        until = time.monotonic() + REQUEST_S
        while time.monotonic() < until:
            with suppress(httpx.HTTPError):
                reply = self._inside(keeper.made, "GET", f"/files?path={path}&username=root")
                if reply.status_code < 500:
                    return reply.content == path.rpartition("-")[2].encode()
            time.sleep(0.2)
        return False

    # ---- faults

    def _break(self) -> None:
        rng = random.Random(f"{self.seed} faults")
        turns: list[str] = []
        while not self._done.wait(self.every_s * rng.uniform(0.3, 1.0)):
            turns = turns or rng.sample(FAULTS, len(FAULTS))
            fault = turns.pop()
            quiet_s = time.monotonic() - self._struck_at
            if self._strike(fault, rng):
                self._count(f"fault: {fault}")
                self.longest_quiet_s = max(self.longest_quiet_s, quiet_s)
                self._struck_at = time.monotonic()

    def _strike(self, fault: str, rng: random.Random) -> bool:
        match fault:
            case "full disk":
                hogs = _take_room(self.installation.data.parent)
                time.sleep(rng.uniform(0.2, 1.0))
                for hog in hogs:
                    hog.unlink()
            case "drain taken back":
                self._admin("drain", {"yes": True, "softS": 60, "hardS": 120})
                time.sleep(rng.uniform(0.1, 0.5))
                self._admin("undrain")
            case "drain by force":
                with self._kept:
                    self._look_at_keepers()
                    self._admin("drain", {"yes": True, "softS": 0, "hardS": 15, "force": True, "disposition": "stop"})
                    self._admin("undrain")
                    self._make_keepers()
            case _:
                return super()._strike(fault, rng)
        return True

    def _some_guest(self, rng: random.Random) -> int | None:
        kept = {f"sb-{keeper.made['sandboxID']}" for keeper in self.keepers}
        for path in rng.sample(found := [each for each in self._cgroups() if each.name not in kept], len(found)):
            with suppress(OSError, IndexError):
                return int((path / "cgroup.procs").read_text().split()[0])
        return None

    def _admin(self, verb: str, body: object = None) -> None:
        token = (self.installation.data / "admin-token").read_text().strip()
        url = f"{self.installation.env['E2B_API_URL']}/nodes/local/{verb}"
        until = time.monotonic() + REQUEST_S
        while True:
            with suppress(httpx.HTTPError):
                reply = httpx.post(url, json=body, headers={"X-Admin-Token": token}, timeout=REQUEST_S)
                self._count(f"{verb} answered {reply.status_code}")
                if reply.status_code < 500 and reply.status_code != 202:
                    return
            assert time.monotonic() < until, f"{verb} was never accepted"
            time.sleep(0.2)

    # ---- the end

    def _settle(self) -> None:
        with self._kept:
            self._look_at_keepers()
        there = {each["id"] for each in self._call("GET", "/api-keys").json()}
        self.lost += [f"api key {each}" for each in self.keys if each not in there]
        super()._settle()

    def report(self, took_s: float) -> dict[str, object]:
        faults = {what: count for what, count in sorted(self.counts.items()) if what.startswith("fault")}
        return {
            "seed": self.seed,
            "seconds": round(took_s, 1),
            "cycles": self.counts["created"],
            "faults": sum(faults.values()),
            "longest_without_fault_s": round(self.longest_quiet_s, 1),
            "acknowledged": self.counts["acknowledged write"] + self.counts["acknowledged key"],
            "lost": self.lost,
            "left": self.left,
            "counts": dict(sorted(self.counts.items())),
        }


def _take_room(folder: Path) -> tuple[Path, Path]:
    """The files that hold all of what was free: nearly all of it without writing, the last bytes by writing."""
    most = folder / "most"
    with most.open("wb") as file, suppress(OSError):
        os.posix_fallocate(file.fileno(), 0, max(1, shutil.disk_usage(folder).free - (32 << 20)))
    return most, fill(folder)


def _framed(message: object) -> bytes:
    """One message of a Connect stream."""
    body = json.dumps(message).encode()
    return struct.pack(">BI", 0, len(body)) + body


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cycles", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=600.0, help="no new cycle after that")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--json", type=Path, help="write the report here")
    asked = parser.parse_args()
    print(f"seed {asked.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="penstock-soak-") as folder:
        place, image = Path(folder) / "disk", Path(folder) / "image"
        place.mkdir()
        image.touch()
        os.truncate(image, DISK_BYTES)
        subprocess.run(["mkfs.ext4", "-q", "-m", "0", image], check=True)
        subprocess.run(["mount", "-o", "loop", image, place], check=True)
        try:
            soak, took_s = _soak(place / "data", asked)
        finally:
            subprocess.run(["umount", place], check=True)
    told = soak.report(took_s)
    print(json.dumps(told, indent=2))
    if asked.json:
        asked.json.write_text(json.dumps(told))
    return 1 if soak.left or soak.lost else 0


def _soak(data: Path, asked: argparse.Namespace) -> tuple[Soak, float]:
    data.mkdir()
    (data / "penstock.toml").write_text("disk_free_min = '64 MiB'\nslots_ready = 16\n")
    installation = Installation(data)
    try:
        soak = Soak(
            installation.up(), cycles=asked.cycles, seed=asked.seed, workers=asked.workers, seconds=asked.seconds
        )
        since = time.monotonic()
        soak.run()
        return soak, time.monotonic() - since
    finally:
        installation.destroy()


if __name__ == "__main__":
    sys.exit(main())

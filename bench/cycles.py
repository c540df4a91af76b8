"""Create and kill, over and over, while parts of Penstock are killed with -9: nothing may be left in the end.

    python -m bench.cycles --cycles 1000 [--seed 7] [--workers 4] [--every 3]

Every few seconds one of the daemon (started again at once), the zygote, the ingress or some sandbox's guest is killed.
A request that fails meanwhile is counted, not repeated; what it left behind must go by itself or by the final sweep of
`kill` over what `list` shows. Then `penstock leaks`, the cgroups, the loop devices and the processes must show nothing.
Exit status 0 when so. As root; about 2 minutes for 1,000 on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from tests.installation import Installation

FAULTS = ("daemon", "zygote", "ingress", "guest", "guest", "guest")
REQUEST_S = 30.0
SETTLE_S = 30.0


@dataclass
class Cycles:
    """One run. `counts` tells what happened; `left` what was found at the end, empty when all is well."""

    installation: Installation
    cycles: int
    seed: int
    workers: int = 4
    every_s: float = 3.0
    counts: Counter[str] = field(default_factory=Counter)
    left: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._turns = iter(range(self.cycles))
        self._lock = threading.Lock()
        self._done = threading.Event()

    def run(self) -> None:
        """Blocks until all cycles ran and the end was looked at. The installation is up, before and after."""
        workers = [threading.Thread(target=self._work, args=(number,)) for number in range(self.workers)]
        breaker = threading.Thread(target=self._break)
        for thread in (*workers, breaker):
            thread.start()
        for thread in workers:
            thread.join()
        self._done.set()
        breaker.join()
        self._settle()

    # ---- load

    def _work(self, number: int) -> None:
        rng = random.Random(f"{self.seed} {number}")
        while self._next():
            try:
                self._cycle(rng)
            except httpx.HTTPError as error:
                self._count(f"request cut: {type(error).__name__}")
                time.sleep(0.2)  # the daemon is being started again

    def _cycle(self, rng: random.Random) -> None:
        impatient = rng.random() < 0.05  # gives up in the middle of the start
        made = self._call("POST", "/sandboxes", {"templateID": "base", "timeout": 20}, 0.02 if impatient else REQUEST_S)
        if made.status_code != 201:
            self._count(f"create answered {answer(made)}")
            return
        self._count("created")
        if rng.random() < 0.1:
            return  # left to the final sweep, or to its end of life
        killed = self._call("DELETE", f"/sandboxes/{made.json()['sandboxID']}")
        self._count(f"kill answered {answer(killed)}")

    def _call(self, method: str, path: str, body: object = None, within_s: float = REQUEST_S) -> httpx.Response:
        env = self.installation.env
        headers = {"X-API-Key": env["E2B_API_KEY"]}
        return httpx.request(method, env["E2B_API_URL"] + path, headers=headers, json=body, timeout=within_s)

    def _next(self) -> bool:
        with self._lock:
            return next(self._turns, None) is not None

    def _count(self, what: str) -> None:
        with self._lock:
            self.counts[what] += 1

    # ---- faults

    def _break(self) -> None:
        rng = random.Random(f"{self.seed} faults")
        while not self._done.wait(self.every_s * rng.uniform(0.5, 1.5)):
            fault = rng.choice(FAULTS)
            if self._strike(fault, rng):
                self._count(f"killed a {fault}")

    def _strike(self, fault: str, rng: random.Random) -> bool:
        if fault == "daemon":
            self.installation.kill()
            self.installation.up()
            return True
        pid = self._some_guest(rng) if fault == "guest" else self._pid_of(fault)
        if pid is None:
            return False
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        return True

    def _pid_of(self, name: str) -> int | None:
        try:
            return int(json.loads((self.installation.data / f"run/{name}.json").read_text())["pid"])
        except (OSError, ValueError, KeyError):
            return None  # being replaced

    def _some_guest(self, rng: random.Random) -> int | None:
        for sandbox in rng.sample(found := self._cgroups(), len(found)):
            with suppress(OSError, IndexError):
                return int((sandbox / "cgroup.procs").read_text().split()[0])
        return None

    def _cgroups(self) -> list[Path]:
        top = Path("/sys/fs/cgroup/pids")
        top = top if top.is_dir() else Path("/sys/fs/cgroup")
        name = (self.installation.data / "installation").read_text().strip()
        return sorted((top / f"penstock-{name}").glob("sb-*"))

    # ---- the end

    def _settle(self) -> None:
        until = time.monotonic() + SETTLE_S
        while True:
            with suppress(httpx.HTTPError):
                for sandbox in self._call("GET", "/sandboxes").json():
                    killed = self._call("DELETE", f"/sandboxes/{sandbox['sandboxID']}")
                    self._count(f"kill at the end answered {answer(killed)}")
            self.left = self._look()
            if not self.left or time.monotonic() > until:
                return
            time.sleep(0.5)

    def _look(self) -> list[str]:
        leaks = self.installation.leaks()
        found = [line for line in leaks.stdout.splitlines() if leaks.returncode != 0]
        found += [f"cgroup {path}" for path in self._cgroups()]
        found += [f"record {path}" for path in (self.installation.data / "records").glob("i*.log")]
        found += [f"run folder {path}" for path in (self.installation.data / "run/sb").iterdir()]
        found += [f"listed {each['sandboxID']}" for each in self._listed()]
        return found

    def _listed(self) -> list[dict[str, str]]:
        try:
            return list(self._call("GET", "/sandboxes").json())
        except httpx.HTTPError as error:
            return [{"sandboxID": f"? ({error})"}]


def answer(reply: httpx.Response) -> str:
    """`204`, `503 store_full`."""
    with suppress(ValueError, AttributeError):
        return f"{reply.status_code} {reply.json().get('error_code', '')}".rstrip()
    return str(reply.status_code)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cycles", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--every", type=float, default=3.0, help="seconds between faults, on average")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="penstock-cycles-") as folder:
        installation = Installation(Path(folder) / "data").up()
        run = Cycles(installation, arguments.cycles, arguments.seed, arguments.workers, arguments.every)
        since = time.monotonic()
        try:
            run.run()
        finally:
            installation.destroy()
    print(f"seed {arguments.seed}, {arguments.cycles} cycles in {time.monotonic() - since:.0f} s")
    for what, count in sorted(run.counts.items()):
        print(f"{count:6} {what}")
    if run.left:
        print("".join(installation.output[-40:]))
    print("left: nothing" if not run.left else "left:\n" + "\n".join(run.left))
    return 1 if run.left else 0


if __name__ == "__main__":
    sys.exit(main())

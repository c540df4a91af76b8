"""A sandbox of a real installation, driven by the real SDK, seen from inside and from the host."""

from __future__ import annotations

import http.client
import json
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from e2b import CommandExitException, Sandbox

from tests.installation import Installation

ATTEMPTS = Path(__file__).parent / "spec/attempts"
INSIDE = "/opt/attempts"
T = TypeVar("T")


@dataclass(frozen=True)
class Ran:
    status: int
    out: str
    err: str


@dataclass(frozen=True)
class Box:
    installation: Installation
    sdk: Sandbox

    @property
    def id(self) -> str:
        return self.sdk.sandbox_id

    def run(self, command: str, *, user: str = "user", timeout: float = 30) -> Ran:
        """A shell command; whatever its exit status."""
        try:
            ended = self.sdk.commands.run(command, user=user, timeout=timeout)
        except CommandExitException as failed:
            return Ran(failed.exit_code, failed.stdout, failed.stderr)
        return Ran(ended.exit_code, ended.stdout, ended.stderr)

    def ok(self, command: str, *, user: str = "user", timeout: float = 30) -> str:
        ran = self.run(command, user=user, timeout=timeout)
        assert ran.status == 0, f"{command}: {ran}"
        return ran.out

    def python(self, program: str, *, user: str = "user", timeout: float = 30) -> Ran:
        self.sdk.files.write("/tmp/program.py", program, user=user)
        return self.run("python3 /tmp/program.py", user=user, timeout=timeout)

    def attempts(self, name: str, *arguments: str, user: str = "user") -> dict[str, str]:
        """What became of each attempt in `attempts/<name>.py`: an errno's name, or "done: …"."""
        for file in ("attempt", name):
            self.sdk.files.write(f"{INSIDE}/{file}.py", (ATTEMPTS / f"{file}.py").read_text(), user="root")
        words = " ".join(f"'{argument}'" for argument in arguments)
        ran = self.run(f"python3 {INSIDE}/{name}.py {words}", user=user, timeout=60)
        assert ran.status == 0, ran
        outcomes: dict[str, str] = json.loads(ran.out.splitlines()[-1])
        assert outcomes
        return outcomes

    def pids(self) -> list[int]:
        """Host pids of all its processes, its pid 1 first."""
        found: list[int] = []
        for name in ("cgroup.procs", "user/cgroup.procs"):
            try:
                found += [int(line) for line in (self._cgroup() / name).read_text().split()]
            except OSError:
                pass
        return found

    def pid(self) -> int:
        """Host pid of its guest. Raises IndexError when there is none."""
        return self.pids()[0]

    def is_well(self) -> bool:
        """It runs a command and keeps a file."""
        return self.run("echo kept > ~/mark; cat ~/mark").out == "kept\n"

    def request(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """One HTTP request to its guest through the ingress, with its token."""
        with connection(self) as http_connection:
            http_connection.request(method, path, body, {**self.headers(), **(headers or {})})
            reply = http_connection.getresponse()
            return reply.status, {name.lower(): value for name, value in reply.getheaders()}, reply.read()

    def headers(self) -> dict[str, str]:
        token = self.sdk._envd_access_token or ""
        return {"E2b-Sandbox-Id": self.id, "E2b-Sandbox-Port": "49983", "X-Access-Token": token}

    def kill(self) -> None:
        self.sdk.kill()

    def _cgroup(self) -> Path:
        installation = (self.installation.data / "installation").read_text().strip()
        v1 = Path("/sys/fs/cgroup/pids")
        top = v1 if v1.is_dir() else Path("/sys/fs/cgroup")
        return top / f"penstock-{installation}" / f"sb-{self.id}"


def options(installation: Installation) -> dict[str, Any]:
    """For the SDK: this installation, whatever the environment says; no hidden repetitions."""
    env = installation.env
    return {
        "api_key": env["E2B_API_KEY"],
        "api_url": env["E2B_API_URL"],
        "sandbox_url": env["E2B_SANDBOX_URL"],
        "retries": 0,
    }


def create(installation: Installation, **arguments: Any) -> Box:
    arguments.setdefault("timeout", 300)
    return Box(installation, Sandbox.create(**arguments, **options(installation)))


@contextmanager
def created(installation: Installation, **arguments: Any) -> Iterator[Box]:
    box = create(installation, **arguments)
    try:
        yield box
    finally:
        box.kill()


@contextmanager
def connection(box: Box, timeout: float = 20) -> Iterator[http.client.HTTPConnection]:
    """A connection to the ingress."""
    ingress = urlsplit(box.installation.env["E2B_SANDBOX_URL"])
    made = http.client.HTTPConnection(ingress.hostname or "", ingress.port, timeout=timeout)
    try:
        yield made
    finally:
        made.close()


def ingress_address(installation: Installation) -> tuple[str, int]:
    parts = urlsplit(installation.env["E2B_SANDBOX_URL"])
    return parts.hostname or "", parts.port or 0


def eventually(check: Callable[[], T], within_s: float = 10.0, what: str = "it") -> T:
    until = time.monotonic() + within_s
    while True:
        found = check()
        if found:
            return found
        assert time.monotonic() < until, f"{what} did not happen within {within_s} s"
        time.sleep(0.05)


def exec_ms(box: Box, count: int = 12) -> float:
    """Median of a command's round trip."""
    times = []
    for _ in range(count):
        since = time.monotonic()
        box.ok("true")
        times.append((time.monotonic() - since) * 1000)
    return statistics.median(times)


def resident_mib(pid: int) -> float:
    """What a process has in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize() / (1 << 20)

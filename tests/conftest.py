"""At the end of a run as root, nothing of it is left on the host: judged from outside, by scripts/host_state.py."""

from __future__ import annotations

import importlib.util
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import hypothesis  # noqa: F401  its plugin imports it at the very end, where CPython 3.11 may fail after a RecursionError
import pytest

MARK = "SESSION_OF_PENSTOCK_TESTS"  # in the environment of every process a test starts
CLAIMS = Path("/run/penstock/claims")
SETTLES_WITHIN_S = 15.0  # killed processes and their namespaces take a moment; so do other runs on this machine


def load_host_state() -> ModuleType:
    path = Path(__file__).parent.parent / "scripts/host_state.py"
    spec = importlib.util.spec_from_file_location("host_state", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Judge:
    """What came since `before` and bears a sign of this run; what other installations do meanwhile is theirs."""

    def __init__(self, folder: str, session: str) -> None:
        self._folder, self._session = folder, session
        self._host = load_host_state()
        self._before = self._host.take()

    def left(self) -> dict[str, list[str]]:
        """Lines by kind. Empty when nothing is left."""
        came = {kind: lines for kind, (lines, _) in self._host.diff(self._before, self._host.take()).items()}
        foreign = self._foreign()
        found = {kind: [line for line in lines if self._is_ours(kind, line, foreign)] for kind, lines in came.items()}
        found["processes"] += self._processes()
        return {kind: lines for kind, lines in found.items() if lines}

    def _is_ours(self, kind: str, line: str, foreign: set[str]) -> bool:
        """By the session's folder in a path, or by a name with Penstock's sign that nobody else claims or lives in."""
        if self._folder in line:
            return True
        signed = "penstock" in line or (kind == "links" and line.startswith("pk"))
        if kind not in ("cgroups", "links", "nft tables") or not signed:
            return False  # a process is found by its environment; namespaces and mounts without our paths live by one
        if any(installation in line for installation in foreign):
            return False
        return kind != "cgroups" or not self._is_inhabited(line)

    def _is_inhabited(self, cgroup: str) -> bool:
        """By somebody: if by us, then that process is what is left."""
        for folder, _, _ in os.walk(f"/sys/fs/cgroup{cgroup}"):
            try:
                if Path(folder, "cgroup.procs").read_bytes():
                    return True
            except OSError:
                continue  # it was removed, or holds threads only
        return False

    def _processes(self) -> list[str]:
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            try:
                words = (entry / "environ").read_bytes() + (entry / "cmdline").read_bytes()
                name = (entry / "comm").read_text().strip()
            except OSError:
                continue  # it has ended
            if self._session.encode() in words or self._folder.encode() in words:
                found.append(f"{entry.name} {name}")
        return found

    def _foreign(self) -> set[str]:
        """Ids of the installations whose folder is not below ours."""
        found = set()
        for claim in CLAIMS.glob("*.json"):
            try:
                told = json.loads(claim.read_text())
            except (OSError, ValueError):
                continue  # it is being given back
            if not str(told["data"]).startswith(self._folder):
                found.add(str(told["installation"]))
        return found


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left_on_the_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    if os.geteuid() != 0 or MARK in os.environ:  # a suite that a test runs is judged with that test
        yield
        return
    session = f"{os.getpid()}-{time.time_ns()}"
    os.environ[MARK] = session
    judge = Judge(str(tmp_path_factory.getbasetemp()), session)
    yield
    until = time.monotonic() + SETTLES_WITHIN_S
    while (left := judge.left()) and time.monotonic() < until:
        time.sleep(0.2)
    del os.environ[MARK]
    if left:
        lines = [f"  {kind}: {line}" for kind, found in left.items() for line in found]
        pytest.fail("left on the host by this run:\n" + "\n".join(lines))

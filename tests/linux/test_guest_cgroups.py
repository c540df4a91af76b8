"""Processes of a guest join the cgroup meant for them, and the guest comes back to its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.unit.guest.house import start_guest

import penstock.guest.main as guest_main

pytestmark = pytest.mark.root

MEMORY = Path("/sys/fs/cgroup/memory")


@pytest.fixture
def cgroup() -> Iterator[Path]:
    if not (MEMORY / "tasks").exists():
        pytest.skip("no v1 memory controller here")
    home = MEMORY / f"penstock-test-{os.getpid()}"
    (home / "user").mkdir(parents=True)
    yield home
    (home / "user").rmdir()
    home.rmdir()


@pytest.mark.parametrize("way_back", [True, False])
def test_children_are_in_the_users_cgroup_and_the_guest_in_its_own(
    tmp_path: Path, cgroup: Path, way_back: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fds = {"user": [os.open(cgroup / "user/tasks", os.O_WRONLY)]}
    if way_back:
        fds["guest"] = [os.open(cgroup / "tasks", os.O_WRONLY)]
    serve = guest_main.serve

    def in_cgroup(*args: object, **options: object) -> None:
        (cgroup / "tasks").write_text("0")
        serve(*args, **(options | {"cgroup_fds": fds}))  # type: ignore[arg-type]

    monkeypatch.setattr(guest_main, "serve", in_cgroup)
    guest = start_guest(tmp_path)
    try:
        running = guest.start("sleep", "100", user="nobody", cwd="/")
        pid = running.pid()
        assert (cgroup / "user/tasks").read_text().split() == [str(pid)]
        assert (cgroup / "tasks").read_text().split() == [str(guest.pid)]
        refused = guest.run("true", cwd="/root/none", user="nobody")
        assert refused.error is not None
        assert (cgroup / "tasks").read_text().split() == [str(guest.pid)]
        status = Path(f"/proc/{guest.pid}/status").read_text()
        assert "Uid:\t0\t0\t0\t0" in status
        assert "Gid:\t0\t0\t0\t0" in status
        child = Path(f"/proc/{pid}/status").read_text()
        assert "Uid:\t65534\t65534\t65534\t65534" in child
        assert "CapPrm:\t0000000000000000" in child
        assert Path(f"/proc/{pid}/oom_score_adj").read_text().strip() == "500"
    finally:
        assert guest.stop() == 0
        for each in fds.values():
            for fd in each:
                os.close(fd)

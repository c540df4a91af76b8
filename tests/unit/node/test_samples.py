"""What is read of a guest's log."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

import pytest

from penstock.core.clock import SystemClock
from penstock.guest.log import Log
from penstock.model.ids import SandboxId
from penstock.model.observed import LogLine
from penstock.node.samples import Samples

BOX = SandboxId("ia")


class At(SystemClock):
    def wall(self) -> float:
        return 1234.5


@pytest.fixture
def log(tmp_path: Path) -> Path:
    (tmp_path / BOX).mkdir()
    return tmp_path / BOX / "guest.log"


def read(log: Path, *, count_max: int = 10) -> list[LogLine]:
    nobody = cast(Any, None)  # of the node: only files are read here
    samples = Samples(
        cgroups=nobody, disks=nobody, clock=At(), living=lambda: (), disk_name=str, run_dirs=str(log.parent.parent)
    )
    return samples.log_lines(BOX, count_max=count_max)


def test_a_line_of_the_guest_has_its_time_its_level_its_event_and_its_facts(log: Path) -> None:
    fd = os.open(log, os.O_WRONLY | os.O_CREAT)
    try:
        Log(fd, At()).say("process started", level="warn", pid=2, cmd="true")
    finally:
        os.close(fd)
    assert read(log) == [
        LogLine(at=1234.5, level="warn", message="process started", fields={"pid": "2", "cmd": "true"})
    ]


def test_a_line_of_something_else_is_shown_as_it_is(log: Path) -> None:
    log.write_bytes(b'Fatal Python error\n[1]\n{"ts": "x", "event": 1}\n')
    assert [line.message for line in read(log)] == ["Fatal Python error", "[1]", '{"ts": "x", "event": 1}']


def test_the_newest_lines_are_kept_and_no_log_is_no_line(log: Path) -> None:
    assert read(log) == []
    log.write_bytes(b"a\nb\nc\n")
    assert [line.message for line in read(log, count_max=2)] == ["b", "c"]

"""Processes of ours: what they write is for root alone."""

from __future__ import annotations

import stat
import sys
from pathlib import Path

from penstock.run import children


async def test_what_a_child_says_and_where_it_listens_is_private(tmp_path: Path):
    pid_file, log = tmp_path / "one.json", tmp_path / "one.log"
    log.touch(mode=0o644)
    told = f"from pathlib import Path; from penstock.run import children; children.announce(Path({str(pid_file)!r}))"
    argv = [sys.executable, "-c", told + "; import time; time.sleep(30)"]
    child = await children.start("one", argv, pid_file=pid_file, log=log)
    children.end(child, term_s=5)
    assert stat.S_IMODE(pid_file.stat().st_mode) == 0o600
    assert stat.S_IMODE(log.stat().st_mode) == 0o600

"""Create and kill while parts of Penstock die: nothing is left. `bench/cycles.py` does the same a thousand times."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench.cycles import Cycles
from tests.installation import Installation

pytestmark = [pytest.mark.root, pytest.mark.timeout(180)]


def test_sixty_cycles_with_faults_leave_nothing(tmp_path: Path) -> None:
    installation = Installation(tmp_path / "data").up()
    try:
        run = Cycles(installation, cycles=60, seed=11, every_s=1.5)
        run.run()
        assert run.left == [], (run.counts, run.left)
        assert run.counts["created"] > 5, run.counts
        assert any(what.startswith("killed") for what in run.counts), run.counts
    finally:
        installation.destroy()

"""Every promise of SPEC.md names a test or a bench that exists, or says that it is pending."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
ROW = re.compile(r"^\| ([A-Z]\d+) \|.*\| ([^|]*) \|$", re.MULTILINE)


def test_every_promise_is_kept_by_something_that_exists() -> None:
    rows = ROW.findall((ROOT / "SPEC.md").read_text())
    assert len(rows) > 10
    broken = []
    for number, keepers in rows:
        names = re.findall(r"`([^`]+)`", keepers)
        if "[pending]" not in keepers and not names:
            broken.append(f"{number}: names neither a test nor a bench, and is not marked [pending]")
        broken += [f"{number}: {name} does not exist" for name in names if not list(ROOT.glob(name))]
    assert not broken, "\n".join(broken)

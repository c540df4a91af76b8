"""Take each promised behaviour away, one at a time, and see that its tests notice: `make rip [ROW=id]`.

Each row of tests/rip/rows.toml names a behaviour, its tests, and one change of the source that undoes it. The change is
made in a copy of the tree; the tests must then fail (not error before they run). Without the change they pass, which
`make test` proves. Exit code 1 when a behaviour can be taken away unnoticed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROWS = ROOT / "tests" / "rip" / "rows.toml"
ROW_S = 90.0
FAILED = 1  # pytest's exit code when tests ran and some failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", help="ids; none: all")
    asked = parser.parse_args()
    rows = [row for row in tomllib.loads(ROWS.read_text())["row"] if not asked.rows or row["id"] in asked.rows]
    if unknown := set(asked.rows) - {row["id"] for row in rows}:
        parser.error(f"no such row: {', '.join(sorted(unknown))}")
    unnoticed = 0
    with tempfile.TemporaryDirectory(prefix="penstock-rip-") as folder:
        copy = Path(folder) / "tree"
        for part in ("src", "tests", "scripts", "bench"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__", "node_modules"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        for row in rows:
            if "why_none" in row:
                print(f"  --   {row['id']}: {row['why_none']}")
                continue
            began = time.monotonic()
            noticed, what = _rip(copy, row)
            unnoticed += not noticed
            print(
                f"{'  ok  ' if noticed else 'NOTHING'} {row['id']}: {what} ({time.monotonic() - began:.0f} s)",
                flush=True,
            )
    print(f"{len(rows)} rows, {unnoticed} could be taken away unnoticed")
    return 1 if unnoticed else 0


def _rip(copy: Path, row: dict[str, object]) -> tuple[bool, str]:
    """Whether one of its tests fails without the behaviour."""
    file = copy / str(row["file"])
    before = file.read_text()
    if before.count(str(row["old"])) != 1:
        return False, f"what to change is {before.count(str(row['old']))} times in {row['file']}"
    file.write_text(before.replace(str(row["old"]), str(row["new"])))
    try:
        tests = row["tests"]
        assert isinstance(tests, list)
        ran = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests],
            cwd=copy,
            env={**os.environ, "PYTHONPATH": str(copy / "src"), "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            timeout=ROW_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return True, f"its tests did not end within {ROW_S:.0f} s"
    finally:
        file.write_text(before)
    if ran.returncode == FAILED:
        failed = [line for line in ran.stdout.splitlines() if line.startswith("FAILED")]
        return True, failed[0].split("::")[-1].split(" - ")[0] if failed else "noticed"
    return (
        False,
        "its tests pass" if ran.returncode == 0 else f"pytest ended with {ran.returncode}: {ran.stdout[-300:]}",
    )


if __name__ == "__main__":
    sys.exit(main())

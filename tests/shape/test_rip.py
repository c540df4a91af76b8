"""The rows of `make rip` name tests that exist and a change that can still be made."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROWS = tomllib.loads((ROOT / "tests" / "rip" / "rows.toml").read_text())["row"]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["id"])
def test_a_row_can_be_ripped(row: dict[str, object]) -> None:
    if "why_none" in row:
        assert "file" not in row
        return
    text = (ROOT / str(row["file"])).read_text()
    assert text.count(str(row["old"])) == 1, f"{row['file']} has changed: look at what takes the behaviour away now"
    ast.parse(text.replace(str(row["old"]), str(row["new"])))
    tests = row["tests"]
    assert isinstance(tests, list)
    for test in tests:
        path, _, name = test.partition("::")
        assert (ROOT / path).is_file(), test
        assert not name or f"def {name}(" in (ROOT / path).read_text(), test


def test_ids_are_unique() -> None:
    assert len({row["id"] for row in ROWS}) == len(ROWS)

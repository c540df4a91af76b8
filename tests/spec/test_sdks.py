"""The real SDKs, unmodified, against a real installation: each in the process and environment a user has it in."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.installation import ROOT, Installation

pytestmark = [pytest.mark.root, pytest.mark.timeout(400)]

SDK = ROOT / "tests/sdk"
OLD_SDK = ROOT / ".venv-e2b-2.45/bin/python"


def suite(installation: Installation, *argv: str | Path, cwd: Path = SDK) -> None:
    """Run a suite as its own process. Its words are shown when it fails."""
    ran = subprocess.run(
        [str(part) for part in argv], env=installation.environ(), cwd=cwd, capture_output=True, text=True, timeout=380
    )
    assert ran.returncode == 0, f"{ran.stdout[-12_000:]}\n{ran.stderr[-4_000:]}"


def pytest_of(python: str | Path, file: str) -> list[str | Path]:
    return [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", SDK, "-c", SDK / "pytest.ini", file]


def test_python_sdk_2_63(installation: Installation):
    suite(installation, *pytest_of(sys.executable, "suite.py"))


def test_python_sdk_2_63_async(installation: Installation):
    suite(installation, *pytest_of(sys.executable, "suite_async.py"))


def test_python_sdk_2_45_which_uses_the_first_version_of_the_endpoints(installation: Installation):
    suite(installation, *pytest_of(OLD_SDK, "suite.py"))


def node_test(installation: Installation, file: str) -> None:
    own = SDK / "js/node_modules/.bin/node"  # where the machine's own is too old, the set-up brought one
    suite(installation, own if own.exists() else "node", "--test", file, cwd=SDK / "js")


def test_javascript_sdk_2_51(installation: Installation):
    node_test(installation, "suite.mjs")


def test_python_sdk_2_63_pauses_resumes_and_snapshots(installation: Installation):
    suite(installation, *pytest_of(sys.executable, "suite_pause.py"))


def test_python_sdk_2_63_async_pauses_resumes_and_snapshots(installation: Installation):
    suite(installation, *pytest_of(sys.executable, "suite_pause_async.py"))


def test_javascript_sdk_2_51_pauses_resumes_and_snapshots(installation: Installation):
    node_test(installation, "suite_pause.mjs")

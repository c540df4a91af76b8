"""A node without a free slot, a host without free disk: new sandboxes are refused clearly, the others go on."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from e2b import Sandbox
from tests.installation import Installation
from tests.sandboxes import Box, create, eventually, options

pytestmark = [pytest.mark.root, pytest.mark.timeout(120)]

MIB = 1 << 20


# ---- the node is full --------------------------------------------------------------------------------------------


def api(installation: Installation, method: str, path: str, body: Any = None) -> httpx.Response:
    return httpx.request(
        method,
        installation.env["E2B_API_URL"] + path,
        headers={"X-API-Key": installation.env["E2B_API_KEY"]},
        json=body,
        timeout=60,
    )


def test_no_free_slot_is_said_with_a_time_to_return(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_SLOTS_MAX", "2")
    small = Installation(tmp_path / "data").up()
    try:
        boxes = [create(small) for _ in range(2)]
        since = time.monotonic()
        refused = api(small, "POST", "/sandboxes", {"templateID": "base"})
        assert time.monotonic() - since < 10  # before any client has given up waiting
        assert (refused.status_code, refused.json()["error_code"]) == (503, "no_free_slot"), refused.text
        assert int(refused.headers["Retry-After"]) >= 1
        assert refused.json()["message"]
        assert all(box.is_well() for box in boxes)
        boxes[0].kill()
        again = eventually(lambda: _created_or_none(small), what="a place for the next")
        assert again.is_well()
        assert boxes[1].is_well()
    finally:
        small.destroy()


def _created_or_none(installation: Installation) -> Box | None:
    made = api(installation, "POST", "/sandboxes", {"templateID": "base", "timeout": 60})
    if made.status_code != 201:
        return None
    return Box(installation, Sandbox.connect(made.json()["sandboxID"], **options(installation)))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 700 MiB of its own, on a loop device."""
    image, point = tmp_path / "image", tmp_path / "point"
    point.mkdir()
    with image.open("wb") as file:
        file.truncate(700 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", str(image)], check=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(point)], check=True)
    yield point
    subprocess.run(["umount", str(point)], check=True)


def test_a_full_disk_on_the_host(small_disk: Path) -> None:
    """What runs goes on, what is new is refused clearly, and space given back is used: nothing needs a restart."""
    tight = Installation(small_disk / "data", ("--config", str(_settings(small_disk)))).up()
    filler = small_disk / "filler"
    try:
        old = create(tight)
        old.ok("echo kept > ~/mark; sync ~/mark")
        brief = create(tight, timeout=3)
        _fill(filler)
        assert old.run("cat ~/mark").out == "kept\n"
        refused = api(tight, "POST", "/sandboxes", {"templateID": "base"})
        for _ in range(12):  # a few prepared ones may still be lent
            if refused.status_code != 201:
                break
            refused = api(tight, "POST", "/sandboxes", {"templateID": "base"})
        assert refused.status_code == 503, refused.text
        assert refused.json()["error_code"] in ("host_disk_full", "store_full"), refused.text
        assert int(refused.headers["Retry-After"]) >= 1
        assert tight.daemon is not None and tight.daemon.poll() is None
        assert old.run("echo alive").out == "alive\n"
        eventually(lambda: brief.pids() == [], what="the end of one whose time is over")
        filler.unlink()
        again = eventually(lambda: _created_or_none(tight), within_s=20, what="a create after space came back")
        assert again.is_well()
        again.kill()
    finally:
        filler.unlink(missing_ok=True)
        tight.destroy()


def _settings(folder: Path) -> Path:
    path = folder / "penstock.toml"
    path.write_text('slots_ready = 2\ndisk_free_min = "16MiB"\n')
    return path


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        for size in (MIB, 4096, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))
        os.fsync(file.fileno())

"""A host whose disk is full: no more sandboxes, and every way to end one works."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tests.filling import MIB, fill
from tests.installation import Installation

pytestmark = [pytest.mark.root, pytest.mark.timeout(180)]


@pytest.fixture
def one(tmp_path: Path) -> Iterator[Installation]:
    """An installation on a file system of its own, of which 64 MiB are to stay free."""
    image, place = tmp_path / "image", tmp_path / "disk"
    place.mkdir()
    with image.open("wb") as file:
        file.truncate(1200 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, place], check=True)
    data = place / "data"
    data.mkdir()
    (data / "penstock.toml").write_text("disk_free_min = '64 MiB'\nslots_ready = 1\n")
    installation = Installation(data)
    try:
        yield installation.up()
    finally:
        installation.destroy()
        subprocess.run(["umount", place], check=True)


def test_sandboxes_are_ended_and_none_is_made_while_the_disk_is_full(one: Installation):
    with httpx.Client(base_url=one.env["E2B_API_URL"], headers={"X-API-Key": one.env["E2B_API_KEY"]}) as api:
        api.timeout = httpx.Timeout(30)
        boxes = [api.post("/v2/sandboxes", json={"templateID": "base", "timeout": 300}).json() for _ in range(3)]
        first, second, _ = (box["sandboxID"] for box in boxes)
        hog = fill(one.data.parent)
        refused = api.post("/v2/sandboxes", json={"templateID": "base"})
        assert (refused.status_code, refused.json()["error_code"]) == (503, "host_disk_full")
        assert int(refused.headers["Retry-After"]) > 0
        assert api.post(f"/sandboxes/{first}/timeout", json={"timeout": 600}).status_code == 204
        assert api.delete(f"/sandboxes/{first}").status_code == 204
        assert api.get(f"/sandboxes/{first}").status_code == 404
        assert api.post(f"/sandboxes/{second}/timeout", json={"timeout": 0}).status_code == 204
        fill(one.data.parent)
        assert one.run("down", "--drain", check=False).returncode == 0
    assert one.leaks().stdout == "no leaks\n"
    hog.unlink()
    one.up()
    assert one.run("sandbox", "create").returncode == 0

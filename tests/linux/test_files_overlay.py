"""Files and watching on an overlay, which is what a sandbox's root is: directories of a layer behave like any other."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.unit.guest.filesroom import open_room

pytestmark = pytest.mark.root


@pytest.fixture
def merged(tmp_path: Path) -> Iterator[Path]:
    for name in ("lower/dir/deep", "upper", "work", "merged"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "lower/dir/deep/f").write_bytes(b"of the layer")
    (tmp_path / "lower/file").write_bytes(b"of the layer")
    options = f"lowerdir={tmp_path}/lower,upperdir={tmp_path}/upper,workdir={tmp_path}/work"
    subprocess.run(["mount", "-t", "overlay", "-o", options, "none", tmp_path / "merged"], check=True)
    yield tmp_path / "merged"
    subprocess.run(["umount", tmp_path / "merged"], check=True)


async def test_a_directory_of_a_layer_can_be_moved(tmp_path: Path, merged: Path) -> None:
    async with open_room(tmp_path) as room:
        with pytest.raises(OSError, match="cross-device"):
            os.rename(merged / "dir", merged / "refused")
        await room.ok("Move", source=f"{merged}/dir", destination=f"{merged}/new/moved")
        assert sorted(os.listdir(merged)) == ["file", "new"]
        assert (merged / "new/moved/deep/f").read_bytes() == b"of the layer"
        await room.ok("Remove", path=f"{merged}/new")
        assert os.listdir(merged) == ["file"]
        assert (tmp_path / "lower/dir/deep/f").exists()


async def test_a_watched_directory_of_a_layer_tells_writes_to_its_files(tmp_path: Path, merged: Path) -> None:
    async with open_room(tmp_path) as room:
        watcher = (await room.ok("CreateWatcher", path=str(merged), recursive=True))["watcherId"]
        await room.upload(f"{merged}/dir/deep/f", b"changed")
        await room.upload(f"{merged}/dir/deep/new", b"x")
        events = await room.events(watcher)
        assert ("dir/deep/f", "WRITE") in events
        assert events[-3:] == [("dir/deep/new", kind) for kind in ("CREATE", "CHMOD", "WRITE")]
        assert (merged / "dir/deep/f").read_bytes() == b"changed"
        assert (tmp_path / "lower/dir/deep/f").read_bytes() == b"of the layer"

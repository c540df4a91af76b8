"""Uploads onto a full file system: 507, nothing half-written left, and room again afterwards."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.unit.guest.filesroom import open_room

pytestmark = pytest.mark.root


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 1 MiB and 20 inodes."""
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,nr_inodes=20", "none", folder], check=True)
    yield folder
    subprocess.run(["umount", folder], check=True)


async def test_no_room_for_bytes_is_507_and_leaves_no_half_file(tmp_path: Path, small: Path) -> None:
    async with open_room(tmp_path) as room:
        answer = await room.upload(f"{small}/big", bytes(4 << 20))
        assert answer.status_code == 507
        assert "not enough disk space" in answer.json()["message"]
        assert os.listdir(small) == []
        assert (await room.upload(f"{small}/fits", bytes(1000))).status_code == 200
        (small / "a").write_bytes(bytes(600_000))
        order = {"source_paths": [f"{small}/a", f"{small}/fits", f"{small}/a"], "destination": f"{small}/joined"}
        assert (await room.client.post("/files/compose", json=order)).status_code == 507
        assert sorted(os.listdir(small)) == ["a", "fits"]


async def test_no_room_for_inodes_is_507(tmp_path: Path, small: Path) -> None:
    async with open_room(tmp_path) as room:
        answers = [(await room.upload(f"{small}/{n}", b"")).status_code for n in range(25)]
        assert answers[0] == 200
        assert answers[-1] == 507
        assert await room.code("MakeDir", path=f"{small}/d") == "resource_exhausted"


async def test_a_move_onto_another_file_system_that_has_no_room_changes_nothing(tmp_path: Path, small: Path) -> None:
    async with open_room(tmp_path) as room:
        (room.home / "tree").mkdir()
        (room.home / "tree/big").write_bytes(bytes(4 << 20))
        (room.home / "file").write_bytes(b"x")
        assert await room.code("Move", source="tree", destination=f"{small}/tree") == "resource_exhausted"
        assert os.listdir(small) == []
        assert (room.home / "tree/big").stat().st_size == 4 << 20
        await room.ok("Move", source="file", destination=f"{small}/file")
        assert (small / "file").read_bytes() == b"x"
        assert not (room.home / "file").exists()

"""Where the folders of sandboxes lie on the disk."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from penstock.node.linux.files import LinuxFiles

pytestmark = pytest.mark.root


def test_each_sandbox_folder_goes_to_another_part_of_an_ext4_disk(tmp_path: Path) -> None:
    image, place = tmp_path / "disk.img", tmp_path / "disk"
    with image.open("wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True, timeout=30)
    place.mkdir()
    subprocess.run(["mount", "-o", "loop", str(image), str(place)], check=True, timeout=30)
    try:
        files = _files(place)
        files.make_run_dir("isandbox")
        flags = subprocess.run(["lsattr", "-d", str(place / "run")], check=True, capture_output=True, text=True).stdout
        assert "T" in flags.split()[0]
    finally:
        subprocess.run(["umount", str(place)], check=True, timeout=30)


def test_a_file_system_without_such_a_flag_does_as_it_likes(tmp_path: Path) -> None:
    place = tmp_path / "memory"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "none", str(place)], check=True, timeout=30)
    try:
        assert Path(_files(place).make_run_dir("isandbox")).is_dir()
    finally:
        subprocess.run(["umount", str(place)], check=True, timeout=30)


def _files(place: Path) -> LinuxFiles:
    for name in ("records", "run"):
        (place / name).mkdir()
    return LinuxFiles(records=str(place / "records"), run=str(place / "run"))

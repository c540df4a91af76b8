"""The data folder: private, ours alone, and a clear word when it cannot be used."""

from __future__ import annotations

import asyncio
import stat

import pytest

from penstock.run import door
from penstock.run.datafolder import DataFolder, FolderInUse, FolderUnusable


def test_it_is_private_whoever_made_it(tmp_path):
    (tmp_path / "data").mkdir(mode=0o755)
    (tmp_path / "data" / "penstock.toml").write_text("")
    folder = DataFolder(str(tmp_path / "data")).open()
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    for name in ("seed", "api-key", "admin-token"):
        assert stat.S_IMODE((folder.path / name).stat().st_mode) == 0o600


def test_opening_again_changes_nothing(tmp_path):
    first = DataFolder(str(tmp_path / "data")).open()
    told = (first.installation, first.seed, first.api_key, first.admin_token)
    second = DataFolder(str(tmp_path / "data")).open()
    assert (second.installation, second.seed, second.api_key, second.admin_token) == told


def test_a_folder_of_others_is_refused_and_left_alone(tmp_path):
    (tmp_path / "data").mkdir(mode=0o755)
    (tmp_path / "data" / "thesis").write_text("mine")
    with pytest.raises(FolderUnusable, match="not a data folder"):
        DataFolder(str(tmp_path / "data")).open()
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["thesis"]
    assert stat.S_IMODE((tmp_path / "data").stat().st_mode) == 0o755


def test_a_file_or_a_newer_format_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FolderUnusable, match="cannot be made"):
        DataFolder(str(tmp_path / "file")).open()
    folder = DataFolder(str(tmp_path / "data")).open()
    (folder.path / "format").write_text("99\n")
    with pytest.raises(FolderUnusable, match="format 99"):
        DataFolder(str(tmp_path / "data")).open()


def test_one_daemon_at_a_time(tmp_path):
    folder = DataFolder(str(tmp_path / "data")).open()
    folder.lock()
    with pytest.raises(FolderInUse, match="pid "):
        DataFolder(str(tmp_path / "data")).lock()
    folder.unlock()
    DataFolder(str(tmp_path / "data")).lock()


async def test_the_door_opens_at_a_path_longer_than_a_socket_address(tmp_path):
    folder = tmp_path / ("long" * 40)
    folder.mkdir()

    async def answer(asked):
        yield {"done": asked["stop"]}

    server = await door.serve(folder / "daemon.sock", answer)
    try:
        lines = await asyncio.to_thread(lambda: list(door.ask(folder / "daemon.sock", {"stop": "keep"}, within_s=5)))
    finally:
        server.close()
    assert lines == [{"done": "keep"}]

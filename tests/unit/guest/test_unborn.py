"""One guest made before the fork, served by each of its forks as its own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import penstock.guest.main as guest_main
from tests.unit.guest.house import start_guest


def test_two_forks_of_one_unborn_guest_are_two_guests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unborn = guest_main.Unborn()
    held = sorted(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(guest_main, "serve", unborn.serve)
    first = start_guest(tmp_path / "a", token="of-the-first", env={"WHO": "first"})
    second = start_guest(tmp_path / "b", token="of-the-second", env={"WHO": "second"})
    try:
        assert first.call("List", {}) == second.call("List", {}) == (200, {"processes": []})
        for guest, name in ((first, b"first"), (second, b"second")):
            assert guest.run("sh", "-c", "printf $WHO", cwd="/").stdout == name
        second.headers["X-Access-Token"] = "of-the-first"
        assert second.call("List", {})[0] == 401
    finally:
        assert (first.stop(), second.stop()) == (0, 0)
    assert not [line for guest in (first, second) for line in guest.log() if line["event"] == "fault"]
    assert sorted(os.listdir("/proc/self/fd")) == held

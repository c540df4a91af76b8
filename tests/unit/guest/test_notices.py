"""What programs of a sandbox are told about a drain: the file with its traps, and the stream."""

from __future__ import annotations

import http.client
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock.guest import notices
from penstock.guest.notices import Notices
from tests.unit.guest.house import RunningGuest, start_guest

SECRET = "not yours"


def notice(epoch: int, **facts: Any) -> dict[str, Any]:
    return {"epoch": epoch, "reason": "an upgrade", "soft_by": 100.0, "hard_by": 200.5} | facts


@pytest.fixture
def told(tmp_path: Path) -> Notices:
    return Notices(str(tmp_path))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "penstock/notice.json"


# ---- the file ---------------------------------------------------------------------------------------------------


def test_the_file_has_the_four_fields_and_everybody_reads_it(told: Notices, file: Path) -> None:
    told.put(1, notice(1))
    assert json.loads(file.read_text()) == {"epoch": 1, "reason": "an upgrade", "soft_by": 100.0, "hard_by": 200.5}
    assert file.stat().st_mode & 0o777 == 0o644
    assert file.parent.stat().st_mode & 0o777 == 0o755
    assert os.listdir(file.parent) == ["notice.json"]


def test_the_folder_is_there_before_any_notice(told: Notices, file: Path) -> None:
    told.make_folder()
    assert os.listdir(file.parent) == []


def test_a_repeated_notice_leaves_the_file_alone(told: Notices, file: Path) -> None:
    told.put(1, notice(1))
    before = file.stat().st_ino
    kept = file.open()  # so that the number is not given away again
    told.put(1, notice(1))
    assert file.stat().st_ino == before
    told.put(1, notice(1, hard_by=300.0))
    assert json.loads(file.read_text())["hard_by"] == 300.0
    assert json.loads(kept.read())["hard_by"] == 200.5, "a reader of the old file reads the old one whole"
    kept.close()


def test_an_older_epoch_is_ignored(told: Notices, file: Path) -> None:
    told.put(3, notice(3))
    told.put(2, notice(2))
    told.put(2, None)
    assert json.loads(file.read_text())["epoch"] == 3


def test_a_withdrawn_notice_does_not_come_back_late(told: Notices, file: Path) -> None:
    told.put(3, notice(3))
    told.put(3, None)
    told.put(3, None)
    told.put(3, notice(3))
    assert not file.exists()
    told.put(4, notice(4))
    assert file.exists()


@pytest.mark.parametrize("name", ["penstock/notice.json", "penstock/.notice.new"])
def test_a_link_in_the_file_s_place_is_not_followed(told: Notices, file: Path, tmp_path: Path, name: str) -> None:
    victim = tmp_path / "victim"
    victim.write_text(SECRET)
    file.parent.mkdir()
    (tmp_path / name).symlink_to(victim)
    told.put(1, notice(1))
    assert victim.read_text() == SECRET
    assert not file.is_symlink() and json.loads(file.read_text())["epoch"] == 1
    told.put(1, None)
    assert victim.read_text() == SECRET


@pytest.mark.parametrize("kind", ["link", "dangling", "pipe", "file"])
def test_what_is_in_the_folder_s_place_gives_way(told: Notices, file: Path, tmp_path: Path, kind: str) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "notice.json").write_text(SECRET)
    match kind:
        case "link":
            file.parent.symlink_to(victim)
        case "dangling":
            file.parent.symlink_to(tmp_path / "nowhere")
        case "pipe":
            os.mkfifo(file.parent)
        case "file":
            file.parent.write_text("")
    told.put(1, notice(1))
    assert (victim / "notice.json").read_text() == SECRET
    assert not file.parent.is_symlink() and json.loads(file.read_text())["epoch"] == 1
    assert not (tmp_path / "nowhere").exists()


def test_a_folder_others_may_write_to_is_made_ours(told: Notices, file: Path) -> None:
    file.parent.mkdir()
    file.parent.chmod(0o777)
    if os.geteuid() == 0:
        os.chown(file.parent, 1000, 1000)
    told.put(1, notice(1))
    assert (file.parent.stat().st_uid, file.parent.stat().st_mode & 0o777) == (os.geteuid(), 0o755)


def test_a_notice_that_could_not_be_filed_is_filed_by_the_next_try(told: Notices, file: Path) -> None:
    file.mkdir(parents=True)
    for _ in range(2):
        with pytest.raises(OSError, match="irectory"):
            told.put(1, notice(1))
    assert os.listdir(file.parent) == ["notice.json"]
    file.rmdir()
    told.put(1, notice(1))
    assert json.loads(file.read_text())["epoch"] == 1


# ---- the routes -------------------------------------------------------------------------------------------------


@pytest.fixture
def guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunningGuest]:
    monkeypatch.setattr(notices, "KEEPALIVE_S", 0.2)
    monkeypatch.setattr(notices, "READERS_MAX", 2)
    running = start_guest(tmp_path / "guest", token="secret")
    try:
        yield running
    finally:
        running.stop()


def tell(guest: RunningGuest, **wish: Any) -> int:
    return guest.request("POST", "/notice", json.dumps(wish).encode(), control=True)[0]


class Listening:
    def __init__(self, guest: RunningGuest) -> None:
        self._connection = guest.connection()
        self._connection.request("GET", "/notices", headers=guest.headers)
        self.response: http.client.HTTPResponse = self._connection.getresponse()

    def line(self) -> dict[str, Any]:
        """The next one that says something."""
        while (line := json.loads(self.response.readline())) == {"event": "keepalive"}:
            pass
        assert isinstance(line, dict)
        return line

    def close(self) -> None:
        self.response.close()
        self._connection.close()


def test_listeners_hear_the_notice_in_force_then_each_change(guest: RunningGuest) -> None:
    early = Listening(guest)
    assert early.response.getheader("content-type") == "application/x-ndjson"
    assert tell(guest, **notice(5)) == 204
    assert early.line() == {"event": "notice"} | notice(5)
    late = Listening(guest)
    assert late.line() == {"event": "notice"} | notice(5)
    assert tell(guest, **notice(5)) == 204
    assert tell(guest, **notice(4)) == 204
    assert tell(guest, **notice(5, soft_by=None)) == 204
    assert tell(guest, epoch=5, withdrawn=True) == 204
    for listening in (early, late):
        heard = [listening.line()]
        if heard[0]["event"] == "notice":  # a reader that was fast enough
            assert heard == [{"event": "notice"} | notice(5, soft_by=None)]
            heard.append(listening.line())
        assert heard[-1] == {"event": "withdrawn", "epoch": 5}
        listening.close()


def test_a_silent_stream_says_that_it_lives(guest: RunningGuest) -> None:
    listening = Listening(guest)
    assert json.loads(listening.response.readline()) == {"event": "keepalive"}
    listening.close()


def test_listeners_are_bounded_and_their_places_come_back(guest: RunningGuest) -> None:
    first, second = Listening(guest), Listening(guest)
    refused = Listening(guest)
    assert refused.response.status == 429
    first.close()
    for _ in range(100):
        again = Listening(guest)
        if again.response.status == 200:
            break
        again.close()
    assert again.response.status == 200
    for each in (again, second, refused):
        each.close()


def test_only_the_daemon_may_tell_and_listeners_need_the_token(guest: RunningGuest) -> None:
    assert guest.request("POST", "/notice", json.dumps(notice(1)).encode())[0] == 404
    assert guest.request("POST", "/quiesce", b'{"within_s": 1}')[0] == 404
    guest.headers.clear()
    assert guest.request("GET", "/notices")[0] == 401


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"[]", b"{", b'{"epoch": -1}', b'{"epoch": true}', b'{"epoch": "1"}', b'{"epoch": 1, "reason": 7}'),
        *(b'{"epoch": 1, "soft_by": "soon"}', b'{"epoch": 1, "hard_by": Infinity}', b'{"epoch": 1, "withdrawn": 1}'),
    ],
)
def test_nonsense_is_refused_and_changes_nothing(guest: RunningGuest, body: bytes) -> None:
    assert guest.request("POST", "/notice", body, control=True)[0] == 400
    assert tell(guest, **notice(0)) == 204
    listening = Listening(guest)
    assert listening.line()["epoch"] == 0
    listening.close()

"""Every way to stop, on the real kernel: what is waited for, who ends the waiting, that nothing is left, the codes."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.installation import PENSTOCK, Installation

from penstock.node import ruleset

pytestmark = [pytest.mark.root, pytest.mark.timeout(180)]
HARD_MARGIN_S = 2.0  # the promise: ended by the hard deadline and this
CREATE = {"templateID": "base", "timeout": 600}


@pytest.fixture
def one(tmp_path: Path) -> Iterator[Installation]:
    installation = Installation(tmp_path / "data")
    yield installation
    installation.destroy()


@pytest.fixture
def drained_within(one: Installation, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Installation]:
    """Brings it up with this bound of a drain, as the variable of other platforms says it."""

    def up(seconds: str) -> Installation:
        monkeypatch.setenv("SHUTDOWN_DRAIN_TIMEOUT", seconds)
        return one.up(on_stop=None)

    return up


def call(one: Installation, method: str, path: str, body: object = None, *, admin: bool = False) -> tuple[int, Any]:
    headers = {"X-API-Key": one.env["E2B_API_KEY"], "Content-Type": "application/json"}
    if admin:
        headers["X-Admin-Token"] = (one.data / "admin-token").read_text().strip()
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(one.env["E2B_API_URL"] + path, method=method, data=data, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, json.loads(reply.read() or b"null")
    except urllib.error.HTTPError as refused:
        return refused.code, json.loads(refused.read() or b"null")


def create(one: Installation) -> str:
    status, body = call(one, "POST", "/sandboxes", CREATE)
    assert status == 201, body
    return str(body["sandboxID"])


def pid_1(one: Installation, sandbox: str) -> int:
    lines = (one.data / "records" / f"{sandbox}.log").read_text().splitlines()
    return next(int(json.loads(line)["pid"]) for line in lines if '"k":"pid"' in line)


def ignores_term(one: Installation, sandbox: str) -> None:
    """From now on its first process is deaf: it neither runs nor can be asked."""
    os.kill(pid_1(one, sandbox), signal.SIGSTOP)


def signalled(one: Installation, number: int = signal.SIGTERM) -> float:
    assert one.daemon is not None
    one.daemon.send_signal(number)
    return time.monotonic()


def ended(one: Installation, within_s: float = 60.0) -> int:
    assert one.daemon is not None
    code = one.daemon.wait(timeout=within_s)
    while one._line(1.0) is not None:
        pass
    return code


def is_draining(one: Installation, within_s: float = 10.0) -> None:
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        one._line(0.1)
        if any(line.startswith("draining") for line in one.output):
            return
    raise AssertionError(one.output)


def left_of(one: Installation) -> list[str]:
    """Of every kind of object that an installation makes, what the kernel shows, by names only it has."""
    installation = (one.data / "installation").read_text().strip()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            told = os.readlink(entry / "fd/1") + (entry / "cgroup").read_text()
        except OSError:
            continue  # it has ended
        if f"{one.data}/run" in told or installation in told:
            found.append(f"process {entry.name} {told}")
    found += [f"mount {line}" for line in Path("/proc/mounts").read_text().splitlines() if str(one.data) in line]
    found += [f"cgroup {path}" for path in Path("/sys/fs/cgroup").glob(f"**/penstock-{installation}*")]
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            file = backing.read_text().strip()
        except OSError:
            continue  # idle
        found += [f"loop {file}"] if str(one.data) in file else []
    links = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout
    found += re.findall(rf"\b{ruleset.host_link(installation)}\b.*", links)
    tables = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=True).stdout
    found += [line for line in tables.splitlines() if installation in line]
    bound = Path("/proc/net/unix").read_text().splitlines()
    found += [f"socket {line}" for line in bound if str(one.data) in line]
    found += [str(path) for path in (one.data / "run").rglob("*") if path.is_socket()]
    found += [str(path) for path in (one.data / "run/sb").iterdir()]
    found += [str(path) for path in (one.data / "records").iterdir()]
    found += [str(path) for path in (one.data / "disks").glob("*.img")]
    return found + [str(path) for path in Path("/run/penstock/claims").glob(f"{installation}.json")]


@pytest.mark.parametrize(("on_stop", "code"), [("drain", 0), ("force", 1)])
def test_nothing_is_left_after_a_graceful_and_after_a_forced_exit(one: Installation, on_stop: str, code: int):
    one.up(on_stop=on_stop)
    sandboxes = [create(one) for _ in range(2)]
    signalled(one)
    assert ended(one) == code, one.output
    told = [line for line in one.output if line.startswith("forced: ")]
    assert len(told) == (len(sandboxes) if code else 0)
    assert left_of(one) == []


def test_a_drain_with_no_sandbox_is_as_fast_as_a_stop_that_keeps_them(one: Installation):
    one.up(on_stop="keep")
    began = signalled(one)
    assert ended(one) == 0
    kept_s = time.monotonic() - began
    one.up(on_stop="drain")
    began = signalled(one)
    assert one.daemon is not None
    one.daemon.wait(timeout=30)
    assert time.monotonic() - began < kept_s + 1.0
    assert ended(one) == 0


def test_without_a_bound_a_drain_waits_as_long_as_one_lives_and_a_second_signal_ends_it(drained_within):
    one = drained_within("0")
    sandbox = create(one)
    signalled(one)
    is_draining(one)
    time.sleep(3.5)
    assert one.daemon.poll() is None
    assert os.path.exists(f"/proc/{pid_1(one, sandbox)}"), "nobody was asked to end"
    again = signalled(one)
    assert ended(one) == 1
    assert time.monotonic() - again < 10
    told = "".join(one.output)
    assert re.search(rf"draining for \d s: 1 sandbox left; {sandbox} [a-z]+: notice given.*nothing is due", told), told
    assert "again: forcing" in told
    assert f"forced: {sandbox}: " in told
    assert left_of(one) == []


def test_a_sandbox_that_leaves_completes_the_drain(drained_within):
    one = drained_within("0")
    sandbox = create(one)
    signalled(one)
    is_draining(one)
    time.sleep(0.5)
    began = time.monotonic()
    assert call(one, "DELETE", f"/sandboxes/{sandbox}")[0] == 204, "a kill is never refused"
    assert ended(one) == 0
    assert time.monotonic() - began < 5
    assert left_of(one) == []


def test_a_create_during_a_stops_drain_is_refused_with_503_and_when_to_come_back(drained_within):
    one = drained_within("0")
    sandbox = create(one)
    signalled(one)
    is_draining(one)
    began = time.monotonic()
    status, body = call(one, "POST", "/sandboxes", CREATE)
    assert (status, time.monotonic() - began < 1.0) == (503, True), body
    assert "the node stops" in body["message"]
    assert call(one, "GET", f"/sandboxes/{sandbox}")[0] == 200
    assert call(one, "DELETE", f"/sandboxes/{sandbox}")[0] == 204
    assert ended(one) == 0


def test_a_force_stop_by_the_api_ends_a_stops_drain(drained_within):
    one = drained_within("0")
    create(one)
    signalled(one)
    is_draining(one)
    began = time.monotonic()
    status, body = call(one, "POST", "/nodes/local", {"status": "draining", "forceStop": True}, admin=True)
    assert status in (202, 204), body
    assert ended(one) == 1
    assert time.monotonic() - began < 10
    assert left_of(one) == []


def test_force_from_the_command_line_joins_a_stops_drain_and_ends_it(drained_within):
    one = drained_within("0")
    create(one)
    signalled(one)
    is_draining(one)
    forced = one.run("down", "--force", check=False)
    assert forced.returncode == 0, forced.stderr
    assert "forced: " in forced.stderr
    assert ended(one) == 1, "asked for by somebody else: to the service that ran it, force is no clean end"
    assert left_of(one) == []


def test_a_sandbox_that_cannot_hear_ends_by_the_deadline(drained_within):
    one = drained_within("3")
    sandbox = create(one)
    ignores_term(one, sandbox)
    began = signalled(one)
    pid = pid_1(one, sandbox)
    while os.path.exists(f"/proc/{pid}"):
        assert time.monotonic() - began < 3 + HARD_MARGIN_S
        time.sleep(0.02)
    assert time.monotonic() - began > 2.5
    assert ended(one) == 1
    assert left_of(one) == []


def test_down_answers_with_the_code_of_the_stop_and_shows_what_it_waits_for(drained_within):
    one = drained_within("3")
    sandbox = create(one)
    ignores_term(one, sandbox)
    ran = one.run("down", "--drain", check=False)
    assert ran.returncode == 1
    assert f"forced: {sandbox}: " in ran.stderr
    assert re.search(r"draining for 1 s: 1 sandbox left", ran.stderr), ran.stderr
    assert ended(one) == 1
    again = one.run("down", "--drain", check=False)
    assert again.returncode == 0, "there is nothing left to force"


def test_several_who_stop_it_at_once_all_learn_how_it_ended(one: Installation):
    one.up(on_stop="drain")
    create(one)
    argv = [PENSTOCK, "down", "--data", str(one.data), "--drain"]
    stopping = [subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    signalled(one)
    said = [each.communicate(timeout=60)[1] for each in stopping]
    assert [each.returncode for each in stopping] == [0, 0, 0], said
    assert left_of(one) == []


def test_a_visitor_who_never_listens_does_not_keep_it_from_stopping(one: Installation):
    one.up(on_stop="drain")
    create(one)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as door:
        folder = os.open(one.data / "run", os.O_PATH)
        try:
            door.connect(f"/proc/self/fd/{folder}/daemon.sock")
        finally:
            os.close(folder)
        door.sendall(b'{"stop": "drain"}\n')
        assert ended(one, within_s=30) == 0
    assert left_of(one) == []


def test_a_drain_tells_readers_first_for_as_long_as_it_was_told_to(drained_within, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DRAIN_PROPAGATION_DELAY", "2")
    one = drained_within("30")
    sandbox = create(one)
    pid = pid_1(one, sandbox)
    began = signalled(one)
    is_draining(one)
    while os.path.exists(f"/proc/{pid}"):
        assert time.monotonic() - began < 10
        time.sleep(0.02)
    assert time.monotonic() - began > 1.9
    assert ended(one) == 0


def test_a_forced_exit_takes_a_start_under_way_along(one: Installation):
    one.up(on_stop="force")
    answers: list[int] = []

    def starts() -> None:
        try:
            answers.append(call(one, "POST", "/sandboxes", CREATE)[0])
        except OSError:
            answers.append(0)  # the API was gone by then

    many = [threading.Thread(target=starts) for _ in range(20)]
    for each in many:
        each.start()
    time.sleep(0.15)
    signalled(one)
    ended(one)
    for each in many:
        each.join(30)
    assert set(answers) <= {201, 503, 0}, answers
    assert left_of(one) == []

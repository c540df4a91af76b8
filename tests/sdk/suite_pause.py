"""Pause, resume and snapshots with the unmodified Python SDK. See suite.py for how to run it."""

from __future__ import annotations

import http.client
import os
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
from e2b import NotFoundException, Sandbox, SandboxException, SandboxQuery, SandboxState

BOOT_ID = "cat /proc/sys/kernel/random/boot_id"


@pytest.fixture
def box() -> Iterator[Sandbox]:
    made = Sandbox.create(timeout=120, envs={"GREETING": "hi"})
    yield made
    made.kill()


def visit(host: str, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
    """One GET of http://<host>/ through the ingress, whatever the machine's resolver knows."""
    ingress = urlsplit(os.environ["E2B_SANDBOX_URL"])
    connection = http.client.HTTPConnection(ingress.hostname or "", ingress.port, timeout=20)
    try:
        connection.request("GET", "/", headers={"Host": host, **(headers or {})})
        reply = connection.getresponse()
        return reply.status, reply.read()
    finally:
        connection.close()


def eventually(check, within_s: float = 10.0):
    until = time.monotonic() + within_s
    while True:
        found = check()
        if found:
            return found
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.05)


def state(made: Sandbox) -> SandboxState:
    return made.get_info().state


def listed(*states: SandboxState) -> list[str]:
    pages = Sandbox.list(query=SandboxQuery(state=list(states)) if states else None)
    found = []
    while pages.has_next:
        found += [item.sandbox_id for item in pages.next_items()]
    return found


def server(made: Sandbox, port: int = 8000) -> str:
    made.files.write("/home/user/site/index.html", "served")
    made.commands.run(f"cd site && python3 -m http.server {port}", background=True)
    host = made.get_host(port)
    eventually(lambda: visit(host)[0] == 200)
    return host


# ---- in memory


def test_a_pause_keeps_id_token_processes_environment_and_boot_id(box: Sandbox):
    boot_id = box.commands.run(BOOT_ID).stdout
    counting = box.commands.run("n=0; while :; do n=$((n+1)); echo $n > /tmp/n; sleep 0.05; done", background=True)
    eventually(lambda: box.files.exists("/tmp/n"))
    token = box._envd_access_token
    assert box.pause() is True
    assert box.is_running() is False
    assert state(box) is SandboxState.PAUSED
    time.sleep(0.5)
    again = Sandbox.connect(box.sandbox_id)
    assert (again.sandbox_id, again._envd_access_token) == (box.sandbox_id, token)
    assert again.is_running()
    assert counting.pid in [process.pid for process in again.commands.list()]
    first = int(again.files.read("/tmp/n"))
    eventually(lambda: int(again.files.read("/tmp/n") or 0) > first)
    assert again.commands.run("echo $GREETING").stdout == "hi\n"
    assert again.commands.run(BOOT_ID).stdout == boot_id


def test_pausing_a_paused_one_is_false_and_of_an_unknown_one_raises(box: Sandbox):
    assert box.pause() is True
    assert box.pause() is False
    assert Sandbox.pause(box.sandbox_id) is False
    with pytest.raises(NotFoundException):
        Sandbox.pause("nonexistentsandbox")


def test_lists_tell_the_paused_from_the_running(box: Sandbox):
    other = Sandbox.create(timeout=60)
    try:
        box.pause()
        assert box.sandbox_id in listed(SandboxState.PAUSED)
        assert box.sandbox_id not in listed(SandboxState.RUNNING)
        assert other.sandbox_id in listed(SandboxState.RUNNING)
        assert other.sandbox_id not in listed(SandboxState.PAUSED)
        assert {box.sandbox_id, other.sandbox_id} <= set(listed())
    finally:
        other.kill()


def test_a_paused_one_is_killed_in_either_form():
    for mode in ("full", "filesystem"):
        made = Sandbox.create(timeout=60)
        made.pause(mode=mode)
        assert made.kill() is True
        assert made.kill() is False
        assert made.sandbox_id not in listed()
        with pytest.raises(NotFoundException):
            Sandbox.connect(made.sandbox_id)


def test_a_server_answers_again_after_connect_and_is_gone_meanwhile(box: Sandbox):
    host = server(box)
    box.pause()
    status, body = visit(host)
    assert (status, b"The sandbox was not found" in body) == (502, True)
    box.connect()
    assert visit(host) == (200, b"served")


def test_it_pauses_by_itself_when_its_time_is_over():
    made = Sandbox.create(timeout=3, lifecycle={"on_timeout": "pause"})
    try:
        assert made.get_info().lifecycle == {"on_timeout": "pause", "auto_resume": False}
        host = server(made)
        made.files.write("mark", "kept")
        time.sleep(3.5)
        assert state(made) is SandboxState.PAUSED
        assert made.is_running() is False
        assert visit(host)[0] == 502, "nobody asked for a resume by traffic"
        made.connect(timeout=60)
        assert made.files.read("mark") == "kept"
        assert visit(host) == (200, b"served")
    finally:
        made.kill()


def test_the_first_request_to_a_port_resumes_it():
    made = Sandbox.create(timeout=4, lifecycle={"on_timeout": "pause", "auto_resume": True})
    try:
        host = server(made)
        eventually(lambda: state(made) is SandboxState.PAUSED, 8)
        time.sleep(0.5)  # called paused as soon as it is ordered, it may still answer for some milliseconds
        assert made.is_running() is False, "asking whether it runs does not wake it"
        assert state(made) is SandboxState.PAUSED
        began = time.monotonic()
        assert visit(host) == (200, b"served")
        assert time.monotonic() - began < 2.0
        assert state(made) is SandboxState.RUNNING
        made.pause()
        assert made.commands.run("echo woken").stdout == "woken\n", "its own SDK wakes it too"
    finally:
        made.kill()


def test_a_wrong_token_does_not_resume_it():
    made = Sandbox.create(
        timeout=60,
        lifecycle={"on_timeout": "pause", "auto_resume": True},
        network={"allow_public_traffic": False},
    )
    try:
        made.pause()
        host = made.get_host(8000)
        for headers in ({}, {"e2b-traffic-access-token": "wrong"}):
            assert visit(host, headers)[0] == 403
        assert visit(made.get_host(49983), {"X-Access-Token": "wrong"})[0] == 403
        assert state(made) is SandboxState.PAUSED
        assert visit(host, {"e2b-traffic-access-token": made.traffic_access_token})[0] == 502  # nobody listens there
        assert state(made) is SandboxState.RUNNING
    finally:
        made.kill()


# ---- to disk


def test_paused_to_disk_files_are_kept_and_it_boots_anew(box: Sandbox):
    boot_id = box.commands.run(BOOT_ID).stdout
    running = box.commands.run("sleep 1000", background=True)
    box.files.write("/home/user/mark", "kept")
    box.commands.run("sudo sh -c 'echo root > /etc/mark'")
    assert box.pause(mode="filesystem") is True
    assert box.pause(mode="filesystem") is False
    assert state(box) is SandboxState.PAUSED
    assert box.is_running() is False
    box.connect(timeout=60)
    assert box.files.read("/home/user/mark") == "kept"
    assert box.files.read("/etc/mark") == "root\n"
    assert box.commands.run(BOOT_ID).stdout != boot_id
    assert running.pid not in [process.pid for process in box.commands.list()]
    assert box.commands.run("echo $GREETING").stdout == "hi\n"


def test_what_is_paused_to_disk_is_not_resumed_by_traffic():
    made = Sandbox.create(timeout=60, lifecycle={"on_timeout": "pause", "auto_resume": True})
    try:
        host = server(made)
        made.pause(mode="filesystem")
        status, body = visit(host)
        assert (status, b"The sandbox was not found" in body) == (502, True)
        assert state(made) is SandboxState.PAUSED
    finally:
        made.kill()


def test_it_pauses_to_disk_by_itself():
    made = Sandbox.create(timeout=3, lifecycle={"on_timeout": {"action": "pause", "mode": "filesystem"}})
    try:
        made.files.write("mark", "kept")
        boot_id = made.commands.run(BOOT_ID).stdout
        time.sleep(4)
        assert state(made) is SandboxState.PAUSED
        made.connect(timeout=60)
        assert made.files.read("mark") == "kept"
        assert made.commands.run(BOOT_ID).stdout != boot_id
    finally:
        made.kill()


def test_a_reboot_of_a_frozen_one(box: Sandbox):
    boot_id = box.commands.run(BOOT_ID).stdout
    box.files.write("mark", "kept")
    box.pause()
    again = Sandbox.connect(box.sandbox_id, on_resume="reboot")
    assert again.files.read("mark") == "kept"
    assert again.commands.run(BOOT_ID).stdout != boot_id


# ---- snapshots


def test_a_snapshot_is_a_copy_that_lives_by_itself(box: Sandbox):
    box.files.write("mark", "first")
    snapshot = box.create_snapshot()
    assert box.is_running()
    box.files.write("mark", "second")
    copies = [Sandbox.create(snapshot.snapshot_id, timeout=60) for _ in range(2)]
    try:
        assert [copy.files.read("mark") for copy in copies] == ["first", "first"]
        copies[0].files.write("mark", "third")
        assert copies[1].files.read("mark") == "first"
        assert box.files.read("mark") == "second"
        assert [each.snapshot_id for each in box.list_snapshots().next_items()] == [snapshot.snapshot_id]
    finally:
        for copy in copies:
            copy.kill()
        assert Sandbox.delete_snapshot(snapshot.snapshot_id) is True
    assert Sandbox.delete_snapshot(snapshot.snapshot_id) is False
    with pytest.raises((NotFoundException, SandboxException)):
        Sandbox.create(snapshot.snapshot_id, timeout=60)


def test_a_snapshot_with_a_name_outlives_its_sandbox():
    name = f"snap-{time.time_ns()}"
    made = Sandbox.create(timeout=60)
    made.files.write("mark", name)
    snapshot = made.create_snapshot(name=name)
    made.kill()
    try:
        assert snapshot.names and snapshot.names[0].endswith(name)
        found = Sandbox.list_snapshots(name=name).next_items()
        assert [each.snapshot_id for each in found] == [snapshot.snapshot_id]
        for template in (name, snapshot.snapshot_id):
            copy = Sandbox.create(template, timeout=60)
            assert copy.files.read("mark") == name
            copy.kill()
    finally:
        assert Sandbox.delete_snapshot(snapshot.snapshot_id) is True
    assert Sandbox.list_snapshots(name=name).next_items() == []


def test_a_fork_says_that_it_is_not_built(box: Sandbox):
    with pytest.raises(SandboxException, match="not built"):
        box.fork()

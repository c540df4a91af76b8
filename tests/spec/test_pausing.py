"""Pausing on a real node: what the host shows, and what survives the daemon, a drain and a kill in the middle."""

from __future__ import annotations

import http.client
import json
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from e2b import Sandbox
from tests.installation import Installation
from tests.sandboxes import Box, create, eventually, options

pytestmark = [pytest.mark.root, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    installation = Installation(tmp_path_factory.mktemp("pausing") / "data").up()
    yield installation
    installation.destroy()


@pytest.fixture
def box(one: Installation) -> Iterator[Box]:
    made = create(one)
    yield made
    end(one, made.id)


def show(one: Installation, sandbox: str) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(one.run("sandbox", "show", sandbox, "--json").stdout)
    return body


def end(one: Installation, sandbox: str) -> bool:
    """At the API's address of now: a daemon that was started again has another."""
    return Sandbox.kill(sandbox, **options(one))


def cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def connect(one: Installation, sandbox: str) -> Sandbox:
    return Sandbox.connect(sandbox, timeout=120, **options(one))


def visit(one: Installation, host: str, timeout_s: float = 40.0) -> tuple[int, bytes]:
    ingress = urlsplit(one.env["E2B_SANDBOX_URL"])
    connection = http.client.HTTPConnection(ingress.hostname or "", ingress.port, timeout=timeout_s)
    try:
        connection.request("GET", "/", headers={"Host": host})
        reply = connection.getresponse()
        return reply.status, reply.read()
    finally:
        connection.close()


def images(one: Installation) -> list[str]:
    return sorted(path.name for path in (one.data / "disks").glob("*/*.img"))


def test_frozen_its_processes_are_there_and_get_no_cpu(one: Installation, box: Box):
    box.sdk.commands.run("while :; do :; done", background=True)
    pids = box.pids()
    busy = eventually(lambda: next((pid for pid in pids if cpu_ticks(pid) > 20), None), what="a busy process")
    box.sdk.pause()
    before = cpu_ticks(busy)
    time.sleep(1.0)
    assert box.pids() == pids
    assert cpu_ticks(busy) == before
    box.sdk.connect()
    eventually(lambda: cpu_ticks(busy) > before + 20, what="the busy process going on")


def test_what_it_can_do_and_what_is_safe_is_told(one: Installation, box: Box):
    told = show(one, box.id)
    assert {"pause-memory-on-node", "pause-filesystem", "checkpoint-filesystem"} <= set(told["capabilities"])
    box.sdk.files.write("mark", "x")
    written = time.time()
    box.sdk.pause()
    assert told.get("durableUpTo") is None
    durable = show(one, box.id)["durableUpTo"]
    assert durable > time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(written - 1))


def test_a_frozen_one_outlives_the_daemon_by_kill_9(one: Installation, box: Box):
    box.sdk.files.write("mark", "kept")
    pids = box.pids()
    box.sdk.pause()
    one.kill()
    one.up()
    assert show(one, box.id)["state"] == "paused"
    assert Sandbox.pause(box.id, **options(one)) is False
    again = connect(one, box.id)
    assert again.files.read("mark") == "kept"
    assert box.pids() == pids


def test_one_on_disk_takes_nothing_else_and_outlives_everything(one: Installation):
    box = create(one)
    box.sdk.files.write("mark", "kept")
    box.sdk.pause(mode="filesystem")
    assert box.pids() == []
    assert len(images(one)) == 1
    one.stop()  # drains
    one.up()
    assert show(one, box.id)["pauseMode"] == "filesystem"
    again = connect(one, box.id)
    assert again.files.read("mark") == "kept"
    eventually(lambda: images(one) == [], what="the image being dropped")
    again.pause(mode="filesystem")
    assert len(images(one)) == 1
    assert end(one, box.id) is True
    eventually(lambda: images(one) == [], what="the image going with its sandbox")


def test_a_drained_node_resumes_nothing_from_disk_and_loses_nothing(one: Installation):
    box = create(one)
    box.sdk.files.write("mark", "kept")
    box.sdk.pause(mode="filesystem")
    one.run("node", "drain", "local", "--yes", "--json", stdin=subprocess.DEVNULL)
    try:
        ran = one.run("sandbox", "resume", box.id, check=False)
        assert (ran.returncode, "drains" in ran.stderr) == (7, True), ran.stderr
        assert show(one, box.id)["state"] == "paused"
    finally:
        one.run("node", "undrain", "local")
    assert connect(one, box.id).files.read("mark") == "kept"
    box.kill()


def test_what_a_drain_parked_is_resumed_by_connect(one: Installation, box: Box):
    box.sdk.files.write("mark", "kept")
    one.run("node", "drain", "local", "--park", "--soft", "0", "--yes", "--json", check=False, stdin=subprocess.DEVNULL)
    eventually(lambda: show(one, box.id).get("pauseMode") == "filesystem", what="a pause to disk")
    one.run("node", "undrain", "local")
    assert connect(one, box.id).files.read("mark") == "kept"


def test_a_request_held_over_the_death_of_the_daemon_is_answered(one: Installation):
    box = create(one, lifecycle={"on_timeout": "pause", "auto_resume": True})
    try:
        box.sdk.files.write("index.html", "served")
        box.sdk.commands.run("python3 -m http.server 8000", background=True)
        host = box.sdk.get_host(8000)
        eventually(lambda: visit(one, host)[0] == 200, what="the server")
        box.sdk.pause()
        one.kill()
        answers: list[tuple[int, bytes]] = []
        asking = threading.Thread(target=lambda: answers.append(visit(one, host)))
        asking.start()
        one.up()
        asking.join(45)
        assert answers == [(200, b"served")]
    finally:
        end(one, box.id)


def test_the_whole_story_is_in_the_log(one: Installation, box: Box):
    box.sdk.pause()
    box.sdk.connect()
    box.sdk.pause(mode="filesystem")
    box.sdk.connect()
    told = one.run("why", box.id).stdout
    for words in ("pause_ordered", "resume_ordered", "park_ordered", "parked"):
        assert words in told, told


def test_the_command_line(one: Installation):
    box = one.run("sandbox", "create", "--pause", "--auto-resume").stdout.strip()
    assert one.run("sandbox", "pause", box).stdout == f"{box}\n"
    assert one.run("sandbox", "pause", box, check=False).returncode == 5
    assert "paused" in one.run("sandbox", "list").stdout
    assert json.loads(one.run("sandbox", "resume", box, "--json").stdout) == {"sandboxID": box, "resumed": True}
    assert json.loads(one.run("sandbox", "resume", box, "--json").stdout) == {"sandboxID": box, "resumed": False}
    one.run("sandbox", "exec", box, "--", "sh", "-c", "echo kept > ~/mark", stdin=subprocess.DEVNULL)
    snapshot = one.run("sandbox", "snapshot", box, "--name", "mine").stdout.strip()
    assert snapshot == "default/mine:default"
    assert [row["sandboxID"] for row in json.loads(one.run("snapshot", "list", "--json").stdout)] == [box]
    assert one.run("snapshot", "list", "--name", "mine").stdout.splitlines()[1].split("\t")[:2] == [snapshot, box]
    copy = one.run("sandbox", "create", "mine").stdout.strip()
    read = one.run("sandbox", "exec", copy, "--", "sh", "-c", "cat ~/mark", stdin=subprocess.DEVNULL)
    assert read.stdout == "kept\n"
    assert one.run("snapshot", "delete", snapshot).stdout == f"{snapshot}\n"
    assert one.run("snapshot", "delete", snapshot, check=False).returncode == 4
    assert json.loads(one.run("sandbox", "pause", box, "--to-disk", "--json").stdout) == {
        "paused": [box],
        "memory": False,
    }
    one.run("sandbox", "kill", box, copy)
    assert one.run("sandbox", "create", "--auto-resume", check=False).returncode == 2
    assert images(one) == []


@pytest.mark.parametrize("number", range(6))
def test_a_pause_and_a_kill_at_once_leave_nothing(one: Installation, number: int):
    box = create(one)
    mode = "filesystem" if number % 2 else "full"
    pausing = threading.Thread(target=lambda: _ignoring(lambda: box.sdk.pause(mode=mode)))
    pausing.start()
    time.sleep(0.004 * number)
    box.kill()
    pausing.join()
    eventually(lambda: box.pids() == [], what="its processes going")
    eventually(lambda: one.run("sandbox", "show", box.id, check=False).returncode == 4, what="it going")
    eventually(lambda: images(one) == [], what="every image going")


def _ignoring(doing: Any) -> None:
    try:
        doing()
    except Exception:
        pass  # it was killed meanwhile

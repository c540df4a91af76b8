"""A machine taken out of service, as an operator does it: plan, watch, deadlines, force, undo, on a real node."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.installation import PENSTOCK, Installation

pytestmark = [pytest.mark.root, pytest.mark.timeout(300)]
SEEN_S = 0.5  # from the acknowledgement to a create that is refused; the promise, with a loaded machine's margin
HARD_MARGIN_S = 2.0  # the promise: ended by the hard deadline and this


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    installation = Installation(tmp_path_factory.mktemp("nodes") / "data").up()
    yield installation
    installation.destroy()


@pytest.fixture(autouse=True)
def in_service(one: Installation) -> Iterator[None]:
    """Each test finds the node healthy and empty, and leaves it so."""
    yield
    one.run("node", "undrain", "local", check=False)
    for sandbox in json.loads(one.run("sandbox", "list", "--json").stdout):
        one.run("sandbox", "kill", sandbox["sandboxID"], check=False)


def create(one: Installation) -> str:
    return one.run("sandbox", "create").stdout.strip()


def node(one: Installation) -> dict[str, Any]:
    shown: dict[str, Any] = json.loads(one.run("node", "show", "local", "--json").stdout)
    return shown


def plan(one: Installation, *options: str) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(one.run("node", "drain", "local", "--plan", "--json", *options).stdout)
    return made


def drain(one: Installation, *options: str, code: int = 0) -> dict[str, Any]:
    """Its receipt."""
    ran = one.run("node", "drain", "local", "--json", *options, check=False, stdin=subprocess.DEVNULL)
    assert ran.returncode == code, ran.stdout + ran.stderr
    receipt: dict[str, Any] = json.loads(ran.stdout)
    return receipt


def fates(receipt: dict[str, Any]) -> dict[str, str]:
    return {each["sandboxID"]: each["fate"] for each in receipt["outcomes"]}


def foreseen(made: dict[str, Any]) -> dict[str, str]:
    return {each["sandboxID"]: each["fate"] for each in made["foreseen"]}


def first_process(one: Installation, sandbox: str) -> int:
    """Pid 1 of the sandbox, on the host."""
    installation = (one.data / "installation").read_text().strip()
    found = list(Path("/sys/fs/cgroup").glob(f"**/penstock-{installation}/sb-{sandbox}"))
    pids = {int(pid) for cgroup in found for path in cgroup.rglob("cgroup.procs") for pid in path.read_text().split()}
    for pid in pids:
        status = Path(f"/proc/{pid}/status").read_text()
        if any(line.startswith("NSpid:") and line.split()[2:] == ["1"] for line in status.splitlines()):
            return pid
    raise AssertionError(f"no first process of {sandbox} in {found}")


def call(one: Installation, method: str, path: str, body: object = None) -> tuple[int, Any]:
    token = (one.data / "admin-token").read_text().strip()
    request = urllib.request.Request(
        one.env["E2B_API_URL"] + path,
        method=method,
        data=None if body is None else json.dumps(body).encode(),
        headers={"X-Admin-Token": token, "Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=40) as reply:
            return reply.status, json.loads(reply.read() or b"null")
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read() or b"null")


def test_the_fates_of_a_drain_are_those_that_were_foreseen(one):
    living, short = create(one), one.run("sandbox", "create", "--timeout", "2").stdout.strip()
    made = plan(one, "--soft", "4", "--hard", "20")
    assert foreseen(made) == {living: "stop", short: "finish"}
    assert made["foreseen"][0]["loses"] or made["foreseen"][1]["loses"]
    began = time.monotonic()
    receipt = drain(one, "--digest", made["digest"], "--soft", "4", "--hard", "20", "--reason", "kernel")
    assert 3.5 < time.monotonic() - began < 15, "it waited for the soft deadline, and not for the hard one"
    assert fates(receipt) == {living: "stop", short: "finish"}
    assert (receipt["stage"], receipt["succeeded"], receipt["quarantined"]) == ("ended", True, 0)
    told = one.run("node", "list").stdout
    assert "draining" in told
    assert "drains (kernel)" in told


def test_nothing_starts_on_a_draining_node_and_undrain_puts_it_back(one):
    living = create(one)
    drain(one, "--yes", "--no-watch", "--reason", "a look")
    time.sleep(SEEN_S)
    status, body = call(one, "POST", "/v2/sandboxes", {"templateID": "base", "timeout": 60})
    assert status == 503, body
    assert one.run("sandbox", "exec", living, "--", "echo", "still here").stdout == "still here\n"
    assert node(one)["drain"]["stage"] == "live"
    status, body = call(one, "POST", "/nodes/local", {"status": "ready"})
    assert status == 409
    assert "undrain" in body["message"]
    before = node(one)["epoch"]
    undone = json.loads(one.run("node", "undrain", "local", "--json").stdout)
    assert (undone["epoch"], undone["done"], undone["spared"]) == (before + 1, [], [living])
    other = create(one)
    assert one.run("sandbox", "exec", living, "--", "echo", "spared").stdout == "spared\n"
    one.run("sandbox", "kill", living, other)


def test_the_world_moves_after_the_plan_and_the_order_is_refused(one):
    made = plan(one, "--hard", "60")
    create(one)
    ran = one.run("node", "drain", "local", "--digest", made["digest"], "--hard", "60", check=False)
    assert ran.returncode == 5
    assert node(one)["drain"] is None


def test_a_deaf_sandbox_is_killed_at_the_hard_deadline(one):
    deaf = create(one)
    os.kill(first_process(one, deaf), signal.SIGSTOP)
    began = time.monotonic()
    receipt = drain(one, "--yes", "--soft", "1", "--hard", "3")
    assert 2.5 < time.monotonic() - began < 3 + HARD_MARGIN_S + 1.5, "with the start of a command"
    assert fates(receipt) == {deaf: "force"}
    assert receipt["succeeded"] is True


def test_a_frozen_sandbox_is_ended_too(one):
    frozen = create(one)
    installation = (one.data / "installation").read_text().strip()
    for cgroup in Path("/sys/fs/cgroup").glob(f"**/penstock-{installation}/sb-{frozen}"):
        for name, word in (("cgroup.freeze", "1"), ("freezer.state", "FROZEN")):
            if (cgroup / name).exists():
                (cgroup / name).write_text(word)
    receipt = drain(one, "--yes", "--soft", "0", "--hard", "2")
    assert fates(receipt) == {frozen: "force"}
    assert receipt["succeeded"] is True


def test_sandboxes_are_parked_when_the_order_says_so(one):
    living = create(one)
    options = ("--park", "--soft", "0", "--hard", "30")
    made = plan(one, *options)
    assert [(each["fate"], each["loses"]) for each in made["foreseen"]] == [("park", "memory and processes")]
    receipt = drain(one, "--digest", made["digest"], *options)
    assert fates(receipt) == {living: "park"}
    undone = json.loads(one.run("node", "undrain", "local", "--json").stdout)
    assert [(each["sandboxID"], each["fate"]) for each in undone["done"]] == [(living, "park")]


def test_a_drain_without_deadlines_is_watched_extended_and_forced_by_others(one):
    living = create(one)
    watching = subprocess.Popen(
        [PENSTOCK, "node", "drain", "local", "--yes", "--hard", "120"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=one.environ(),
    )
    try:
        until = time.monotonic() + 20
        while node(one)["drain"] is None:
            assert time.monotonic() < until
            time.sleep(0.1)
        hard_at = node(one)["drain"]["hardAt"]
        one.run("node", "drain", "local", "--extend", "10m", "--no-watch")
        assert node(one)["drain"]["hardAt"] > hard_at
        assert watching.poll() is None
        status, body = call(one, "POST", "/nodes/local", {"status": "draining", "forceStop": True})
        assert (status, body) == (204, None)
        out, err = watching.communicate(timeout=20)
    finally:
        watching.kill()
        watching.communicate()
    assert watching.returncode == 0, err
    assert f"{living}\tforce" in out
    assert "succeeded" in err
    assert node(one)["sandboxCount"] == 0


def test_ctrl_c_leaves_the_drain_going(one):
    living = create(one)
    watching = subprocess.Popen(
        [PENSTOCK, "node", "drain", "local", "--yes"],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=one.environ(),
    )
    try:
        assert watching.stderr is not None
        assert "live" in watching.stderr.readline()
        watching.send_signal(signal.SIGINT)
        _, err = watching.communicate(timeout=20)
    finally:
        watching.kill()
    assert watching.returncode == 130
    assert "penstock node undrain local" in err
    assert node(one)["drain"]["stage"] == "live"
    assert one.run("sandbox", "exec", living, "--", "true").returncode == 0


def test_a_drain_survives_the_daemon_and_so_does_its_watcher(one):
    living = create(one)
    watching = subprocess.Popen(
        [PENSTOCK, "node", "drain", "local", "--yes", "--json"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=one.environ(),
    )
    try:
        assert watching.stderr is not None
        assert "live" in watching.stderr.readline()
        api = one.env["E2B_API_URL"].removeprefix("http://")
        one.kill()
        one.options = ("--api", api)
        one.up()
        assert node(one)["drain"]["stage"] == "live"
        one.run("sandbox", "kill", living)
        out, err = watching.communicate(timeout=30)
    finally:
        watching.kill()
    assert watching.returncode == 0, err
    assert fates(json.loads(out)) == {living: "finish"}

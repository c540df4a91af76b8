"""Why: what happened to a sandbox, told after it is gone, live, and as the store was at a revision."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from tests.installation import PENSTOCK, Installation

pytestmark = [pytest.mark.root, pytest.mark.timeout(300)]

SECRET = "hunter2-in-the-environment"


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    installation = Installation(tmp_path_factory.mktemp("why") / "data").up(on_stop="keep")
    yield installation
    installation.destroy()


class Follower:
    """`penstock events --follow --json`, read by a thread."""

    def __init__(self, one: Installation, *options: str) -> None:
        argv = [PENSTOCK, "events", "--follow", "--json", *options]
        self.process = subprocess.Popen(
            argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=one.environ()
        )
        self.seen: list[dict[str, Any]] = []
        self.errors = ""
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.seen.append(json.loads(line))

    def kinds(self, subject: str) -> list[str]:
        return [event["kind"] for event in self.seen if event["subject"] == subject]

    def until(self, subject: str, kind: str, within_s: float = 20.0) -> None:
        until = time.monotonic() + within_s
        while kind not in self.kinds(subject):
            assert time.monotonic() < until, f"no {kind}; seen: {self.kinds(subject)}"
            assert self.process.poll() is None, self.process.stderr.read() if self.process.stderr else ""
            time.sleep(0.05)

    def close(self) -> None:
        self.process.send_signal(signal.SIGINT)
        self.process.wait(10)


@pytest.fixture
def follower(one: Installation) -> Iterator[Follower]:
    made = Follower(one, "--since", "1h")
    made.until("local", "daemon.started")
    yield made
    made.close()


def kinds(lines: str) -> list[str]:
    return [line.split("  ")[2].split(":")[0].split(" ")[0] for line in lines.splitlines() if "Z  " in line]


def test_the_chain_of_a_sandbox_is_told_after_it_is_gone_and_was_seen_live(
    one: Installation, follower: Follower
) -> None:
    box = one.run("sandbox", "create", "--env", f"PASSWORD={SECRET}").stdout.strip()
    follower.until(box, "sandbox.ready")
    alive = json.loads(one.run("state", "--prefix", f"sandbox/spec/{box}", "--json").stdout)
    one.run("sandbox", "kill", box)
    follower.until(box, "sandbox.ended")
    told = one.run("why", box).stdout
    chain = ["sandbox.created", "sandbox.bound", "sandbox.ready", "sandbox.stop_ordered", "sandbox.killed"]
    assert kinds(told) == [*chain, "sandbox.ended"]
    assert kinds(told) == follower.kinds(box)
    assert "stopped by key " in told
    assert "(by control)" in told
    assert "is the fullest with room" in told
    then = json.loads(one.run("state", "--at", str(alive["revision"]), "--json").stdout)["records"]
    assert [record["value"]["env"] for record in then if record["key"] == f"sandbox/spec/{box}"] == [
        {"PASSWORD": "(hidden)"}
    ]
    everything = told + json.dumps(follower.seen) + json.dumps(then) + one.run("events", "--json").stdout
    for secret in (SECRET, one.env["E2B_API_KEY"], (one.data / "admin-token").read_text().strip()):
        assert secret not in everything


def test_a_first_process_that_dies_is_told_with_how_it_ended(one: Installation, follower: Follower) -> None:
    box = one.run("sandbox", "create").stdout.strip()
    status = json.loads(one.run("why", box, "--json").stdout)["present"][f"sandbox/status/{box}"]
    subprocess.run(["kill", "-9", str(status["pid"])], check=True)
    follower.until(box, "sandbox.ended")
    (died,) = [event for event in follower.seen if event["subject"] == box and event["kind"] == "sandbox.died"]
    assert "first process ended" in died["because"]
    assert died["facts"]["reason"] == "crashed"


def test_a_follower_and_the_chain_go_on_over_kill_minus_9_of_the_daemon(one: Installation, follower: Follower) -> None:
    box = one.run("sandbox", "create").stdout.strip()
    follower.until(box, "sandbox.ready")
    before = dict(one.env)
    one.kill()
    refused = one.run("why", box, check=False)
    assert refused.returncode == 7, refused.stderr
    assert "is the daemon running?" in refused.stderr
    one.options = ("--api", before["E2B_API_URL"].removeprefix("http://"))
    one.up(on_stop="keep")
    follower.until(box, "sandbox.adopted")
    assert "the one before ended without a word" in one.run("why", "local").stdout
    one.run("sandbox", "kill", box)
    follower.until(box, "sandbox.ended")
    seen = follower.kinds(box)
    assert len(seen) == len(set(seen)), f"a line came twice: {seen}"
    assert kinds(one.run("why", box).stdout) == seen


def test_lines_are_found_by_time_kind_and_revision(one: Installation) -> None:
    box = one.run("sandbox", "create").stdout.strip()
    told = json.loads(one.run("events", "--since", "10m", "--subject", box, "--json").stdout)["events"]
    assert told[0]["kind"] == "sandbox.created"
    after = one.run("events", "--since", str(told[0]["revision"]), "--kind", "sandbox", "--subject", box).stdout
    assert kinds(after) == [event["kind"] for event in told[1:]]
    one.run("sandbox", "kill", box)


def test_what_is_not_known_and_what_is_not_kept_is_an_error_never_an_empty_answer(one: Installation) -> None:
    unknown = one.run("why", "inosuch00000000000000", check=False)
    assert (unknown.returncode, unknown.stdout) == (4, "")
    assert "nothing is known of" in unknown.stderr
    beyond = one.run("state", "--at", "999999999", check=False)
    assert (beyond.returncode, beyond.stdout) == (2, "")


def test_a_daemon_that_is_not_there_is_said_clearly(tmp_path: Any, one: Installation) -> None:
    for verb in (["why", "ia"], ["events"], ["events", "--follow"], ["state"]):
        ran = subprocess.run(
            [PENSTOCK, *verb, "--data", str(tmp_path)], capture_output=True, text=True, timeout=60, env=one.environ()
        )
        assert (ran.returncode, ran.stdout) == (7, "")
        assert f"start one with: penstock up --data {tmp_path}" in ran.stderr

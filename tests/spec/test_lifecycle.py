"""The installation's own life: keep, take over, stop from outside, die and be cleared, two side by side."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.installation import Installation

from penstock.run.children import start_ticks

pytestmark = [pytest.mark.root, pytest.mark.timeout(300)]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Installation]]:
    made: list[Installation] = []

    def one(name: str = "data", *options: str) -> Installation:
        made.append(Installation(tmp_path / name, options))
        return made[-1]

    yield one
    for installation in made:
        installation.destroy()


def create(installation: Installation) -> str:
    return installation.run("sandbox", "create").stdout.strip()


def execute(installation: Installation, sandbox: str, *argv: str) -> str:
    return installation.run("sandbox", "exec", sandbox, "--", *argv).stdout


def pid_of(installation: Installation, name: str) -> int:
    return int(json.loads((installation.data / "run" / f"{name}.json").read_text())["pid"])


def test_keep_leaves_sandboxes_running_and_the_next_daemon_takes_them_over(make):
    one = make().up(on_stop="keep")
    sandbox = create(one)
    boot_id = execute(one, sandbox, "cat", "/proc/sys/kernel/random/boot_id")
    zygote, ingress = pid_of(one, "zygote"), pid_of(one, "ingress")
    assert one.stop() == 0
    assert "go on running" in one.output[-1]
    assert Path(f"/proc/{zygote}").exists()
    assert Path(f"/proc/{ingress}").exists()
    one.options = ("--ingress", "127.0.0.1:1")
    one.up(on_stop="keep")
    assert any("ingress stays on" in line and "127.0.0.1:1:" in line for line in one.output)
    assert (pid_of(one, "zygote"), pid_of(one, "ingress")) == (zygote, ingress)
    assert execute(one, sandbox, "cat", "/proc/sys/kernel/random/boot_id") == boot_id
    assert one.run("sandbox", "kill", sandbox).stdout.strip() == sandbox


def test_a_command_runs_on_while_the_daemon_is_killed_and_replaced(make):
    one = make().up()
    sandbox = create(one)
    lines: list[str] = []

    def watch() -> None:
        script = "for n in $(seq 1 60); do echo $n; sleep 0.1; done"
        lines.extend(execute(one, sandbox, "bash", "-c", script).split())

    runner = threading.Thread(target=watch)
    runner.start()
    time.sleep(1.5)
    one.kill()
    one.up()
    runner.join(30)
    assert lines == [str(n) for n in range(1, 61)]
    assert sandbox in one.run("sandbox", "list").stdout


def test_a_sandbox_expires_by_the_node_also_after_the_daemon_was_dead(make):
    one = make().up()
    sandbox = one.run("sandbox", "create", "--timeout", "2s").stdout.strip()
    one.kill()
    time.sleep(2.5)
    one.up()
    until = time.monotonic() + 5
    while sandbox in one.run("sandbox", "list").stdout:
        assert time.monotonic() < until, "it outlived its time"
        time.sleep(0.1)


def test_a_second_daemon_on_the_same_folder_is_refused_by_name_of_the_first(make):
    one = make().up()
    refused = one.run("up", "--api", "127.0.0.1:0", "--ingress", "127.0.0.1:0", check=False)
    assert refused.returncode != 0
    assert f"pid {one.daemon.pid}" in refused.stderr
    assert one.run("env", "--data", str(one.data)).stdout, "the first is no longer found"
    create(one)


@pytest.mark.parametrize("mode", ["--drain", "--force", "--keep"])
def test_down_stops_it_from_outside_and_waits(make, mode: str):
    one = make().up()
    sandbox = create(one)
    ran = one.run("down", mode)
    assert ran.returncode == 0, ran.stderr
    assert one.daemon.wait(timeout=5) == (1 if mode == "--force" else 0), "a sandbox was forced: no clean end"
    gone = not (Path("/sys/fs/cgroup/pids") / f"penstock-{(one.data / 'installation').read_text().strip()}").exists()
    assert gone is (mode != "--keep")
    assert sandbox


def test_down_clears_what_a_killed_daemon_left(make):
    one = make().up()
    create(one)
    one.kill()
    assert one.run("down", "--force").returncode == 0
    left = one.leaks()
    assert left.returncode == 0, left.stdout
    assert not (one.data / "run" / "zygote.json").exists()


def test_two_installations_side_by_side_one_killed_and_swept_the_other_untouched(make):
    one, two = make("one").up(), make("two").up()
    ours, theirs = create(one), create(two)
    assert execute(two, theirs, "bash", "-c", "echo kept > /tmp/mark; cat /tmp/mark") == "kept\n"
    one.kill()
    os.kill(pid_of(one, "zygote"), signal.SIGKILL)
    assert one.run("down", "--force").returncode == 0
    assert execute(two, theirs, "cat", "/tmp/mark") == "kept\n"
    assert two.leaks().returncode == 0
    assert one.leaks().returncode == 0
    assert ours not in two.run("sandbox", "list").stdout


def test_a_killed_zygote_is_replaced_and_running_sandboxes_do_not_notice(make):
    one = make().up()
    sandbox = create(one)
    os.kill(pid_of(one, "zygote"), signal.SIGKILL)
    assert execute(one, sandbox, "echo", "here") == "here\n"
    until = time.monotonic() + 15
    while one.run("sandbox", "create", check=False).returncode != 0:
        assert time.monotonic() < until, "no sandbox could be created any more"
        time.sleep(0.2)


def test_a_killed_ingress_is_replaced(make):
    one = make().up()
    sandbox = create(one)
    os.kill(pid_of(one, "ingress"), signal.SIGKILL)
    until = time.monotonic() + 15
    while one.run("sandbox", "exec", sandbox, "--", "true", check=False).returncode != 0:
        assert time.monotonic() < until, "the ingress did not come back"
        time.sleep(0.2)


def test_env_prints_what_up_printed(make):
    one = make().up()
    printed = dict(line.removeprefix("export ").split("=", 1) for line in one.run("env").stdout.split("\n") if line)
    assert printed == one.env
    assert one.env["E2B_API_KEY"].startswith("e2b_")
    assert len(one.env["E2B_API_KEY"]) == 44


def test_an_upgrade_replaces_the_zygote_and_names_the_ingress_and_sandboxes_run_on(make):
    one = make().up(on_stop="keep")
    sandbox = create(one)
    zygote, ingress = pid_of(one, "zygote"), pid_of(one, "ingress")
    assert one.stop() == 0
    for name in ("zygote", "ingress"):
        file = one.data / "run" / f"{name}.json"
        told = json.loads(file.read_text())
        assert told.pop("sources")
        file.write_text(json.dumps(told))  # as a version wrote it that did not name its sources
    one.up(on_stop="keep")
    assert any(f"replacing the running zygote, pid {zygote}" in line for line in one.output)
    assert start_ticks(zygote) == 0
    assert any(f"pid {ingress} (of another version" in line for line in one.output)
    assert pid_of(one, "ingress") == ingress
    assert execute(one, sandbox, "echo", "here") == "here\n"
    assert execute(one, create(one), "echo", "new") == "new\n"
    assert one.stop() == 0
    said = len(one.output)
    one.up(on_stop="keep")
    assert not any("replacing" in line for line in one.output[said:])

"""`penstock leaks` names what was planted, by kind, from kernel state: with the daemon alive and with it dead."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.installation import Installation

pytestmark = [pytest.mark.root, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Installation, str, str]]:
    """An installation, its id, and a running sandbox in it."""
    one = Installation(Path(tmp_path_factory.mktemp("leaks")) / "data").up()
    sandbox = one.run("sandbox", "create").stdout.strip()
    assert one.leaks().returncode == 0
    yield one, (one.data / "installation").read_text().strip(), sandbox
    one.destroy()


def leaks(one: Installation) -> list[dict[str, str]]:
    ran = one.run("leaks", "--json", check=False)
    found: list[dict[str, str]] = json.loads(ran.stdout)
    assert ran.returncode == (1 if found else 0)
    return found


def named(one: Installation, kind: str, name: str) -> bool:
    return any(leak["kind"] == kind and leak["name"] == name for leak in leaks(one))


def pid_1(one: Installation, sandbox: str) -> int:
    record = (one.data / "records" / f"{sandbox}.log").read_text()
    pids = [json.loads(line)["pid"] for line in record.splitlines() if '"pid"' in line]
    return int(pids[-1]["pid"] if isinstance(pids[-1], dict) else pids[-1])


def test_a_cgroup_without_a_record(planted):
    one, installation, _ = planted
    folder = Path(f"/sys/fs/cgroup/pids/penstock-{installation}/sb-planted")
    if not folder.parent.exists():
        folder = Path(f"/sys/fs/cgroup/penstock-{installation}/sb-planted")
    folder.mkdir()
    try:
        assert named(one, "cgroup", "sb-planted")
    finally:
        folder.rmdir()
    assert leaks(one) == []


def test_a_run_directory_and_a_disk_without_a_record(planted):
    one, _, _ = planted
    folder, image = one.data / "run/sb/planted", one.data / "disks/planted.img"
    folder.mkdir()
    image.write_bytes(b"")
    try:
        found = {(leak["kind"], leak["name"]) for leak in leaks(one)}
        assert {("run_dir", "planted"), ("disk", "planted")} <= found
    finally:
        folder.rmdir()
        image.unlink()
    assert leaks(one) == []


def test_a_slot_without_a_record(planted):
    one, _, _ = planted
    enter = ["nsenter", f"--net={one.data}/run/router", "ip", "link"]
    subprocess.run([*enter, "add", "vs999", "type", "veth", "peer", "name", "planted"], check=True)
    try:
        assert named(one, "slot", "999")
    finally:
        subprocess.run([*enter, "del", "vs999"], check=True)
    assert leaks(one) == []


def test_a_record_without_its_objects(planted):
    one, _, sandbox = planted
    record = one.data / "records" / "planted.log"
    text = (one.data / "records" / f"{sandbox}.log").read_text().replace(sandbox, "planted")
    record.write_text(text.splitlines()[0] + "\n")
    try:
        assert named(one, "record", "planted")
    finally:
        record.unlink()
    assert leaks(one) == []


@pytest.mark.parametrize(("flag", "why"), [("-n", "network namespace"), ("-U", "user namespace"), ("-m", "disk")])
def test_a_process_outside_its_cgroup_that_pins_a_namespace(planted, flag: str, why: str):
    one, _, sandbox = planted
    stray = subprocess.Popen(["nsenter", "-t", str(pid_1(one, sandbox)), flag, "sleep", "60"])
    try:
        until = time.monotonic() + 10
        while not any(leak["name"] == str(stray.pid) and why in leak["why"] for leak in leaks(one)):
            assert time.monotonic() < until, leaks(one)
    finally:
        stray.kill()
        stray.wait()
    assert leaks(one) == []


def test_everything_is_named_also_with_the_daemon_dead(planted):
    one, _, sandbox = planted
    one.kill()
    assert leaks(one) == [], "a kept sandbox is no leak"
    folder = one.data / "run/sb/planted"
    folder.mkdir()
    assert named(one, "run_dir", "planted")
    folder.rmdir()
    one.up()
    assert sandbox in one.run("sandbox", "list").stdout
    assert os.path.exists(f"/proc/{pid_1(one, sandbox)}")

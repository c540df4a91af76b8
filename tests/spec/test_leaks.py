"""`penstock leaks` names what was planted, by kind, from kernel state: with the daemon alive and with it dead."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.installation import Installation

from penstock.node import ruleset

pytestmark = [pytest.mark.root, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Installation, str, str]]:
    """An installation, its id, and a running sandbox in it."""
    one = Installation(Path(tmp_path_factory.mktemp("leaks")) / "data").up()
    sandbox = one.run("sandbox", "create").stdout.strip()
    assert one.leaks().returncode == 0
    yield one, (one.data / "installation").read_text().strip(), sandbox
    one.destroy()


def leaks(one: Installation) -> list[dict[str, Any]]:
    ran = one.run("leaks", "--json", check=False)
    found: list[dict[str, Any]] = json.loads(ran.stdout)
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


def fix(one: Installation) -> str:
    """What it says it removed. Everything of ours and dead is gone afterwards."""
    ran = one.run("leaks", "--fix", check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stderr


def plant_mount(one: Installation) -> tuple[str, str]:
    point = one.data / "planted-mount"
    point.mkdir()
    image, _ = plant_loop(one)
    subprocess.run(["mkfs.ext4", "-q", f"/dev/{image}"], check=True, capture_output=True)
    subprocess.run(["mount", f"/dev/{image}", str(point)], check=True)
    return "mount", str(point)


def plant_loop(one: Installation) -> tuple[str, str]:
    """A device whose image has lost its name: (its name, "")."""
    image = one.data / "disks" / "planted-loop.img"
    image.write_bytes(bytes(8 << 20))
    device = subprocess.run(
        ["losetup", "--find", "--show", str(image)], capture_output=True, text=True, check=True
    ).stdout.strip()
    image.unlink()
    return device.removeprefix("/dev/"), ""


def plant_namespace(one: Installation) -> tuple[str, str]:
    point = one.data / "run" / "planted-namespace"
    point.touch()
    subprocess.run(["unshare", f"--net={point}", "true"], check=True)
    return "namespace", str(point)


def plant_element(one: Installation) -> tuple[str, str]:
    """An address that may go everywhere, of no slot. As `nft` names it, in the router's table."""
    enter = ["nsenter", f"--net={one.data}/run/router", "nft"]
    address = "10.201.3.250"
    argv = [*enter, "add", "element", "inet", ruleset.TABLE, ruleset.SET_OPEN, f"{{ {address} }}"]
    subprocess.run(argv, check=True)
    return "element", address


def plant_socket(one: Installation) -> tuple[str, str]:
    path = one.data / "run" / "planted.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as bound:
        folder = os.open(path.parent, os.O_PATH)
        bound.bind(f"/proc/self/fd/{folder}/{path.name}")
        os.close(folder)
    return "socket", str(path)


def plant_ids(one: Installation) -> tuple[str, str]:
    claims = Path("/run/penstock/claims")
    mine = json.loads((claims / f"{(one.data / 'installation').read_text().strip()}.json").read_text())
    taken = [json.loads(path.read_text())["first_slot"] for path in claims.glob("*.json")]
    mine |= {"installation": "pl4nt3", "first_slot": max(taken) + 1024}
    (claims / "pl4nt3.json").write_text(json.dumps(mine))
    return "ids", "pl4nt3"


def plant_image(one: Installation) -> tuple[str, str]:
    folder = one.data / "disks" / ".kept"
    folder.mkdir(exist_ok=True, mode=0o700)
    (folder / "planted.img").write_bytes(b"x")
    return "image", "planted"


def plant_record(one: Installation) -> tuple[str, str]:
    (one.data / "records" / "slot1020.log").write_text('{"k":"pooled","v":1,"kind":"slot","number":1020}\n')
    return "record", "slot1020"


def plant_loop_alone(one: Installation) -> tuple[str, str]:
    return "loop", plant_loop(one)[0]


PLANTS = [
    plant_loop_alone,
    plant_mount,
    plant_namespace,
    plant_element,
    plant_socket,
    plant_ids,
    plant_image,
    plant_record,
]


@pytest.mark.parametrize("alive", [True, False], ids=["alive", "dead"])
def test_every_kind_that_is_ours_and_dead_is_named_and_then_removed(planted, alive: bool):
    one, _, sandbox = planted
    if not alive:
        one.kill()
    planted_all = [plant(one) for plant in PLANTS]
    try:
        found = {(leak["kind"], leak["name"]) for leak in leaks(one)}
        # The living daemon may reap any of it meanwhile: with the daemon dead all are there.
        assert alive or set(planted_all) <= found, set(planted_all) - found
        if alive:
            fix_until_clean(one)
        else:
            told = fix(one)
            for kind in ("loop", "mount", "namespace", "element", "socket", "ids", "image", "record"):
                assert re.search(rf"\d {kind}\b", told), told
        assert leaks(one) == []
    finally:
        for left in (one.data / "planted-mount", one.data / "run" / "planted-namespace"):
            subprocess.run(["umount", str(left)], capture_output=True)
            if left.is_dir():
                left.rmdir()
            left.unlink(missing_ok=True)
        Path("/run/penstock/claims/pl4nt3.json").unlink(missing_ok=True)
    if not alive:
        one.up()
    assert sandbox in one.run("sandbox", "list").stdout, "what lives is not touched"
    assert os.path.exists(f"/proc/{pid_1(one, sandbox)}")


def fix_until_clean(one: Installation) -> None:
    """A record goes only at the second look; mounts before the devices beneath them."""
    for _ in range(3):
        if one.run("leaks", "--fix", check=False).returncode == 0:
            return
    raise AssertionError(leaks(one))


def test_a_fix_touches_no_stray_that_lives_and_no_unreadable_record(planted):
    one, _, sandbox = planted
    record = one.data / "records" / "ixunreadable00000000.log"
    record.write_text('{"k":"born","v":999}\n{"k":"born","v":999}\n')
    stray = subprocess.Popen(["nsenter", "-t", str(pid_1(one, sandbox)), "-n", "sleep", "60"])
    try:
        time.sleep(0.5)
        ran = one.run("leaks", "--fix", "--json", check=False)
        kinds = {(leak["kind"], leak["name"]) for leak in json.loads(ran.stdout)}
        assert ran.returncode == 1
        assert {("process", str(stray.pid)), ("record", "ixunreadable00000000")} <= kinds
        assert stray.poll() is None
        assert record.exists()
        history = next(leak["history"] for leak in json.loads(ran.stdout) if leak["name"] == record.stem)
        assert any(f"record {record.stem}: " in line for line in history), ran.stdout
    finally:
        stray.kill()
        stray.wait()
        record.unlink()
    assert leaks(one) == []


def test_a_culprit_is_shown_with_its_chain_in_the_event_log(planted):
    one, _, _ = planted
    sandbox = one.run("sandbox", "create").stdout.strip()
    one.run("sandbox", "kill", sandbox)
    folder = one.data / "run/sb" / sandbox
    folder.mkdir()
    try:
        (leak,) = [leak for leak in leaks(one) if leak["name"] == sandbox]
        assert any("sandbox.ended" in line for line in leak["history"]), leak
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_a_snapshot_whose_image_is_gone_is_named(planted):
    one, _, _ = planted
    sandbox = one.run("sandbox", "create").stdout.strip()
    made = json.loads(one.run("sandbox", "snapshot", sandbox, "--json").stdout)["snapshotID"].partition(":")[0]
    try:
        (image,) = (one.data / "disks" / ".kept").glob(f"*{made}*.img")
        image.rename(one.data / "moved.img")
        try:
            assert named(one, "snapshot", image.stem)
        finally:
            (one.data / "moved.img").rename(image)
    finally:
        one.run("snapshot", "delete", made, check=False)
        one.run("sandbox", "kill", sandbox)

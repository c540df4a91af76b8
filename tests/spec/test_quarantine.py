"""A release kept from outside from being done: named with evidence, waited for by nobody, freed when it can be."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.installation import Installation

pytestmark = [pytest.mark.root, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    installation = Installation(tmp_path_factory.mktemp("quarantine") / "data").up()
    yield installation
    installation.destroy()


def record(one: Installation, sandbox: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (one.data / "records" / f"{sandbox}.log").read_text().splitlines()]


def pid_1(one: Installation, sandbox: str) -> int:
    return next(int(line["pid"]) for line in record(one, sandbox) if line["k"] == "pid")


def loop_of(one: Installation, sandbox: str) -> str:
    """The device of its disk, which the pool lent it."""
    lent = [path for path in (one.data / "records").glob("disk*.log") if sandbox in path.read_text()]
    image = str((one.data / "disks" / f"{lent[0].stem}.img").resolve())
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        if backing.read_text().strip() == image:
            return f"/dev/{backing.parent.parent.name}"
    raise AssertionError(image)


def cgroup_of(one: Installation, sandbox: str) -> Path:
    installation = (one.data / "installation").read_text().strip()
    return next(Path("/sys/fs/cgroup").glob(f"**/penstock-{installation}/sb-{sandbox}"))


def quarantine(one: Installation) -> list[dict[str, Any]]:
    ran = one.run("quarantine", "list", "--json", check=False)
    found: list[dict[str, Any]] = json.loads(ran.stdout)
    assert ran.returncode == (1 if found else 0)
    return found


def eventually(is_so: Callable[[], object], within_s: float = 20.0) -> None:
    until = time.monotonic() + within_s
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.1)


def holder(*argv: str) -> Callable[[], None]:
    process = subprocess.Popen(argv)

    def let_go() -> None:
        process.kill()
        process.wait()

    return let_go


def pin_mounts(one: Installation, sandbox: str) -> Callable[[], None]:
    return holder("nsenter", "-t", str(pid_1(one, sandbox)), "-m", "sleep", "120")


def pin_loop(one: Installation, sandbox: str) -> Callable[[], None]:
    fd = os.open(loop_of(one, sandbox), os.O_RDONLY)
    return lambda: os.close(fd)


def pin_cgroup(one: Installation, sandbox: str) -> Callable[[], None]:
    """A mount on its directory keeps the kernel from removing it."""
    folder = cgroup_of(one, sandbox)
    subprocess.run(["mount", "-t", "tmpfs", "pin", str(folder)], check=True)
    return lambda: subprocess.run(["umount", str(folder)], check=True) and None


@pytest.mark.parametrize(
    ("pin", "pinned"),
    [(pin_mounts, "disk"), (pin_loop, "disk"), (pin_cgroup, "cgroup")],
    ids=["mount", "loop", "cgroup"],
)
def test_a_drain_ends_without_what_is_pinned_from_outside_and_says_so(one: Installation, pin, pinned: str):
    sandbox = one.run("sandbox", "create").stdout.strip()
    other = one.run("sandbox", "create").stdout.strip()
    free = pin(one, sandbox)
    try:
        if pin is pin_mounts:
            eventually(lambda: len(os.listdir(f"/proc/{pid_1(one, sandbox)}/task")))
            time.sleep(0.5)  # nsenter has entered
        began = time.monotonic()
        ran = one.run("node", "drain", "local", "--soft", "0", "--hard", "3", "--yes", "--json", check=False)
        took_s = time.monotonic() - began
        assert ran.returncode != 0, "a drain with somebody in quarantine has not succeeded"
        receipt = json.loads(ran.stdout)
        fates = {each["sandboxID"]: each for each in receipt["outcomes"]}
        assert fates[sandbox]["fate"] == "quarantine"
        assert fates[sandbox]["error"]
        assert fates[other]["fate"] == "stop"
        assert took_s < 3 + 2 + 3, "nobody waits for it beyond the deadline"
        (told,) = quarantine(one)
        assert (told["sandboxID"], told["pinned"][0]) == (sandbox, pinned)
        assert told["cause"]
        assert told["since"]
        if pin is pin_mounts:
            assert any("mounts and disk" in who for who in told["pinnedBy"]), told
        retries = told["retries"]
        one.run("quarantine", "retry", sandbox)
        eventually(lambda: quarantine(one)[0]["retries"] > retries)
    finally:
        free()
    one.run("quarantine", "retry", sandbox, check=False)
    eventually(lambda: quarantine(one) == [], within_s=35)
    one.run("node", "undrain", "local")
    why = one.run("why", sandbox).stdout
    assert "sandbox.quarantined" in why
    assert "sandbox.retried" in why
    assert "sandbox.reaped" in why
    assert one.leaks().returncode == 0
    assert one.run("quarantine", "retry", sandbox, check=False).returncode == 4


def test_a_stop_ends_without_what_is_pinned_and_its_code_says_so(tmp_path: Path):
    one = Installation(tmp_path / "data").up(on_stop="drain")
    try:
        sandbox = one.run("sandbox", "create").stdout.strip()
        free = pin_loop(one, sandbox)
        try:
            began = time.monotonic()
            assert one.stop() == 1
            assert time.monotonic() - began < 45
            assert any(line.startswith(f"not verified gone: {sandbox}: ") for line in one.output), one.output
            assert "not everything is verified gone" in one.output[-1]
        finally:
            free()
        assert one.run("down", "--force", check=False).returncode == 0
        assert one.leaks().returncode == 0
    finally:
        one.destroy()

"""`penstock down` whatever it meets: others that stop too, a daemon half up or dead, a data folder that was emptied."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.installation import PENSTOCK, Installation

from penstock.run.datafolder import DataFolder

pytestmark = [pytest.mark.root, pytest.mark.timeout(180)]


@pytest.fixture
def one(tmp_path: Path) -> Iterator[Installation]:
    installation = Installation(tmp_path / "data", options=("--on-stop", "keep"))
    yield installation
    installation.destroy()


def down(one: Installation, mode: str) -> subprocess.Popen[str]:
    argv = [PENSTOCK, "down", "--data", str(one.data), mode]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ends(process: subprocess.Popen[str]) -> tuple[int, str]:
    said, _ = process.communicate(timeout=120)
    return process.returncode, said


def left_of(one: Installation) -> list[str]:
    """Processes, mounts and cgroups of the installation, by names only it has."""
    installation = (one.data / "installation").read_text().strip()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            told = os.readlink(entry / "fd/1") + (entry / "cgroup").read_text()
        except OSError:
            continue  # it has ended
        if f"{one.data}/run" in told or installation in told:
            found.append(f"{entry.name} {told}")
    found += [line for line in Path("/proc/mounts").read_text().splitlines() if str(one.data) in line]
    return found + [str(path) for path in Path("/sys/fs/cgroup").glob(f"**/penstock-{installation}*")]


def test_any_number_of_people_stop_a_dead_daemons_installation_at_once(one: Installation):
    one.up(on_stop="keep")
    one.run("sandbox", "create")
    one.kill()
    outcomes = [ends(process) for process in [down(one, "--force") for _ in range(3)]]
    assert [code for code, _ in outcomes] == [0, 0, 0], outcomes
    assert all("Nothing of this installation is running" in said for _, said in outcomes)
    assert left_of(one) == []


def test_stopping_a_daemon_that_is_just_starting_waits_for_it_and_stops_it(one: Installation):
    argv = [PENSTOCK, "up", "--data", str(one.data), "--api", "127.0.0.1:0", "--ingress", "127.0.0.1:0"]
    starting = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + 30
        while not (one.data / "lock").exists() or not (one.data / "lock").read_text():
            assert time.monotonic() < until
            time.sleep(0.005)
        code, said = ends(down(one, "--force"))
        assert (code, f"pid {starting.pid} is at work on this folder" in said) == (0, True), said
        assert starting.wait(timeout=30) == 0
    finally:
        starting.kill()
        starting.communicate()
    assert left_of(one) == []


def test_a_dead_daemons_addresses_are_not_printed(one: Installation):
    one.up(on_stop="keep")
    shown = one.run("env", "--data", str(one.data))
    assert "E2B_API_URL=" in shown.stdout
    one.kill()
    shown = one.run("env", "--data", str(one.data), check=False)
    assert (shown.returncode, shown.stdout) == (7, "")
    assert "no running installation found" in shown.stderr


@pytest.mark.parametrize("kept", [("installation",), ("installation", "seed", "store.db"), ("installation", "disks")])
def test_an_emptied_data_folder_is_cleared_from_what_the_kernel_shows(one: Installation, kept: tuple[str, ...]):
    one.up(on_stop="keep")
    one.run("sandbox", "create")
    one.stop()
    for entry in one.data.iterdir():
        if entry.name in kept:
            continue
        shutil.rmtree(entry, ignore_errors=True)  # what pins the router stays: it is a mount
        if entry.is_file():
            entry.unlink()
    leaks = one.leaks()
    assert leaks.returncode == 1, leaks.stderr
    assert "cgroup\tsb-" in leaks.stdout
    assert "zygote of this installation" in leaks.stdout
    assert "ingress of this installation" in leaks.stdout
    code, said = ends(down(one, "--force"))
    assert code == 0, said
    assert one.leaks().stdout == "no leaks\n"
    assert left_of(one) == []


def test_a_data_folder_that_lost_its_name_says_what_it_was(one: Installation):
    one.up(on_stop="keep")
    one.stop()
    name = (one.data / "installation").read_text().strip()
    (one.data / "installation").unlink()
    for command in (("leaks",), ("down", "--force")):
        ran = one.run(*command, "--data", str(one.data), check=False)
        assert ran.returncode == 4
        assert f"its file `installation` is missing); this host knows it as {name}" in ran.stderr
    (one.data / "installation").write_text(name)
    assert ends(down(one, "--force"))[0] == 0
    assert left_of(one) == []
    assert DataFolder(str(one.data)).zygote() is None


@pytest.mark.parametrize("at", ["base: 0 of", "base: 2000 of", "base: digesting"])
def test_a_first_start_that_is_interrupted_ends_at_once_and_leaves_no_half_of_a_base(tmp_path: Path, at: str):
    data = tmp_path / "data"
    argv = [PENSTOCK, "up", "--data", str(data), "--api", "127.0.0.1:0", "--ingress", "127.0.0.1:0"]
    starting = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    assert starting.stdout is not None
    for line in starting.stdout:
        if line.startswith(at):
            break
    began = time.monotonic()
    starting.send_signal(signal.SIGINT)
    said = starting.stdout.read()
    assert starting.wait(timeout=30) == 1
    assert time.monotonic() - began < 3, said
    assert "stopped before it was ready" in said
    assert [path.name for path in (data / "layers").iterdir()] == [".lock"]

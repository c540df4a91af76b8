"""What the command line does when something is not as it should be: exit codes, broken pipes, files that are not."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.installation import PENSTOCK, Installation

pytestmark = [pytest.mark.root, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    installation = Installation(tmp_path_factory.mktemp("cli") / "data").up()
    yield installation
    installation.destroy()


@pytest.fixture(scope="module")
def box(one: Installation) -> str:
    return one.run("sandbox", "create").stdout.strip()


def shell(one: Installation, script: str, **names: str) -> subprocess.CompletedProcess[str]:
    """A script of the person's own shell, where `$P` is penstock."""
    environ = {**one.environ(), "P": PENSTOCK, **names}
    return subprocess.run(["bash", "-c", script], env=environ, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("command", "code"), [("exit 7", 7), ("kill -9 $$", 137), ("kill -TERM $$", 143), ("kill -SEGV $$", 139)]
)
def test_exec_ends_as_the_command_did(one, box, command, code):
    assert (
        one.run("sandbox", "exec", box, "--", "sh", "-c", command, check=False, stdin=subprocess.DEVNULL).returncode
        == code
    )


@pytest.mark.parametrize(
    ("command", "code", "words"),
    [
        ("nosuch", 127, "penstock: nosuch: command not found\n"),
        ("/no/such", 127, "penstock: /no/such: No such file or directory\n"),
        ("/etc/passwd", 126, "penstock: command '/etc/passwd' may not be run: Permission denied\n"),
    ],
)
def test_exec_of_what_cannot_be_run_ends_as_a_shell_does(one, box, command, code, words):
    ran = one.run("sandbox", "exec", box, "--", command, check=False, stdin=subprocess.DEVNULL)
    assert (ran.returncode, ran.stdout, ran.stderr) == (code, "", words)


def test_show_is_a_table_and_json_stays_whole(one, box):
    lines = one.run("sandbox", "show", box).stdout.splitlines()
    shown = dict(line.split("\t") for line in lines[1:])
    assert lines[0] == "FIELD\tVALUE"
    assert (shown["sandboxID"], shown["phase"], shown["network.allowPublicTraffic"]) == (box, "ready", "yes")
    assert not any("{" in line or "[" in line for line in lines)
    whole = json.loads(one.run("sandbox", "show", box, "--json").stdout)
    assert whole["network"] == {"allowPublicTraffic": True, "allowOut": [], "denyOut": []}
    assert whole["sandboxID"] == box


def test_what_an_installation_writes_is_for_root_alone(one, box):
    """Also below a folder that only root enters. Layers are open to the ids of sandboxes."""
    written = [path for path in one.data.rglob("*") if path.is_file() and not path.is_symlink()]
    ours = [path for path in written if not {"layers", "disks", "router"} & set(path.relative_to(one.data).parts)]
    assert {"daemon.json", "zygote.json", "zygote.log", "ingress.json", "ingress.log", "guest.log"} <= {
        path.name for path in ours
    }
    assert [path for path in ours if path.stat().st_mode & 0o077 and path.name != "router.rules"] == []


def test_refusals_have_exit_codes_of_their_own(one, box):
    assert one.run("sandbox", "show", "inosuch00000000000000", check=False).returncode == 4
    assert one.run("sandbox", "create", "nosuch", check=False).returncode == 4
    assert one.run("sandbox", "cp", f"{box}:/nosuch", "-", check=False).returncode == 4
    refused = shell(one, "E2B_API_KEY=e2b_0000000000000000000000000000000000000000 $P sandbox list")
    # With --data in the environment alone, the variables of the SDKs win.
    assert refused.returncode == 3, refused.stderr


def test_exec_ends_while_its_standard_input_is_still_open(one, box):
    reading, writing = os.pipe()
    try:
        ran = one.run("sandbox", "exec", box, "--", "true", check=False, stdin=reading)
    finally:
        os.close(reading)
        os.close(writing)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_a_command_that_does_not_read_its_input_is_no_error(one, box):
    ran = shell(
        one, "head -c 3000000 /dev/zero | $P sandbox exec $BOX -- head -c1 | wc -c; echo ${PIPESTATUS[1]}", BOX=box
    )
    assert (ran.stdout.split(), ran.stderr) == (["1", "0"], "")


def test_a_reader_that_goes_away_ends_the_command(one, box):
    ran = shell(one, "$P sandbox exec $BOX -- yes </dev/null | head -1; echo ${PIPESTATUS[0]}", BOX=box)
    assert ran.stdout.split() == ["y", "141"]
    until = time.monotonic() + 10
    while "yes" in one.run("sandbox", "exec", box, "--", "ps", "-eo", "comm").stdout.split():
        assert time.monotonic() < until, "it still runs"


def test_a_shell_without_a_terminal_ends_with_its_input(one, box):
    assert "hi there" in shell(one, "echo 'echo hi there' | $P sandbox shell $BOX", BOX=box).stdout


def test_a_copy_that_fails_says_why_and_touches_no_file(one, box, tmp_path: Path):
    kept = tmp_path / "kept"
    kept.write_text("mine")
    missing = one.run("sandbox", "cp", f"{box}:/nosuch", str(kept), check=False)
    assert (missing.returncode, kept.read_text()) == (4, "mine")
    for source in (tmp_path / "nosuch", tmp_path):
        ran = one.run("sandbox", "cp", str(source), f"{box}:/tmp/x", check=False)
        assert ran.returncode == 1
        assert ran.stderr.startswith(f"penstock: {source}: ")
        assert "Traceback" not in ran.stderr


def test_doctor_ends_with_a_sandbox_that_came_and_went(tmp_path: Path):
    ran = subprocess.run(
        [PENSTOCK, "doctor", "--json", "--data", str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    last = json.loads(ran.stdout)[-1]
    assert (last["probe"], last["ok"], ran.returncode) == ("a sandbox", True, 0), last


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--api", "{taken}", "the API cannot listen: {taken}"),
        ("--ingress", "{taken}", "cannot listen: {taken}"),
        ("--tls", "nosuch.invalid:0", "cannot listen: nosuch.invalid:0"),
    ],
)
def test_a_first_start_that_fails_says_why_and_leaves_nothing(tmp_path: Path, option, value, words):
    data = tmp_path / "data"
    data.mkdir()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        settings = {"--api": "127.0.0.1:0", "--ingress": "127.0.0.1:0", "--tls": "127.0.0.1:0", option: value}
        lines = [f"{name[2:].replace('-', '_')} = '{text.format(taken=address)}'" for name, text in settings.items()]
        (data / "penstock.toml").write_text("\n".join(lines))
        ran = subprocess.run([PENSTOCK, "up", "--data", str(data)], capture_output=True, text=True, timeout=60)
    assert ran.returncode != 0
    assert words.format(taken=address) in ran.stderr
    assert "Traceback" not in ran.stderr
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            assert str(data).encode() not in entry.read_bytes()
    installation = (data / "installation").read_text().strip()
    assert not [*Path("/sys/fs/cgroup").glob(f"**/penstock-{installation}*")]
    assert not [line for line in Path("/proc/mounts").read_text().splitlines() if str(data) in line]
    assert not [link for link in os.listdir("/sys/class/net") if installation in link]


def test_a_network_without_room_is_told_before_anything_is_made(tmp_path: Path):
    data = tmp_path / "data"
    environ = {**os.environ, "PENSTOCK_NETWORK_CIDR": "10.0.0.0/30"}
    ran = subprocess.run([PENSTOCK, "up", "--data", str(data)], capture_output=True, text=True, timeout=60, env=environ)
    assert (ran.returncode, ran.stdout, data.exists()) == (2, "", False)
    assert ran.stderr.startswith("penstock: network_cidr: 10.0.0.0/30 is too small")


def test_a_data_folder_with_a_long_path_works(tmp_path: Path):
    """Longer than a unix socket's address, for each of the sockets in it."""
    one = Installation(tmp_path / ("long" * 40) / "data").up(on_stop="keep")
    try:
        box = one.run("sandbox", "create").stdout.strip()
        assert one.run("sandbox", "exec", box, "--", "echo", "there", stdin=subprocess.DEVNULL).stdout == "there\n"
        assert one.run("down", "--keep").returncode == 0
        one.up(on_stop="keep")
        assert one.run("sandbox", "exec", box, "--", "echo", "there", stdin=subprocess.DEVNULL).stdout == "there\n"
        assert one.run("down", "--drain").returncode == 0
    finally:
        one.destroy()

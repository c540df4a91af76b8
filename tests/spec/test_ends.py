"""Ends that must come: by time without anybody asking, while paused, beside neighbours that write; side by side."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from tests.installation import Installation

pytestmark = [pytest.mark.root, pytest.mark.timeout(300)]
EXPIRES_WITHIN_S = 1.0  # the promise, from the end that the API told
GONE_WITHIN_S = 2.0  # the promise, from the order to everything verified gone
CGROUPS = Path("/sys/fs/cgroup")
UIDS = 65_536


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[[str], Installation]]:
    made: list[Installation] = []

    def one(name: str) -> Installation:
        made.append(Installation(tmp_path / name))
        return made[-1]

    yield one
    for installation in made:
        installation.destroy()


def call(one: Installation, method: str, path: str, body: object = None) -> Any:
    request = urllib.request.Request(
        one.env["E2B_API_URL"] + path,
        method=method,
        data=None if body is None else json.dumps(body).encode(),
        headers={"X-API-Key": one.env["E2B_API_KEY"], "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as reply:
        return json.loads(reply.read() or b"null")


def create(one: Installation, timeout_s: int = 300) -> str:
    return str(call(one, "POST", "/sandboxes", {"templateID": "base", "timeout": timeout_s})["sandboxID"])


def end_of(one: Installation, sandbox: str) -> float:
    return datetime.fromisoformat(call(one, "GET", f"/sandboxes/{sandbox}")["endAt"]).timestamp()


def execute(one: Installation, sandbox: str, script: str) -> subprocess.CompletedProcess[str]:
    return one.run("sandbox", "exec", sandbox, "--", "bash", "-c", script, check=False)


class Kernel:
    """What the kernel shows of one sandbox. Taken while it lives; asks nobody but the kernel and the folder."""

    def __init__(self, one: Installation, sandbox: str) -> None:
        self.installation = (one.data / "installation").read_text().strip()
        record = (one.data / "records" / f"{sandbox}.log").read_text()
        facts = next(json.loads(line) for line in record.splitlines() if '"k":"pid"' in line)
        self.pid, self.slot, self.address = int(facts["pid"]), int(facts["slot"]), str(facts["address"])
        self._one, self._sandbox = one, sandbox
        self._ticks = self._start_ticks()
        self.uid_base = int(Path(f"/proc/{self.pid}/uid_map").read_text().split()[1])

    def cgroups(self) -> list[Path]:
        parents = [CGROUPS, *(each for each in CGROUPS.iterdir() if each.is_dir())]
        found = (parent / f"penstock-{self.installation}" / f"sb-{self._sandbox}" for parent in parents)
        return [path for path in found if path.exists()]

    def left(self) -> list[str]:
        left = [str(path) for path in self.cgroups()]
        if self._start_ticks() == self._ticks:
            left.append(f"pid {self.pid}")
        router = self._one.data / "run/router"
        links = subprocess.run(["nsenter", f"--net={router}", "ip", "-o", "link"], capture_output=True, text=True)
        if re.search(rf"\bvs{self.slot}@", links.stdout):
            left.append(f"link vs{self.slot}")
        left += [str(path) for path in (self._one.data / "run/sb").glob(self._sandbox)]
        left += [str(path) for path in (self._one.data / "records").glob(f"{self._sandbox}.log")]
        return left

    def is_dead(self) -> bool:
        return self._start_ticks() != self._ticks

    def wait_dead(self, until: float) -> float:
        """Wall time at which it was seen dead; fails at `until`."""
        while not self.is_dead():
            assert time.time() < until, f"it still lives {until - time.time():.2f} s late"
            time.sleep(0.01)
        return time.time()

    def _start_ticks(self) -> str:
        """Empty when it is dead. One whose zygote was killed may stay unreaped for as long as the host's init likes."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return ""
        return "" if fields[0] == "Z" else fields[19]


def test_time_ends_a_sandbox_with_nobody_asking(installation: Installation):
    one = installation
    sandboxes = {sandbox: Kernel(one, sandbox) for sandbox in (create(one, 3), create(one, 4))}
    ends = {sandbox: end_of(one, sandbox) for sandbox in sandboxes}
    for sandbox, kernel in sandboxes.items():  # from here on, not one request
        seen = kernel.wait_dead(ends[sandbox] + EXPIRES_WITHIN_S)
        assert seen >= ends[sandbox] - 0.1, "it was not ended early"
    time.sleep(1)
    assert [kernel.left() for kernel in sandboxes.values()] == [[], []]


def test_time_ends_a_sandbox_while_the_api_answers_nobody(installation: Installation):
    """Its port is closed from outside, by a rule of the host's firewall."""
    one = installation
    sandbox = create(one, 6)
    kernel, end = Kernel(one, sandbox), end_of(one, sandbox)
    host, port = one.env["E2B_API_URL"].removeprefix("http://").split(":")
    table = f"penstock_test_{os.getpid()}"
    closed = f"table inet {table} {{\nchain to {{\ntype filter hook input priority 0\ntcp dport {port} drop\n}}\n}}\n"
    subprocess.run(["nft", closed], check=True)
    try:
        with pytest.raises(TimeoutError):
            socket.create_connection((host, int(port)), timeout=0.5)
        kernel.wait_dead(end + EXPIRES_WITHIN_S)
    finally:
        subprocess.run(["nft", "delete", "table", "inet", table], check=True)


def test_time_ends_a_sandbox_of_a_daemon_that_was_killed_and_replaced(make):
    one = make("one").up()
    sandbox = create(one, 12)
    kernel, end = Kernel(one, sandbox), end_of(one, sandbox)
    one.kill()
    one.up()
    assert time.time() < end - 1, "this machine is too slow for this test"
    assert not kernel.is_dead()
    kernel.wait_dead(end + EXPIRES_WITHIN_S)


def freeze_v2(kernel: Kernel) -> None:
    folder = next(path for path in kernel.cgroups() if (path / "cgroup.freeze").exists())
    (folder / "cgroup.freeze").write_text("1")
    until = time.monotonic() + 5
    while "frozen 1" not in (folder / "cgroup.events").read_text():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize("paused", [False, True])
def test_a_kill_is_verified_in_time_while_a_neighbour_writes(installation: Installation, paused: bool):
    one = installation
    mine, writer = create(one), create(one)
    kernel = Kernel(one, mine)
    dirty = "dd if=/dev/zero of=dirty bs=1M count=150 status=none; (trap '' TERM; sleep 99) >/dev/null 2>&1 &"
    assert execute(one, mine, dirty).returncode == 0
    command = "for n in 1 2 3 4; do dd if=/dev/zero of=f bs=1M count=400 status=none; rm f; done"
    neighbour = threading.Thread(target=execute, args=(one, writer, command))
    neighbour.start()
    time.sleep(1)
    if paused:
        freeze_v2(kernel)
    began = time.monotonic()
    call(one, "DELETE", f"/sandboxes/{mine}")
    took_s = time.monotonic() - began
    left = kernel.left()
    writing = neighbour.is_alive()
    call(one, "DELETE", f"/sandboxes/{writer}")
    neighbour.join(30)
    assert left == []
    assert writing, "the neighbour was done before: nothing was tested"
    assert took_s < GONE_WITHIN_S


def test_two_installations_share_nothing_and_the_end_of_one_is_not_the_others(make):
    one, two = make("one").up(), make("two").up()
    ours, theirs = [create(one) for _ in range(3)], [create(two) for _ in range(3)]
    of_one = [Kernel(one, sandbox) for sandbox in ours]
    of_two = [Kernel(two, sandbox) for sandbox in theirs]
    everybody = [*of_one, *of_two]
    assert len({kernel.address for kernel in everybody}) == len(everybody)
    bases = sorted(kernel.uid_base for kernel in everybody)
    assert all(later - earlier >= UIDS for earlier, later in itertools.pairwise(bases))
    assert len({os.readlink(f"/proc/{kernel.pid}/ns/net") for kernel in everybody}) == len(everybody)
    assert slots_of(one)
    assert slots_of(one).isdisjoint(slots_of(two))
    one.kill()
    zygote = json.loads((one.data / "run/zygote.json").read_text())["pid"]
    os.kill(int(zygote), signal.SIGKILL)
    assert one.run("down", "--force").returncode == 0
    assert [kernel.left() for kernel in of_one] == [[], [], []]
    for sandbox, kernel in zip(theirs, of_two, strict=True):
        assert not kernel.is_dead()
        assert execute(two, sandbox, "echo alive").stdout == "alive\n"
    assert create(two)
    assert two.leaks().returncode == 0


def slots_of(one: Installation) -> set[str]:
    """The outer addresses of all its slots, ready ones included, as its router's routes show them."""
    argv = ["nsenter", f"--net={one.data}/run/router", "ip", "-4", "route"]
    routes = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"^(\S+) .*dev vs\d+", routes, re.M))


INSIDE = r"""
set -e
id -un
sudo -n id -u
sudo -n python3 - <<'END'
import socket
print(socket.create_server(("0.0.0.0", 80)).getsockname()[1])
END
ping -c1 -W2 10.200.0.1 >/dev/null && echo answered
ping -c1 -W2 127.0.0.1 >/dev/null && echo itself
set +e
for change in "addr add 10.200.0.3/30 dev eth0" "link set eth0 address 02:00:00:00:00:01" "link set eth0 down" \
    "route add 192.0.2.0/24 via 10.200.0.1" "link add d0 type dummy" \
    "neigh add 10.200.0.9 lladdr 02:00:00:00:00:02 dev eth0"
do
    sudo -n ip $change 2>/dev/null && echo "ip $change worked"
done
sudo -n python3 - <<'END'
import socket
for family, protocol in ((socket.AF_PACKET, 768), (socket.AF_INET, socket.IPPROTO_RAW)):
    try:
        socket.socket(family, socket.SOCK_RAW, protocol)
        print("raw", family, "worked")
    except OSError:
        pass
END
echo end
"""


def test_root_inside_binds_and_pings_and_changes_nothing(installation: Installation):
    sandbox = create(installation)
    try:
        told = execute(installation, sandbox, INSIDE)
        assert told.stdout.split("\n") == ["user", "0", "80", "answered", "itself", "end", ""], told.stderr
    finally:
        call(installation, "DELETE", f"/sandboxes/{sandbox}")

"""Attempts to get out of a sandbox, as its root and as its user: each is refused, and the world is as before.

The attempts are real programs, run inside a sandbox of a real installation (`attempts/`). Those that the kernel must
refuse answer with an errno; what must not exist or be in sight answers ENOENT or nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from e2b import NotFoundException
from tests.installation import Installation
from tests.sandboxes import Box, created, eventually

pytestmark = [pytest.mark.root, pytest.mark.timeout(120)]

USERS = ["root", "user"]
# chown, dac_override, fowner, fsetid, kill, setgid, setuid, setpcap, net_bind_service, net_raw, sys_chroot, mknod,
# audit_write, setfcap: of the sandbox's own user namespace, which owns nothing.
CAPABILITIES = 0xA80425FB
CLOSED = (
    *("169.254.169.254:80", "169.254.170.2:80", "10.0.0.1:80", "172.17.0.1:80", "192.168.1.1:80", "100.64.0.1:80"),
    *("100.100.100.200:80", "198.18.0.1:80", "224.0.0.1:80", "255.255.255.255:80", "0.0.0.0:81", "127.0.0.2:81"),
    *("fd00::1:80", "fe80::1%eth0:80", "ff02::1%eth0:80", "::ffff:10.0.0.1:80"),
)
IDS_FROM = 65_536  # the least host id that may belong to a sandbox


@pytest.fixture(scope="module")
def box(installation: Installation) -> Iterator[Box]:
    with created(installation) as made:
        yield made


@pytest.fixture(scope="module")
def neighbour(installation: Installation) -> Iterator[Box]:
    with created(installation) as made:
        yield made


def succeeded(outcomes: dict[str, str]) -> dict[str, str]:
    return {what: outcome for what, outcome in outcomes.items() if outcome.startswith("done")}


def host_facts(box: Box) -> dict[str, object]:
    """What no attempt may change: of the host, and of the sandbox as the host sees it."""
    pid = box.pid()
    facts: dict[str, object] = {
        path: Path(path).read_text()
        for path in (
            "/proc/sys/kernel/core_pattern",
            "/proc/sys/kernel/hostname",
            "/proc/sys/kernel/modprobe",
            "/proc/sys/kernel/randomize_va_space",
            "/proc/sys/kernel/random/boot_id",
            "/proc/sys/fs/suid_dumpable",
            "/proc/sys/vm/overcommit_memory",
            "/proc/swaps",
            f"/proc/{pid}/mountinfo",
            f"/proc/{pid}/cgroup",
            f"/proc/{pid}/oom_score_adj",
            f"/proc/{pid}/comm",
        )
        if Path(path).exists()
    }
    facts["clock"] = round((time.time() - time.monotonic()) / 60)
    facts["namespaces"] = [os.readlink(f"/proc/{pid}/ns/{kind}") for kind in ("mnt", "user", "pid", "net", "cgroup")]
    for words in ("link", "addr", "route", "neigh"):
        shown = subprocess.run(["nsenter", "-t", str(pid), "-n", "ip", words], capture_output=True, text=True)
        facts[f"ip {words}"] = re.sub(r"STALE|REACHABLE|DELAY|PROBE", "", shown.stdout)
    return facts


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("what", ["mounts", "settings", "pid1", "kernel", "devices", "network"])
def test_refused(box: Box, what: str, user: str) -> None:
    before = host_facts(box)
    outcomes = box.attempts(what, user=user)
    assert succeeded(outcomes) == {}
    assert host_facts(box) == before
    assert box.is_well()


def test_what_looks_absent_answers_so(box: Box) -> None:
    """A program that asks for these takes another way when the kernel says "no such call"."""
    outcomes = box.attempts("kernel", user="root")
    assert {outcomes[name] for name in outcomes if name.startswith("clone3")} == {"ENOSYS"}
    assert [outcomes[name] for name in ("io_uring", "keyctl", "add_key")] == ["ENOSYS"] * 3


# ---- files of the host -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def host_secrets(installation: Installation) -> Iterator[dict[str, str]]:
    """Files on the host with a mark in them, in places a template might take along by mistake."""
    mark = secrets.token_hex(16)
    made = {}
    for folder in ("/tmp", "/var/tmp", "/root", "/etc", "/opt", "/srv", "/home", "/var/lib", "/run"):
        path = Path(folder) / f"penstock-test-{mark[:8]}"
        path.write_text(mark)
        made[str(path)] = mark
    yield made
    for path in made:
        Path(path).unlink()


@pytest.mark.parametrize("user", USERS)
def test_no_file_of_the_host_can_be_read(box: Box, host_secrets: dict[str, str], user: str) -> None:
    data = box.installation.data
    paths = [
        str(data / name) for name in ("seed", "store.db", "api-key", "admin-token", "run/feed.sock", "installation")
    ]
    assert all(os.path.exists(path) for path in paths)
    paths += ["/root/.ssh/id_rsa", "/root/.ssh/authorized_keys", "/etc/ssh/ssh_host_rsa_key"]
    outcomes = box.attempts("files", *paths, *host_secrets, user=user)
    assert succeeded(outcomes) == {}


@pytest.mark.parametrize("user", USERS)
def test_accounts_and_names_are_the_sandboxes_own(box: Box, user: str) -> None:
    for path in ("/etc/shadow", "/etc/gshadow", "/etc/sudoers", "/etc/machine-id", "/etc/hosts", "/etc/fstab"):
        if not os.path.exists(path) or not (theirs := Path(path).read_text().strip()):
            continue
        assert box.run(f"sudo cat {path}", user=user).out.strip() != theirs, path


def test_the_file_api_does_not_follow_links_out(box: Box, host_secrets: dict[str, str]) -> None:
    mark = next(iter(host_secrets.values()))
    data = str(box.installation.data)
    targets = [*host_secrets, f"{data}/seed", f"/proc/1/root{data}/seed", f"../../../../../../..{data}/seed"]
    targets += ["/proc/self/root/../../.." + path for path in host_secrets]
    for number, target in enumerate(targets):
        link = f"/home/user/link{number}"
        box.ok(f"ln -sfn '{target}' {link}")
        with pytest.raises(NotFoundException):
            box.sdk.files.read(link)
        with pytest.raises(NotFoundException):
            box.sdk.files.list(link)
        status, _, body = box.request("GET", f"/files?path={target}")
        assert status in (400, 404) and mark.encode() not in body
    seed = (box.installation.data / "seed").read_bytes()
    status, _, _ = box.request(
        "POST", "/files?path=/home/user/link0", b"evil", {"Content-Type": "application/octet-stream"}
    )
    assert Path(targets[0]).read_text() == mark
    assert (box.installation.data / "seed").read_bytes() == seed


def test_a_folder_swapped_for_a_link_while_it_is_used_leads_nowhere(box: Box, host_secrets: dict[str, str]) -> None:
    """Whatever wins the race, the file API ends in the sandbox's own tree: it has no other."""
    mark = next(iter(host_secrets.values()))
    swap = "cd ~; while :; do rm -rf swap; ln -s / swap; rm swap; mkdir swap; done"
    command = box.sdk.commands.run(swap, background=True)
    try:
        for path in list(host_secrets)[:3] * 5:
            _, _, body = box.request("GET", f"/files?path=/home/user/swap{path}")
            assert mark.encode() not in body, body
    finally:
        command.kill()
    assert all(Path(path).read_text() == mark for path in host_secrets)


def test_the_guest_tells_nothing_of_itself_through_the_file_api(box: Box) -> None:
    """The caller has the token already. What matters: nothing of the host or the installation is in these files."""
    data = str(box.installation.data).encode()
    seed = (box.installation.data / "seed").read_bytes().strip()
    for name in (
        "environ",
        "cmdline",
        "mountinfo",
        "cgroup",
        "maps",
        "mem",
        "fd/0",
        "fd/1",
        "fd/2",
        "fd/3",
        "fd/4",
        "exe",
    ):
        status, _, body = box.request("GET", f"/files?path=/proc/self/{name}")
        assert seed not in body and data not in body, name
        assert status in (200, 400, 403, 404, 500), name
    for name in ("mem", "oom_score_adj", "uid_map", "comm", "fd/1", "fd/5", "fd/6", "exe"):
        box.request("POST", f"/files?path=/proc/self/{name}", b"0", {"Content-Type": "application/octet-stream"})
    assert Path(f"/proc/{box.pid()}/oom_score_adj").read_text() == "0\n"
    assert box.is_well()


# ---- processes, credentials ------------------------------------------------------------------------------------


def test_every_process_is_confined_whoever_it_became(box: Box) -> None:
    box.sdk.commands.run("sleep 100 & sudo sleep 100 & sudo -u www-data sleep 100 & su -c 'sleep 100'", background=True)
    expected = {"guest", "sleep", "root's", "another's"}
    eventually(lambda: len(box.pids()) > len(expected), what="all processes")
    base = int(Path(f"/proc/{box.pid()}/uid_map").read_text().split()[1])
    assert base >= IDS_FROM
    for pid in box.pids():
        try:
            status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        except OSError:
            continue
        assert (status["Seccomp"], status["NoNewPrivs"]) == ("2", "0")
        assert int(status["CapBnd"], 16) == CAPABILITIES
        for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
            assert int(status[name], 16) & ~CAPABILITIES == 0, name
        ids = [int(number) for name in ("Uid", "Gid", "Groups") for number in status[name].split()]
        assert all(base <= number < base + 65_536 for number in ids)
        assert os.readlink(f"/proc/{pid}/ns/user") != os.readlink("/proc/self/ns/user")
    box.run("sudo pkill sleep")


def test_a_file_with_all_capabilities_or_a_setuid_bit_gives_nothing_outside(box: Box) -> None:
    """Root inside may write both; what they give stays within the bounding set and the sandbox's own ids."""
    program = (
        "import os, struct\n"
        "for path in ('/usr/local/bin/cap', '/usr/local/bin/suid'):\n"
        "    with open(path, 'wb') as file: file.write(open('/usr/bin/cat', 'rb').read())\n"
        "    os.chmod(path, 0o755)\n"
        "everything = struct.pack('<5I', 0x02000001, 0xffffffff, 0, 0xffffffff, 0)\n"
        "os.setxattr('/usr/local/bin/cap', 'security.capability', everything)\n"
        "os.chmod('/usr/local/bin/suid', 0o6755)\n"
    )
    assert box.python(program, user="root").status == 0
    capable = box.run("/usr/local/bin/cap /proc/self/status")
    found = re.search(r"CapEff:\t(\w+)", capable.out)
    assert capable.status != 0 or (found and int(found[1], 16) & ~CAPABILITIES == 0)
    assert "CapEff:\t00000000a80425fb" in box.ok("/usr/local/bin/suid /proc/self/status")
    assert box.run("/usr/local/bin/suid /proc/1/environ /dev/mem /proc/kcore").out == ""


def test_no_process_of_the_host_is_in_sight_or_reach(box: Box) -> None:
    daemon = box.installation.daemon
    assert daemon is not None
    seen = box.ok("ls /proc", user="root").split()
    assert max(int(pid) for pid in seen if pid.isdigit()) < 100_000
    program = (
        f"import os\n"
        f"for pid in ({daemon.pid}, {os.getpid()}):\n"
        f"    try: os.kill(pid, 0); print('reached')\n"
        f"    except ProcessLookupError: print('absent')\n"
    )
    if str(daemon.pid) not in seen and str(os.getpid()) not in seen:
        assert box.python(program, user="root").out.split() == ["absent", "absent"]
    text = box.ok("cat /proc/[0-9]*/cmdline | tr '\\0' ' '", user="root")
    assert "penstock up" not in text and "pytest" not in text


def test_a_crash_starts_no_program_of_the_host(box: Box, tmp_path: Path) -> None:
    """core_pattern's program would run as the host's root, fed by the sandbox."""
    pattern, ran = Path("/proc/sys/kernel/core_pattern"), tmp_path / "ran"
    handler = tmp_path / "h"
    handler.write_text(f"#!/bin/sh\ncat >/dev/null; echo $1 >>{ran}\n")
    handler.chmod(0o755)
    before = pattern.read_text()
    try:
        pattern.write_text(f"|{handler} %h")
        for user in USERS:
            assert box.run("ulimit -c unlimited 2>/dev/null; bash -c 'kill -SEGV $$'", user=user).status != 0
        time.sleep(0.3)
    finally:
        pattern.write_text(before)
    assert not ran.exists() or box.id not in ran.read_text()


# ---- its own, and nobody else's --------------------------------------------------------------------------------


def test_two_sandboxes_share_no_place(box: Box, neighbour: Box) -> None:
    mark = f"mark-{secrets.token_hex(4)}"
    for folder in ("/tmp", "/dev/shm", "/run", "/var/tmp", "/home/user"):
        box.ok(f"touch {folder}/{mark}", user="root")
        assert neighbour.run(f"ls {folder}/{mark}").status != 0
        assert not os.path.exists(f"{folder}/{mark}")
    boot_ids = {each.ok("cat /proc/sys/kernel/random/boot_id").strip() for each in (box, neighbour)}
    assert len(boot_ids | {Path("/proc/sys/kernel/random/boot_id").read_text().strip()}) == 3
    shm = "import ctypes; print(ctypes.CDLL(None).shmget(4711, 4096, 0o1666))"
    box.ok(f'python3 -c "{shm}"', user="root")
    assert box.ok("tail -n +2 /proc/sysvipc/shm | wc -l").strip() == "1"
    assert neighbour.ok("tail -n +2 /proc/sysvipc/shm | wc -l").strip() == "0"


def test_nothing_shown_below_proc_and_sys_names_another_sandboxes_disk(box: Box, neighbour: Box) -> None:
    search = (
        "cat /proc/fs/*/*/* /proc/partitions /proc/diskstats /proc/locks /proc/mounts /proc/keys; "
        "cat /sys/block/loop*/loop/backing_file /sys/fs/ext4/*/* 2>/dev/null; ls -R /sys/fs /proc/fs"
    )
    shown = box.run(search, user="root").out
    assert neighbour.id not in shown and str(box.installation.data) not in shown
    assert "loop" not in shown


def test_kernel_events_of_the_hosts_devices_are_not_heard(box: Box) -> None:
    program = "import socket; socket.socket(16, 3, 15)"
    assert "Protocol not supported" in box.python(program, user="root").err


# ---- the network -----------------------------------------------------------------------------------------------


class Listener:
    """TCP and UDP on one port of every address of the host, counting who comes."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, object]] = []
        self._tcp = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
        self.port = self._tcp.getsockname()[1]
        self._udp = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        self._udp.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        self._udp.bind(("::", self.port))
        for serve in (self._serve_tcp, self._serve_udp):
            threading.Thread(target=serve, daemon=True).start()

    def close(self) -> None:
        for sock in (self._tcp, self._udp):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def _serve_tcp(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                accepted, peer = self._tcp.accept()
                self.heard.append(("tcp", peer))
                accepted.close()

    def _serve_udp(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                _, peer = self._udp.recvfrom(100)
                if peer is None:
                    return  # shut down
                self.heard.append(("udp", peer))
                self._udp.sendto(b"here", peer)


@pytest.fixture
def listener() -> Iterator[Listener]:
    made = Listener()
    yield made
    made.close()


def addresses(*prefix: str) -> list[str]:
    """Every address, link-local ones aside, in the namespace that `prefix` enters."""
    shown = subprocess.run([*prefix, "ip", "-j", "addr"], capture_output=True, text=True, check=True).stdout
    return [each["local"] for link in json.loads(shown) for each in link["addr_info"] if each["scope"] != "link"]


def outer_addresses(installation: Installation) -> list[str]:
    """What the router routes to its slots."""
    router = f"--net={installation.data / 'run/router'}"
    shown = subprocess.run(["nsenter", router, "ip", "-j", "route"], capture_output=True, text=True, check=True).stdout
    return [route["dst"] for route in json.loads(shown) if route.get("dev", "").startswith("vs")]


@pytest.mark.parametrize("user", USERS)
def test_the_host_and_its_ports_are_out_of_reach(box: Box, listener: Listener, user: str) -> None:
    installation = box.installation
    ours = [urlsplit(installation.env[name]).port for name in ("E2B_API_URL", "E2B_SANDBOX_URL")]
    router = addresses("nsenter", f"--net={installation.data / 'run/router'}")
    hosts = [address for address in {*addresses(), *router, "10.200.0.1"} if not address.startswith("127.")]
    targets = [f"{protocol}:{host}:{listener.port}" for host in hosts for protocol in ("tcp", "udp") if host != "::1"]
    targets += [f"tcp:{host}:{port}" for host in hosts for port in (*ours, 22) if host != "::1"]
    outcomes = box.attempts("reach", *targets, user=user)
    assert succeeded(outcomes) == {}
    assert listener.heard == []


def test_private_shared_and_metadata_ranges_are_out_of_reach(box: Box) -> None:
    targets = [f"{protocol}:{each}" for each in CLOSED for protocol in ("tcp", "udp")]
    assert succeeded(box.attempts("reach", *targets)) == {}


def test_other_sandboxes_are_out_of_reach(box: Box, neighbour: Box) -> None:
    served = neighbour.sdk.commands.run(
        "python3 -c 'import socket; s = socket.socket(2, 2); s.bind((\"\", 8001)); s.sendto(*s.recvfrom(9))' & "
        "python3 -m http.server 8000 2>&1",
        background=True,
    )
    eventually(lambda: neighbour.run("curl -s localhost:8000 | head -1").out, what="the server")
    others = outer_addresses(box.installation)
    assert len(others) >= 2
    targets = [f"{protocol}:{each}:{port}" for each in others for protocol, port in (("tcp", 8000), ("udp", 8001))]
    targets += [f"tcp:{each}:49983" for each in others]
    assert succeeded(box.attempts("reach", *targets)) == {}
    assert neighbour.run("ss -Htn state established '( sport = :8000 )' | wc -l").out.strip() == "0"
    served.kill()


def test_sockets_of_the_host_are_not_in_its_world(box: Box, tmp_path: Path) -> None:
    """Abstract ones belong to a network namespace, named ones to a file system; it shares neither."""
    name = f"penstock-test-{secrets.token_hex(4)}"
    with socket.socket(socket.AF_UNIX) as abstract, socket.socket(socket.AF_UNIX) as named:
        abstract.bind(f"\0{name}")
        abstract.listen()
        named.bind(str(tmp_path / "s"))
        named.listen()
        run = box.installation.data / "run"
        paths = [str(tmp_path / "s"), *(str(run / each) for each in ("daemon.sock", "feed.sock", "zygote.sock"))]
        paths += ["/run/docker.sock", "/run/dbus/system_bus_socket", "/run/systemd/private", "/var/run/docker.sock"]
        program = (
            "import socket\n"
            f"for address in {['@' + name, *paths]!r}:\n"
            "    sock = socket.socket(socket.AF_UNIX)\n"
            "    try: sock.connect(address.replace('@', chr(0), 1)); print('reached', address)\n"
            "    except OSError as error: print(type(error).__name__)\n"
        )
        ran = box.python(program, user="root")
        assert set(ran.out.split()) == {"ConnectionRefusedError", "FileNotFoundError"}, ran
    assert name not in box.ok("cat /proc/net/unix", user="root")


def test_the_hosts_neighbour_table_cannot_be_filled(box: Box) -> None:
    """One table of 1,024 for all: questions that nobody answers must not stay in it."""
    program = (
        "import socket, struct\n"
        "index = socket.if_nametoindex('eth0')\n"
        "for n in range(2000):\n"
        "    with socket.socket(2, 2 | 2048) as s:\n"
        "        try: s.sendmsg([b'x'], [(0, 8, struct.pack('=i4s4s', index, bytes(4), bytes(4)))], 4,\n"
        "                       (f'12.0.{n // 250}.{n % 250}', 9))\n"
        "        except OSError: pass\n"
    )
    assert box.python(program).status == 0
    prefix = ["nsenter", "-t", str(box.pid()), "-n", "ip", "-4", "neigh", "show", "nud"]
    asked = subprocess.run([*prefix, "incomplete"], capture_output=True, text=True, check=True).stdout
    assert asked == ""
    kept = subprocess.run([*prefix, "permanent"], capture_output=True, text=True, check=True).stdout
    assert kept.startswith("10.200.0.1 ")


# ---- its pid 1 -------------------------------------------------------------------------------------------------


def test_root_inside_cannot_kill_the_guest_by_any_signal_but_sigterm(installation: Installation) -> None:
    """The kernel drops signals from inside for which pid 1 has no handler, SIGKILL and SIGSTOP too."""
    with created(installation) as own:
        pid = own.pid()
        numbers = [number for number in range(1, 65) if number not in (signal.SIGTERM, 32, 33)]
        own.run("; ".join(f"kill -{number} 1" for number in numbers), user="root")
        own.run("kill -KILL -1; kill -TERM -1", user="user")
        assert own.is_well()
        assert own.pid() == pid


def test_root_inside_may_end_its_own_sandbox_and_nothing_is_left(installation: Installation) -> None:
    """SIGTERM to pid 1 is the sandbox's own shutdown: processes end, then everything of it is gone, and it is known."""
    with created(installation) as own:
        pid = own.pid()
        own.sdk.commands.run("sleep 300", background=True)
        with contextlib.suppress(Exception):
            own.run("kill -TERM 1", user="root", timeout=5)
        eventually(lambda: not Path(f"/proc/{pid}").exists(), what="the guest's end")
        eventually(lambda: not own.sdk.is_running(), what="the news of it")
        eventually(lambda: own.id not in installation.run("sandbox", "list").stdout, what="its removal from the list")
    assert installation.leaks().returncode == 0


def test_the_guest_outlives_limits_that_root_inside_puts_on_it(box: Box) -> None:
    """Same ids, so prlimit is allowed; it may break its own sandbox, and no other."""
    program = (
        "import resource\n"
        "for limit, value in ((resource.RLIMIT_AS, 1 << 20), (resource.RLIMIT_CPU, 1), (resource.RLIMIT_FSIZE, 0)):\n"
        "    try: resource.prlimit(1, limit, (value, value))\n"
        "    except OSError as error: print(error)\n"
    )
    with created(box.installation) as own:
        own.python(program, user="root")
        with contextlib.suppress(Exception):
            own.run("true", timeout=5)
    assert box.is_well()
    assert box.installation.leaks().returncode == 0

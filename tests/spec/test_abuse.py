"""Abuse: what a sandbox or a client does to be a nuisance. Each gets a clear answer, and a neighbour does not notice.

Every test ends by asking a neighbour, made before, to run a command and to show its file; and the guest of the abused
sandbox is the same process as before, unless the test says otherwise.
"""

from __future__ import annotations

import contextlib
import json
import resource
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.installation import Installation
from tests.sandboxes import Box, created, eventually, exec_ms, ingress_address, resident_mib

pytestmark = [pytest.mark.root, pytest.mark.timeout(120)]

MIB = 1 << 20
PAGE = resource.getpagesize()


@pytest.fixture(scope="module")
def neighbour(installation: Installation) -> Iterator[Box]:
    with created(installation, timeout=600) as made:
        made.ok("echo precious > ~/precious")
        yield made


@pytest.fixture
def box(installation: Installation, neighbour: Box) -> Iterator[Box]:
    with created(installation) as made:
        guest = made.pid()
        yield made
        assert made.is_well()
        assert made.pid() == guest
    undisturbed(neighbour)


def undisturbed(neighbour: Box) -> None:
    assert neighbour.ok("cat ~/precious; python3 -c 'print(6 * 7)'") == "precious\n42\n"


# ---- processes -------------------------------------------------------------------------------------------------


FORK_BOMB = "python3 -c '\nimport os\nwhile True:\n    try: os.fork()\n    except OSError: pass\n'"


def test_a_fork_bomb_meets_its_limit_and_the_sandbox_can_be_killed(installation: Installation, neighbour: Box) -> None:
    with created(installation) as own:
        guest = own.pid()
        own.sdk.commands.run(FORK_BOMB, background=True, timeout=60)
        eventually(lambda: len(own.pids()) > 100, what="a bomb")
        assert exec_ms(neighbour) < 500
        assert max(len(own.pids()) for _ in range(5)) <= 4096 + 16
        assert own.pid() == guest
        since = time.monotonic()
        own.kill()
        assert time.monotonic() - since < 10
        eventually(lambda: own.pids() == [], what="the end of all its processes")
    undisturbed(neighbour)


def test_processes_that_ignore_every_signal_end_with_their_sandbox(installation: Installation, neighbour: Box) -> None:
    deaf = (
        "import os, signal, time\n"
        "for _ in range(20):\n"
        "    if os.fork() == 0: os.setsid(); break\n"
        "for n in range(1, 65):\n"
        "    try: signal.signal(n, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\n"
        "time.sleep(600)\n"
    )
    with created(installation) as own:
        own.sdk.files.write("/tmp/deaf.py", deaf)
        own.sdk.commands.run("python3 /tmp/deaf.py", background=True)
        own.run("kill -STOP -1", user="www-data")
        eventually(lambda: len(own.pids()) > 20, what="twenty deaf processes")
        since = time.monotonic()
        own.kill()
        assert time.monotonic() - since < 2
        assert own.pids() == []
    undisturbed(neighbour)


def test_a_command_that_ignores_sigterm_can_be_killed_by_its_client(box: Box) -> None:
    command = box.sdk.commands.run("trap '' TERM INT HUP; echo deaf; while :; do sleep 1; done", background=True)
    box.run("kill -TERM -1")
    assert command.kill() is True
    eventually(lambda: "deaf" not in box.ok("ps -eo args | grep -v grep || true"), what="its end")


def test_inotify_instances_of_others_are_not_taken(box: Box, neighbour: Box) -> None:
    program = (
        "import ctypes, time\nc = ctypes.CDLL(None)\nn = 0\nwhile c.inotify_init() >= 0 and n < 5000: n += 1\n"
        "print(n, flush=True)\ntime.sleep(60)"
    )
    for user in ("root", "user"):
        box.sdk.files.write(f"/tmp/watch-{user}.py", program, user="root")
        box.sdk.commands.run(f"timeout 5 python3 /tmp/watch-{user}.py", background=True, user=user)
    counted = box.python(program.replace("time.sleep(60)", ""), user="root")
    assert int(counted.out) <= 128
    watching = neighbour.sdk.files.watch_dir("/home/user")
    neighbour.sdk.files.write("/home/user/news", "x")
    eventually(watching.get_new_events, what="an event at the neighbour")
    watching.stop()
    host = subprocess.run(
        ["python3", "-c", "import ctypes; print(ctypes.CDLL(None).inotify_init())"], capture_output=True
    )
    assert int(host.stdout) >= 0


def test_thousands_of_descriptors_stay_its_own_affair(box: Box) -> None:
    program = (
        "import os\nn = 0\n"
        "try:\n    while True: os.dup(0); n += 1\nexcept OSError as error: print(n, error.errno)\n"
        "fds = os.listdir('/proc/self/fd') if False else None\n"
    )
    ran = [box.python(program) for _ in range(2)]
    count, number = map(int, ran[0].out.split())
    assert number == 24 and 1000 <= count <= 1 << 20
    assert (
        int(Path("/proc/sys/fs/file-nr").read_text().split()[0]) < int(Path("/proc/sys/fs/file-max").read_text()) // 2
    )


def test_huge_output_waits_for_a_slow_reader_in_bounded_memory(box: Box) -> None:
    """200 MB to a client that stops reading: the writer is held back, neither guest nor ingress grows."""
    body = json.dumps({"process": {"cmd": "/bin/sh", "args": ["-c", "yes | head -c 200M"]}}).encode()
    frame = b"\0" + struct.pack(">I", len(body)) + body
    headers = {**box.headers(), "Content-Type": "application/connect+json", "Connect-Protocol-Version": "1"}
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    before = resident_mib(box.pid())
    ingress = json.loads((box.installation.data / "run/ingress.json").read_text())["pid"]
    ingress_before = resident_mib(ingress)
    with socket.create_connection(ingress_address(box.installation)) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        request = (
            f"POST /process.Process/Start HTTP/1.1\r\nHost: localhost\r\n{head}Content-Length: {len(frame)}\r\n\r\n"
        )
        sock.sendall(request.encode() + frame)
        for _ in range(10):
            sock.recv(4096)
            time.sleep(0.05)
        assert exec_ms(box, 5) < 500
        assert resident_mib(box.pid()) - before < 16
        assert resident_mib(ingress) - ingress_before < 32


# ---- memory ----------------------------------------------------------------------------------------------------


def test_a_memory_hog_is_killed_and_the_guest_is_not(box: Box) -> None:
    ran = box.python("a = []\nwhile True: a.append(bytearray(1 << 24))")
    assert ran.status in (137, -1), ran  # SIGKILL by the kernel


def test_shared_memory_counts_and_ends_with_a_clear_error(box: Box) -> None:
    ran = box.run("for n in 1 2 3; do dd if=/dev/zero of=/dev/shm/$n bs=1M count=2000 2>&1; done")
    assert "No space left on device" in ran.out + ran.err or ran.status == 137
    used = int(box.ok("df -m --output=used /dev/shm | tail -1"))
    assert used <= 512
    box.ok("rm /dev/shm/*")


def test_page_cache_is_reclaimed_not_killed_for(box: Box) -> None:
    """800 MiB written and read twice under a limit of 1 GiB beside 500 MiB of anonymous memory."""
    program = (
        "import os\na = bytearray(400 << 20)\n"
        "with open('/home/user/big', 'wb') as file:\n    for _ in range(700): file.write(bytes(1 << 20))\n"
        "for _ in range(2):\n    with open('/home/user/big', 'rb') as file:\n        while file.read(1 << 20): pass\n"
        "os.unlink('/home/user/big')\nprint('done', len(a))"
    )
    assert box.python(program, timeout=60).out.startswith("done")


SOCKET_HOG = """
import socket
kept = []
def fill(pair):
    a, b, address = pair
    for sock in (a, b):
        sock.setblocking(False)
        for option in (7, 8):
            try: sock.setsockopt(socket.SOL_SOCKET, option, 1 << 24)
            except OSError: pass
    for _ in range(40):
        try: a.sendto(bytes(60_000), address) if address else a.send(bytes(60_000))
        except OSError: break
    kept.append((a, b))
def udp():
    b = socket.socket(2, 2); b.bind(('127.0.0.1', 0))
    return socket.socket(2, 2), b, b.getsockname()
listener = socket.create_server(('127.0.0.1', 0))
def tcp():
    a = socket.create_connection(listener.getsockname())
    return a, listener.accept()[0], None
def ping():
    a = socket.socket(2, 2, 1)
    return a, a, ('127.0.0.1', 0)
def unix():
    a, b = socket.socketpair()
    return a, b, None
def netlink():
    a = socket.socket(16, 3, 2); a.bind((0, 0))
    return a, a, a.getsockname()
for make in (udp, tcp, ping, netlink):
    for _ in range(800):
        try: fill(make())
        except OSError as error: print(make.__name__, error); break
print('full', flush=True)
import time; time.sleep(3)
"""


def test_socket_buffers_count_too(box: Box) -> None:
    """Neither the sandbox's limit nor the host-wide tcp_mem and udp_mem can be passed by data nobody reads."""
    before, available = socket_pages(), available_mib()
    box.sdk.files.write("/tmp/hog.py", SOCKET_HOG)
    command = box.sdk.commands.run("python3 /tmp/hog.py", background=True, timeout=60)
    seen = ""
    with contextlib.suppress(Exception):
        for out, _, _ in command:
            seen += out or ""
            if "full" in seen:
                break
    assert "full" in seen
    assert (socket_pages() - before) * PAGE < 256 * MIB
    assert available - available_mib() < 1024 + 256
    command.kill()


def socket_pages() -> int:
    total = 0
    for line in Path("/proc/net/sockstat").read_text().splitlines():
        words = line.split()
        if words[0] in ("TCP:", "UDP:"):
            total += int(words[words.index("mem") + 1])
    return total


def available_mib() -> int:
    return int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) // 1024


# ---- disk ------------------------------------------------------------------------------------------------------


def test_a_disk_filler_meets_its_own_limit(box: Box) -> None:
    ran = box.run("cat /dev/zero > ~/fill", timeout=60)
    assert "No space left on device" in ran.err
    refused = box.sdk.commands.run("true")  # a command needs no disk
    assert refused.exit_code == 0
    status, _, body = box.request(
        "POST", "/files?path=/home/user/more", bytes(4 * MIB), {"Content-Type": "application/octet-stream"}
    )
    assert status == 507, body
    assert "space" in json.loads(body)["message"].lower()
    box.ok("rm ~/fill ~/more 2>/dev/null; echo again > ~/again")


def test_a_filler_of_inodes_meets_its_own_limit(box: Box) -> None:
    program = (
        "import os\nos.makedirs('/home/user/many'); os.chdir('/home/user/many')\nn = 0\n"
        "try:\n    while True: os.close(os.open(str(n), os.O_CREAT)); n += 1\n"
        "except OSError as error: print(n, error.errno)\n"
    )
    count, number = map(int, box.python(program, timeout=60).out.split())
    assert number == 28 and count < 200_000
    box.ok("cd ~/many; rm 0 1 2 3 4 5 6 7 8 9")

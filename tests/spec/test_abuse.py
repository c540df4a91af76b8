"""Abuse: what a sandbox or a client does to be a nuisance. Each gets a clear answer, and a neighbour does not notice.

Every test ends by asking a neighbour, made before, to run a command and to show its file; and the guest of the abused
sandbox is the same process as before, unless the test says otherwise.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import resource
import socket
import statistics
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from e2b import AuthenticationException, InvalidArgumentException, SandboxException
from tests.installation import Installation
from tests.sandboxes import Box, create, created, eventually, ingress_address, options

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


def exec_times_ms(box: Box, count: int = 12) -> float:
    """Median of a command's round trip."""
    times = []
    for _ in range(count):
        since = time.monotonic()
        box.ok("true")
        times.append((time.monotonic() - since) * 1000)
    return statistics.median(times)


# ---- processes -------------------------------------------------------------------------------------------------


FORK_BOMB = "python3 -c '\nimport os\nwhile True:\n    try: os.fork()\n    except OSError: pass\n'"


def test_a_fork_bomb_meets_its_limit_and_the_sandbox_can_be_killed(installation: Installation, neighbour: Box) -> None:
    own = create(installation)
    guest = own.pid()
    own.sdk.commands.run(FORK_BOMB, background=True, timeout=60)
    eventually(lambda: len(own.pids()) > 100, what="a bomb")
    assert exec_times_ms(neighbour) < 500
    most = max(len(own.pids()) for _ in range(5))
    assert most <= 4096 + 16
    assert own.pid() == guest
    since = time.monotonic()
    own.kill()
    assert time.monotonic() - since < 10
    eventually(lambda: own.pids() == [], what="the end of all its processes")
    undisturbed(neighbour)


def test_processes_that_ignore_every_signal_end_with_their_sandbox(installation: Installation, neighbour: Box) -> None:
    own = create(installation)
    deaf = (
        "import os, signal, time\n"
        "for _ in range(20):\n"
        "    if os.fork() == 0: os.setsid(); break\n"
        "for n in range(1, 65):\n"
        "    try: signal.signal(n, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\n"
        "time.sleep(600)\n"
    )
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
        assert exec_times_ms(box, 5) < 500
        assert resident_mib(box.pid()) - before < 16
        assert resident_mib(ingress) - ingress_before < 32


def resident_mib(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE / MIB


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


# ---- bad requests to the guest ---------------------------------------------------------------------------------


CONNECT = {"Connect-Protocol-Version": "1"}
JSON = {"Content-Type": "application/json", **CONNECT}
PROTO_STREAM = {"Content-Type": "application/connect+proto", **CONNECT}
STREAM = {"Content-Type": "application/connect+json", **CONNECT}


@pytest.mark.parametrize(
    ("path", "body", "headers", "status", "code"),
    [
        ("/filesystem.Filesystem/Stat", b"{", JSON, 400, "invalid_argument"),
        ("/filesystem.Filesystem/Stat", b"[]", JSON, 400, "invalid_argument"),
        ("/filesystem.Filesystem/Stat", b'{"path": 5}', JSON, 400, "invalid_argument"),
        ("/filesystem.Filesystem/Stat", b"\xff\xfe{}", JSON, 400, "invalid_argument"),
        ("/filesystem.Filesystem/Stat", b'{"path": "/a\\u0000b"}', JSON, 400, "invalid_argument"),
        ("/filesystem.Filesystem/Stat", b"[" * 100_000, JSON, 400, "invalid_argument"),
        ("/filesystem.Filesystem/Stat", b'{"path": "' + b"a/" * 5_000 + b'"}', JSON, 400, "invalid_argument"),
        ("/filesystem.Filesystem/Stat", b"{}", {"Content-Type": "application/proto", **CONNECT}, 415, None),
        ("/filesystem.Filesystem/Stat", b"{}", {"Content-Type": "application/grpc"}, 415, None),
        ("/filesystem.Filesystem/NoSuch", b"{}", JSON, 404, None),
        ("/process.Process/List", b"x" * (5 * MIB), JSON, 429, "resource_exhausted"),
        ("/process.Process/Start", b"\0\xff\xff\xff\xff{", PROTO_STREAM, 415, None),
    ],
    ids=lambda value: None if isinstance(value, bytes | dict) else str(value),
)  # fmt: skip
def test_a_bad_call_is_told_what_is_wrong(
    shared: Box, path: str, body: bytes, headers: dict[str, str], status: int, code: str | None
) -> None:
    got, _, answer = shared.request("POST", path, body, headers)
    assert got == status, answer
    if code:
        assert json.loads(answer)["code"] == code
    assert shared.is_well()


@pytest.fixture(scope="module")
def shared(installation: Installation) -> Iterator[Box]:
    """For requests that must leave no trace at all."""
    with created(installation) as made:
        guest = made.pid()
        yield made
        assert made.pid() == guest


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"\0\xff\xff\xff\xff{", "resource_exhausted"),
        (b"\0" + struct.pack(">I", 5 * MIB) + b"{", "resource_exhausted"),
        (b"\x01\0\0\0\x02{}", None),  # compressed, and no encoding was named
        (b"\x80\0\0\0\x02{}", "invalid_argument"),  # flags that do not exist
        (b"\0\0\0\0\x05{}", "invalid_argument"),  # ends in the middle of a message
        (b"\0\0\0\0\x02{]", "invalid_argument"),
        (b"", "invalid_argument"),
        (b'\0\0\0\0\x1a{"process":{"cmd":"/a\\u0000"}}'[:5] + b'{"process":{"cmd":"a\\u0000"}}'[:26], None),
    ],
)
def test_a_bad_stream_ends_with_a_code(shared: Box, body: bytes, code: str | None) -> None:
    """The answer to a stream is 200 with the error in its last message, or a plain refusal."""
    status, _, answer = shared.request("POST", "/process.Process/Start", body, STREAM)
    if status == 200:
        assert answer[0] & 2, answer
        found = json.loads(answer[5:])["error"]["code"]
    else:
        assert 400 <= status < 500, answer
        found = json.loads(answer)["code"]
    assert code is None or found == code
    assert shared.is_well()


def test_unknown_users_are_refused_by_name(shared: Box) -> None:
    with pytest.raises((AuthenticationException, InvalidArgumentException, SandboxException)) as refused:
        shared.sdk.commands.run("id", user="nobody-here")
    assert "nobody-here" in str(refused.value)
    for name in ("root:x", "../root", "a\0b", "", "0"):
        basic = base64.b64encode(f"{name}:".encode()).decode()
        body = json.dumps({"path": "/root/x"}).encode()
        status, _, answer = shared.request(
            "POST", "/filesystem.Filesystem/MakeDir", body, {**JSON, "Authorization": f"Basic {basic}"}
        )
        assert status in (200, 400, 401, 409), (name, answer)
        if status == 200:
            assert name in ("", "root:x")  # root, or the default


def test_paths_with_nul_and_dots(shared: Box) -> None:
    for path in ("/home/user/a%00b", "%00", "/etc/passwd%00.txt"):
        for method in ("GET", "POST"):
            status, _, body = shared.request(method, f"/files?path={path}", b"x" if method == "POST" else None)
            assert status == 400, (path, status, body)
    status, _, body = shared.request("GET", "/files?path=/home/user/../../../../../../etc/hostname")
    assert (status, body.strip()) == (200, shared.ok("cat /etc/hostname").strip().encode())
    status, _, _ = shared.request("GET", "/files?path=" + "../" * 3_000 + "etc/hostname")
    assert status in (400, 414)


# ---- bad clients of the ingress ----------------------------------------------------------------------------------


def talk(installation: Installation, data: bytes, within_s: float = 5.0) -> bytes:
    """Send, and read until the end or for `within_s`."""
    got = b""
    with (
        socket.create_connection(ingress_address(installation), timeout=within_s) as sock,
        contextlib.suppress(OSError),
    ):
        sock.sendall(data)
        while piece := sock.recv(65_536):
            got += piece
    return got


def head_of(box: Box, method: str = "POST", path: str = "/files?path=/home/user/x", **more: str) -> bytes:
    headers = {"Host": "localhost", **box.headers(), **{name.replace("_", "-"): value for name, value in more.items()}}
    return (f"{method} {path} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in headers.items()) + "\r\n").encode()


@pytest.mark.parametrize(
    ("what", "status"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X-Big: " + b"a" * 200_000 + b"\r\n\r\n", b"431"),
        (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"".join(b"X-%d: a\r\n" % n for n in range(5_000)) + b"\r\n", b"431"),
        (b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", b"4"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nHost: x\r\n folded\r\n\r\n", b"400"),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", b"400"),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", b"400"),
        (b"\x16\x03\x01\x02\x00\x01\x00\n\r\n\r\n", b"400"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b""),
        (b"\0" * 100_000, b"431"),
    ],
    ids=["big-header", "many-headers", "long-target", "two-hosts", "no-host", "folded", "both-framings", "negative",
         "tls-on-plain", "http2", "zeros"],
)  # fmt: skip
def test_a_bad_head_is_refused_at_once(installation: Installation, shared: Box, what: bytes, status: bytes) -> None:
    since = time.monotonic()
    got = talk(installation, what)
    assert time.monotonic() - since < 4
    if status:
        assert got.startswith(b"HTTP/1.1 " + status), got[:200]
    assert shared.is_well()


@pytest.mark.parametrize(
    "body",
    [
        b"zz\r\nhello\r\n0\r\n\r\n",
        b"5\r\nhelloX\r\n0\r\n\r\n",
        b"ffffffffffffffffff\r\n",
        b"-5\r\nhello\r\n",
        b"5;" + b"a" * 100_000,
    ],
    ids=["not-hex", "longer-than-said", "overflow", "negative", "endless-extension"],
)  # fmt: skip
def test_a_broken_chunked_body_is_no_request(installation: Installation, shared: Box, body: bytes) -> None:
    shared.run("rm -f ~/x")
    got = talk(
        installation, head_of(shared, Transfer_Encoding="chunked", Content_Type="application/octet-stream") + body
    )
    assert not got.startswith(b"HTTP/1.1 2"), got
    assert shared.is_well()


def test_slow_heads_are_cut_and_do_not_slow_others(installation: Installation, shared: Box) -> None:
    """200 clients that send a byte now and then: each is let go of after ten seconds."""
    socks = [socket.create_connection(ingress_address(installation)) for _ in range(200)]
    quick = exec_times_ms(shared, 5)
    since, open_ = time.monotonic(), list(socks)
    for sock in socks:
        sock.setblocking(False)
    while open_ and time.monotonic() - since < 15:
        for sock in list(open_):
            try:
                sock.send(b"G")
                if sock.recv(100) == b"":
                    open_.remove(sock)
            except BlockingIOError:
                pass
            except OSError:
                open_.remove(sock)
        time.sleep(0.5)
    assert open_ == []
    assert quick < 500
    for sock in socks:
        sock.close()


def test_websocket_abuse(installation: Installation, shared: Box) -> None:
    """An upgrade nobody serves, and one whose client then sends rubbish."""
    wanted = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec_WebSocket_Version": "13",
        "Sec_WebSocket_Key": "x" * 24,
    }
    got = talk(installation, head_of(shared, "GET", "/files", **wanted) + os.urandom(65_536))
    assert got.startswith(b"HTTP/1.1 4"), got[:100]
    server = (
        "import socket\ns = socket.create_server(('', 9000))\nwhile True:\n    c, _ = s.accept(); c.recv(65536)\n"
        "    c.send(b'HTTP/1.1 101 Switching Protocols\\r\\nConnection: upgrade\\r\\nUpgrade: websocket\\r\\n\\r\\n')\n"
        "    n = 0\n    while d := c.recv(65536): n += len(d)\n    open('/tmp/count', 'w').write(str(n))\n"
    )
    shared.sdk.files.write("/tmp/ws.py", server)
    running = shared.sdk.commands.run("python3 /tmp/ws.py", background=True)
    eventually(lambda: shared.run("ss -Hltn 'sport = :9000'").out, what="the server")
    host = {**wanted, "E2b-Sandbox-Port": "9000"}
    with socket.create_connection(ingress_address(installation), timeout=5) as sock:
        sock.sendall(head_of(shared, "GET", "/", **host))
        assert sock.recv(4096).startswith(b"HTTP/1.1 101")
        sock.sendall(os.urandom(3 * MIB))
    eventually(lambda: shared.run("cat /tmp/count").out == str(3 * MIB), what="all bytes at the server")
    running.kill()


def test_ten_thousand_idle_connections(installation: Installation, shared: Box) -> None:
    """Beyond its descriptors the ingress lets go of who has been idle longest, or says 503; requests go on."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = min(10_000, hard - 1_000)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, count + 1_000)), hard))
    ingress = json.loads((installation.data / "run/ingress.json").read_text())["pid"]
    before = resident_mib(ingress)
    socks: list[socket.socket] = []
    try:
        for _ in range(count):
            socks.append(socket.create_connection(ingress_address(installation), timeout=5))
        assert exec_times_ms(shared, 5) < 500
        assert resident_mib(ingress) - before < 200
    finally:
        for sock in socks:
            sock.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert shared.is_well()


def test_more_connections_to_one_guest_than_it_takes(installation: Installation, shared: Box) -> None:
    """Requests that never end their body hold a connection to the guest each; others are told 503 or wait."""
    socks = []
    for _ in range(1_300):
        sock = socket.create_connection(ingress_address(installation), timeout=5)
        sock.sendall(head_of(shared, Content_Length="1000000", Content_Type="application/octet-stream"))
        socks.append(sock)
    try:
        status, _, _ = shared.request("GET", "/health")
        assert status in (204, 429, 503)
    finally:
        for sock in socks:
            sock.close()
    eventually(lambda: shared.request("GET", "/health")[0] == 204, what="room again")
    assert shared.is_well()


# ---- the node is full --------------------------------------------------------------------------------------------


def api(installation: Installation, method: str, path: str, body: Any = None) -> httpx.Response:
    return httpx.request(
        method,
        installation.env["E2B_API_URL"] + path,
        headers={"X-API-Key": installation.env["E2B_API_KEY"]},
        json=body,
        timeout=60,
    )


def test_no_free_slot_is_said_with_a_time_to_return(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_SLOTS_MAX", "2")
    small = Installation(tmp_path / "data").up()
    try:
        boxes = [create(small) for _ in range(2)]
        since = time.monotonic()
        refused = api(small, "POST", "/sandboxes", {"templateID": "base"})
        assert time.monotonic() - since < 10  # before any client has given up waiting
        assert (refused.status_code, refused.json()["error_code"]) == (503, "no_free_slot"), refused.text
        assert int(refused.headers["Retry-After"]) >= 1
        assert refused.json()["message"]
        assert all(box.is_well() for box in boxes)
        boxes[0].kill()
        again = eventually(lambda: _created_or_none(small), what="a place for the next")
        assert again.is_well()
        assert boxes[1].is_well()
    finally:
        small.destroy()


def _created_or_none(installation: Installation) -> Box | None:
    made = api(installation, "POST", "/sandboxes", {"templateID": "base", "timeout": 60})
    if made.status_code != 201:
        return None
    from e2b import Sandbox

    return Box(installation, Sandbox.connect(made.json()["sandboxID"], **options(installation)))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 700 MiB of its own, on a loop device."""
    image, point = tmp_path / "image", tmp_path / "point"
    point.mkdir()
    with image.open("wb") as file:
        file.truncate(700 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", str(image)], check=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(point)], check=True)
    yield point
    subprocess.run(["umount", str(point)], check=True)


def test_a_full_disk_on_the_host(small_disk: Path) -> None:
    """What runs goes on, what is new is refused clearly, and space given back is used: nothing needs a restart."""
    tight = Installation(small_disk / "data", ("--config", str(_settings(small_disk)))).up()
    filler = small_disk / "filler"
    try:
        old = create(tight)
        old.ok("echo kept > ~/mark; sync ~/mark")
        _fill(filler)
        assert old.run("cat ~/mark").out == "kept\n"
        refused = api(tight, "POST", "/sandboxes", {"templateID": "base"})
        for _ in range(12):  # a few prepared ones may still be lent
            if refused.status_code != 201:
                break
            refused = api(tight, "POST", "/sandboxes", {"templateID": "base"})
        assert refused.status_code in (429, 500, 503, 507), refused.text
        assert refused.json()["message"]
        assert tight.daemon is not None and tight.daemon.poll() is None
        assert old.run("echo alive").out == "alive\n"
        filler.unlink()
        again = eventually(lambda: _created_or_none(tight), within_s=20, what="a create after space came back")
        assert again.is_well()
        again.kill()
    finally:
        filler.unlink(missing_ok=True)
        tight.destroy()


def _settings(folder: Path) -> Path:
    path = folder / "penstock.toml"
    path.write_text("slots_ready = 2\n")
    return path


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        for size in (MIB, 4096, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))
        os.fsync(file.fileno())

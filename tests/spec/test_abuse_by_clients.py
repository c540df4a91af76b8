"""Requests and connections that are broken, endless or too many: each is told what is wrong, and others go on."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import resource
import socket
import struct
import time
from collections.abc import Iterator

import pytest
from e2b import AuthenticationException, InvalidArgumentException, SandboxException
from tests.installation import Installation
from tests.sandboxes import Box, created, eventually, exec_ms, ingress_address, resident_mib

pytestmark = [pytest.mark.root, pytest.mark.timeout(120)]

MIB = 1 << 20


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
    quick = exec_ms(shared, 5)
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
        assert exec_ms(shared, 5) < 500
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

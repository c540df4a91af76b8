"""The guest's HTTP server, driven by raw bytes over its socket."""

from __future__ import annotations

import importlib
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import penstock.guest.main as guest_main
from tests.unit.guest.house import RunningGuest, start_guest

CALL = b"POST /process.Process/List HTTP/1.1\r\nHost: a\r\n"
JSON_CALL = CALL + b"Content-Type: application/json\r\n"


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGuest]:
    guest = start_guest(tmp_path_factory.mktemp("guest"), env={"FROM": "birth"})
    yield guest
    assert guest.stop() == 0
    faults = [line for line in guest.log() if line["event"] == "fault"]
    assert faults == []


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGuest]:
    guest = start_guest(tmp_path_factory.mktemp("locked"), token="secret")
    yield guest
    assert guest.stop() == 0


def receive_all(sock: socket.socket) -> bytes:
    got = b""
    while True:
        try:
            data = sock.recv(65536)
        except ConnectionResetError:
            return got
        if not data:
            return got
        got += data


def exchange(guest: RunningGuest, raw: bytes) -> bytes:
    """Send, close our half, and read until the guest closes."""
    with guest.raw() as sock:
        sock.sendall(raw)
        sock.shutdown(socket.SHUT_WR)
        return receive_all(sock)


def test_health_needs_nothing(locked: RunningGuest) -> None:
    locked.headers.clear()
    status, fields, body = locked.request("GET", "/health")
    assert (status, body, fields["cache-control"]) == (204, b"", "no-store")
    locked.headers["X-Access-Token"] = "secret"


@pytest.mark.parametrize(
    ("sent", "status"), [({}, 401), ({"X-Access-Token": "wrong"}, 401), ({"X-Access-Token": "secret"}, 200)]
)
def test_envs_and_calls_need_the_token(locked: RunningGuest, sent: dict[str, str], status: int) -> None:
    locked.headers = dict(sent)
    assert locked.request("GET", "/envs")[0] == status
    answered, body = locked.call("List", {})
    assert answered == status
    if status == 401:
        assert body["code"] == 401
    locked.headers = {"X-Access-Token": "secret"}


def test_the_daemon_needs_no_token(locked: RunningGuest) -> None:
    locked.headers.clear()
    assert locked.request("GET", "/envs", control=True)[0] == 200
    locked.headers["X-Access-Token"] = "secret"


def test_envs_are_the_sandboxes_and_ours(guest: RunningGuest) -> None:
    body = json.loads(guest.request("GET", "/envs")[2])
    assert body == {
        "FROM": "birth",
        "E2B_SANDBOX": "true",
        "E2B_SANDBOX_ID": "itest",
        "E2B_TEMPLATE_ID": "base",
        "PENSTOCK_NOTICE": "/run/penstock/notice.json",
    }


def test_init_is_hidden_from_the_public_and_changes_everything(tmp_path: Path) -> None:
    guest = start_guest(tmp_path, env={"A": "1"})
    try:
        wish = {"envVars": {"B": "2", "E2B_SANDBOX": "no"}, "accessToken": "new", "defaultUser": "nobody"}
        assert guest.request("POST", "/init", json.dumps(wish).encode())[0] == 404
        status, fields, _ = guest.request("POST", "/init", json.dumps(wish).encode(), control=True)
        assert (status, fields["x-envd-version"]) == (204, "0.6.13")
        assert guest.request("GET", "/envs")[0] == 401
        envs = json.loads(guest.request("GET", "/envs", X_Access_Token="new")[2])
        assert (envs["B"], envs["E2B_SANDBOX"]) == ("2", "true")
        assert "A" not in envs
        assert guest.request("POST", "/init", b'{"envVars": {"a": 1}}', control=True)[0] == 400
        assert guest.request("POST", "/init", b"[" * 100_000, control=True)[0] == 400
    finally:
        assert guest.stop() == 0


def test_unknown_paths_and_methods(guest: RunningGuest) -> None:
    assert guest.request("GET", "/nothing")[0] == 404
    status, fields, _ = guest.request("DELETE", "/health")
    assert (status, fields["allow"]) == (405, "GET")
    assert guest.request("HEAD", "/envs")[0] == 200
    assert guest.request("HEAD", "/envs")[2] == b""


def test_a_browser_is_answered(guest: RunningGuest) -> None:
    status, fields, _ = guest.request(
        "OPTIONS",
        "/files",
        Origin="http://x",
        Access_Control_Request_Method="POST",
        Access_Control_Request_Headers="x-a",
    )
    assert (status, fields["access-control-allow-origin"], fields["access-control-max-age"]) == (204, "*", "7200")
    assert fields["access-control-allow-headers"] == "x-a"
    assert guest.request("GET", "/envs", Origin="http://x")[1]["access-control-allow-origin"] == "*"


def test_pipelined_requests_are_answered_in_order(guest: RunningGuest) -> None:
    body = b"{}"
    call = JSON_CALL + b"Content-Length: 2\r\n\r\n" + body
    raw = (
        call * 5
        + b"GET /nothing HTTP/1.1\r\nHost: a\r\n\r\n"
        + call
        + b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
    )
    answer = exchange(guest, raw)
    assert [part.split()[0] for part in answer.split(b"HTTP/1.1 ")[1:]] == [b"200"] * 5 + [b"404", b"200", b"204"]


def test_requests_that_come_byte_by_byte(guest: RunningGuest) -> None:
    with guest.raw() as sock:
        for byte in b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n":
            sock.sendall(bytes([byte]))
        assert receive_all(sock).startswith(b"HTTP/1.1 204 ")


def test_http_1_0_is_closed_or_kept_as_asked(guest: RunningGuest) -> None:
    with guest.raw() as sock:
        sock.sendall(b"GET /envs HTTP/1.0\r\n\r\n")
        assert receive_all(sock).startswith(b"HTTP/1.1 200 ")
    with guest.raw() as sock:
        sock.sendall(b"GET /health HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
        assert b"connection: keep-alive" in sock.recv(1000)
        sock.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        assert receive_all(sock).startswith(b"HTTP/1.1 204 ")


def test_streams_to_http_1_0_end_with_the_connection(guest: RunningGuest) -> None:
    message = b'{"process":{"cmd":"/bin/echo","args":["hi"]}}'
    frame = b"\0" + len(message).to_bytes(4, "big") + message
    head = (
        b"POST /process.Process/Start HTTP/1.0\r\nContent-Type: application/connect+json\r\nContent-Length: %d\r\n\r\n"
    )
    with guest.raw() as sock:
        sock.sendall(head % len(frame) + frame)
        answer = receive_all(sock)
    assert b"transfer-encoding" not in answer.lower()
    assert answer.endswith(b"{}")
    assert b'"stdout"' in answer


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"GARBAGE\r\n\r\n", b"400"),
        (b"GET / HTTP/3.0\r\nHost: a\r\n\r\n", b"505"),
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n", b"501"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 70_000, b"431"),
        (b"POST /init HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", b"400"),
    ],
)
def test_what_is_no_request_is_refused_and_closed(guest: RunningGuest, raw: bytes, status: bytes) -> None:
    with guest.raw() as sock:
        sock.sendall(raw)
        answer = receive_all(sock)
    assert answer.split()[1] == status
    assert b"connection: close" in answer
    assert answer.count(b"content-length: ") == 1


def test_broken_chunks_end_the_call_and_the_connection(guest: RunningGuest) -> None:
    head = JSON_CALL + b"Transfer-Encoding: chunked\r\n\r\n"
    with guest.raw() as sock:
        sock.sendall(head + b"zz\r\n")
        answer = receive_all(sock)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"malformed chunk" in answer


def test_a_chunked_body_is_read(guest: RunningGuest) -> None:
    head = JSON_CALL + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    assert exchange(guest, head + b"1\r\n{\r\n1\r\n}\r\n0\r\n\r\n").startswith(b"HTTP/1.1 200 ")


def test_100_continue_comes_when_the_body_is_wanted(guest: RunningGuest) -> None:
    head = CALL + b"Content-Type: %b\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n"
    with guest.raw() as sock:
        sock.sendall(head % b"application/json")
        assert sock.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(b"{}")
        assert sock.recv(1000).startswith(b"HTTP/1.1 200 ")
    with guest.raw() as sock:  # refused unread: no Continue, and the connection ends
        sock.sendall(head % b"application/proto")
        assert receive_all(sock).startswith(b"HTTP/1.1 415 ")


def test_an_answer_before_the_body_reaches_a_client_that_is_still_sending(locked: RunningGuest) -> None:
    with locked.raw() as sock:
        sock.sendall(CALL + b"Content-Length: 50000000\r\n\r\n")
        try:
            for _ in range(100):
                sock.sendall(b"x" * 65536)
        except (BrokenPipeError, ConnectionResetError):
            pass
        assert receive_all(sock).startswith(b"HTTP/1.1 401 ")


def test_a_small_unread_body_keeps_the_connection(locked: RunningGuest) -> None:
    with locked.raw() as sock:
        request = CALL + b"Content-Length: 1000\r\n\r\n"
        for _ in range(3):
            sock.sendall(request)
            assert sock.recv(4000).startswith(b"HTTP/1.1 401 ")
            sock.sendall(b"x" * 1000)


def test_oversized_bodies_are_refused_before_they_are_read(guest: RunningGuest) -> None:
    with guest.raw() as sock:
        sock.sendall(JSON_CALL + b"Content-Length: 99999999\r\n\r\n")
        answer = receive_all(sock)
    assert answer.startswith(b"HTTP/1.1 429 ")  # Connect's resource_exhausted
    assert b"resource_exhausted" in answer


def test_other_codecs_are_told_what_is_spoken(guest: RunningGuest) -> None:
    for content_type in ("application/proto", "application/grpc", "application/connect+proto"):
        status, _, body = guest.request("POST", "/process.Process/List", b"x", Content_Type=content_type)
        assert status == 415
        assert b"JSON codec only" in body
    status, _, _ = guest.request(
        "POST",
        "/process.Process/List",
        b"{}",
        Content_Type="application/json; charset=utf-8",
        Connect_Protocol_Version="1",
    )
    assert status == 200
    assert (
        guest.request(
            "POST", "/process.Process/List", b"{}", Content_Type="application/json", Connect_Protocol_Version="2"
        )[0]
        == 400
    )
    assert (
        guest.request("POST", "/process.Process/List", b"{}", Content_Type="application/json", Content_Encoding="gzip")[
            0
        ]
        == 415
    )


@pytest.mark.parametrize("body", [b"{", b"[]", b"3", b"[" * 200_000, b"\xff", b'{"a":' * 50_000])
def test_broken_json_is_the_callers_fault(guest: RunningGuest, body: bytes) -> None:
    status, _, answer = guest.request("POST", "/process.Process/List", body, Content_Type="application/json")
    assert (status, json.loads(answer)["code"]) == (400, "invalid_argument")


def test_clients_that_vanish_anywhere_do_no_harm(guest: RunningGuest) -> None:
    request = JSON_CALL + b"Content-Length: 2\r\n\r\n{}"
    for cut in range(0, len(request) + 1, 3):
        with guest.raw() as sock:
            sock.sendall(request[:cut])
    assert guest.request("GET", "/health")[0] == 204


def test_a_slow_client_of_the_body_holds_no_memory(guest: RunningGuest) -> None:
    before = guest.memory_kib()
    socks = []
    for _ in range(20):
        sock = guest.raw()
        sock.sendall(
            b"POST /process.Process/StreamInput HTTP/1.1\r\nHost: a\r\nContent-Type: application/connect+json\r\n"
        )
        sock.sendall(b"Transfer-Encoding: chunked\r\n\r\n10\r\n")
        socks.append(sock)
    assert guest.memory_kib() - before < 8 * 1024
    for sock in socks:
        sock.close()
    assert guest.request("GET", "/health")[0] == 204


def test_beyond_the_limit_connections_are_refused_cleanly(tmp_path: Path) -> None:
    guest = start_guest(tmp_path)
    try:
        held = []
        refusal = b""
        for _ in range(1100):
            sock = guest.raw()
            sock.setblocking(False)
            held.append(sock)
        time.sleep(0.3)
        for sock in held[1030:]:
            sock.setblocking(True)
            refusal = receive_all(sock)
            assert refusal.startswith(b"HTTP/1.1 503 ")
            assert b"retry-after" in refusal
        for sock in held:
            sock.close()
        time.sleep(0.1)
        assert guest.request("GET", "/health")[0] == 204
    finally:
        assert guest.stop() == 0


def test_a_head_that_does_not_end_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.guest.connection.HEAD_S", 0.3)
    monkeypatch.setattr("penstock.guest.connection.IDLE_S", 0.6)
    monkeypatch.setattr("penstock.guest.server.SWEEP_S", 0.1)
    guest = start_guest(tmp_path)
    try:
        with guest.raw() as slow, guest.raw() as idle, guest.raw() as served:
            slow.sendall(b"GET /health HTT")
            served.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
            assert receive_all(slow).startswith(b"HTTP/1.1 408 ")
            assert receive_all(idle) == b""
            assert receive_all(served).startswith(b"HTTP/1.1 204 ")
    finally:
        assert guest.stop() == 0


def test_inside_it_listens_on_loopback_or_says_why(guest: RunningGuest) -> None:
    with socket.socket() as sock:
        if sock.connect_ex(("127.0.0.1", 49983)) == 0:
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
            assert receive_all(sock).startswith(b"HTTP/1.1 ")
        else:
            assert any(line["event"] == "not listening inside" for line in guest.log())


def test_a_guest_is_small(tmp_path: Path) -> None:
    guest = start_guest(tmp_path)
    try:
        guest.request("GET", "/health")
        assert guest.private_dirty_kib() < 12 * 1024  # forked from a test runner; `bench` measures it from the zygote
    finally:
        assert guest.stop() == 0
    assert not (tmp_path / "core").exists()
    assert os.path.exists(guest.public)


def test_nothing_can_be_imported_after_the_start(tmp_path: Path) -> None:
    """A codec or a module that were loaded later would come from the sandbox's own files."""
    trap = tmp_path / "penstock_trap.py"
    trap.write_text("raise SystemExit('imported')")
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            sys.path.insert(0, str(tmp_path))
            guest_main._seal_imports()
            for name in ("penstock_trap", "xml.sax.xmlreader", "encodings.cp500"):
                try:
                    importlib.import_module(name)
                except ImportError:
                    continue
                os._exit(2)
            try:
                "x".encode("cp500")
            except LookupError:
                status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

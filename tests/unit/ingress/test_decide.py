"""What a request asks for, decided from its head and the table alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.ingress import decide
from penstock.ingress.decide import Own, Signed, choose, is_reserved, read
from penstock.ingress.pages import Refusal
from penstock.ingress.table import Route, Table
from penstock.wire.http1 import RequestHead, parse_request_head
from penstock.wire.routing import Target

ID = "i" + "a" * 20


def parsed(target: str = "/", *, host: str = "localhost", method: str = "GET", **headers: str) -> RequestHead:
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    head = parse_request_head(f"{method} {target} HTTP/1.1\r\nHost: {host}\r\n{lines}\r\n".encode())
    assert head is not None
    return head


def by_headers(target: str = "/", *, host: str = "localhost:3002", port: int = 49983, **more: str) -> RequestHead:
    return parsed(target, host=host, E2b_Sandbox_Id=ID, E2b_Sandbox_Port=str(port), **more)


@pytest.mark.parametrize("host", ["localhost", "localhost:3002", "127.0.0.1:3002", "[::1]:3002", "sandbox.e2b.app"])
def test_the_headers_route_where_the_host_cannot(host):
    assert read(by_headers(host=host)) == Target(ID, 49983)


@pytest.mark.parametrize(
    "host", [f"8000-{ID}.sbx.localhost", f"8000-{ID}.e2b.app:443", f"8000-{ID}-00000000.e2b.app", f"8000-{ID}.E2B.APP"]
)
def test_the_host_routes_and_outranks_the_headers(host):
    assert read(parsed(host=host)) == Target(ID, 8000)
    assert read(by_headers(host=host)) == Target(ID, 8000)


@pytest.mark.parametrize("present", [{"E2b_Sandbox_Id": ID}, {"E2b_Sandbox_Port": "49983"}])
def test_one_routing_header_without_the_other_is_refused(present):
    aim = read(parsed(**present))
    assert isinstance(aim, Refusal)
    assert (aim.status, aim.message) == (400, "missing header")


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ("nodot", "Invalid host"),
        ("nodash.example.org", "Invalid host"),
        (f"x8-{ID}.example.org", "Invalid sandbox port"),
        (f"70000-{ID}.example.org", "Invalid sandbox port"),
        ("8000-.example.org", "Invalid sandbox ID"),
    ],
)
def test_an_unreadable_host_is_named(host, message):
    aim = read(parsed(host=host))
    assert isinstance(aim, Refusal)
    assert (aim.status, aim.message) == (400, message)


@pytest.mark.parametrize(
    "path",
    [
        "/init",
        "/init?x=1",
        "/INIT",
        "//init",
        "/./init",
        "/%69nit",
        "/x/../init",
        "/init/",
        "/init;a=b",
        "/%2e/init",
        "/freeze",
        "/unfreeze",
        "/fsfreeze",
        "/fsthaw",
        "/collapse",
        "/upgrade",
        "/init%2f",
        "/\\init",
    ],
)
def test_the_nodes_own_routes_are_not_there_however_spelled(path):
    aim = read(by_headers(path))
    assert isinstance(aim, Refusal)
    assert aim.status == 404
    assert aim.sandbox is None


@pytest.mark.parametrize("path", ["/health", "/files?path=/init", "/process.Process/Start", "/initial", "/a/init", "/"])
def test_public_routes_pass(path):
    assert read(by_headers(path)) == Target(ID, 49983)


def test_a_user_port_may_have_any_path():
    assert read(by_headers("/init", port=8000)) == Target(ID, 8000)


def test_without_a_sandbox_the_ingress_speaks_of_itself():
    assert read(parsed("/health")) is Own.HEALTH
    assert read(parsed("/metrics")) is Own.METRICS
    aim = read(parsed("/other"))
    assert isinstance(aim, Refusal)
    assert aim.status == 400
    assert read(by_headers("/health")) == Target(ID, 49983)


def test_a_signed_url_without_a_sandbox_is_read():
    aim = read(parsed("/files?path=%2Fhome%2Fa%20b&signature=v1_x%2By&signature_expiration=17&username=user"))
    assert aim == Signed("/home/a b", "read", "user", "v1_x+y", 17)
    aim = read(parsed("/files?path=a&signature=v1_x", method="POST"))
    assert aim == Signed("a", "write", "", "v1_x", None)


@pytest.mark.parametrize("query", ["path=a", "path=a&signature=", "path=a&signature=v1_x&signature_expiration=soon"])
def test_a_url_without_a_usable_signature_names_no_sandbox(query):
    aim = read(parsed(f"/files?{query}"))
    assert isinstance(aim, Refusal)
    assert aim.status == 400


def test_an_absolute_target_must_agree_with_the_host():
    assert read(by_headers("http://localhost:3002/x")) == Target(ID, 49983)
    aim = read(by_headers("http://elsewhere/x"))
    assert isinstance(aim, Refusal)
    assert aim.status == 400
    reserved = read(by_headers("http://localhost:3002/init"))
    assert isinstance(reserved, Refusal)
    assert reserved.status == 404


def test_connect_is_refused():
    aim = read(parsed("example.org:80", method="CONNECT"))
    assert isinstance(aim, Refusal)
    assert aim.status == 405


def test_a_private_port_takes_the_traffic_token_and_the_guest_does_not():
    table = Table()
    table.put(ID, Route(sandbox=ID, private=True))

    def traffic_token(_: str) -> str:
        return "right"

    def asked(port: int, **headers: str) -> Route | Refusal:
        return choose(Target(ID, port), by_headers(port=port, **headers), table, traffic_token)

    missing, wrong = asked(8000), asked(8000, E2b_Traffic_Access_Token="wrong")
    assert isinstance(missing, Refusal) and isinstance(wrong, Refusal)
    assert (missing.status, wrong.status) == (403, 403)
    assert "e2b-traffic-access-token" in missing.message and "e2b-traffic-access-token" in wrong.message
    assert isinstance(asked(8000, E2b_Traffic_Access_Token="right"), Route)
    assert isinstance(asked(49983), Route)


def test_unknown_paused_and_unread_tables_differ():
    table = Table()
    target, head = Target(ID, 49983), by_headers()
    unknown = choose(target, head, table, str)
    assert isinstance(unknown, Refusal)
    assert (unknown.status, unknown.message) == (502, "The sandbox was not found")
    table.put(ID, Route(sandbox=ID, serving=False))
    assert choose(target, head, table, str) == unknown
    table.complete = False
    starting = choose(target, head, table, str)
    assert isinstance(starting, Refusal)
    assert (starting.status, starting.retry_after_s) == (503, 1)


def test_reserved_names_are_compared_whole():
    assert is_reserved(b"/init") and not is_reserved(b"/init2") and not is_reserved(b"/") and not is_reserved(b"*")


@given(st.text("/.%2eEfFiInNtT5cC;\\x \t", max_size=16).map(str.encode))
def test_a_path_that_needs_no_undoing_is_judged_as_if_it_did(path):
    thorough = path.startswith(b"/") and is_reserved(b"/%2e" + path)  # the escape forbids the short way
    assert is_reserved(path) is thorough or not path.startswith(b"/")


def test_the_short_way_is_taken_for_what_has_one_spelling_only():
    assert decide._SPELLED.search(b"/process.Process/Start") is None
    for path in (b"/%69nit", b"//init", b"/./init", b"/x/../init", b"/init;a", b"/\\init"):
        assert decide._SPELLED.search(path) is not None

"""Bodies are exact: SDKs search them."""

from __future__ import annotations

import pytest

from penstock.ingress import pages
from penstock.wire.http1 import RequestHead, parse_request_head

BROWSER = "Mozilla/5.0 (X11; Linux x86_64) Chrome/130"


def head(method: str = "GET", **headers: str) -> RequestHead:
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    parsed = parse_request_head(f"{method} / HTTP/1.1\r\nHost: x\r\n{lines}\r\n".encode())
    assert parsed is not None
    return parsed


def body(refusal: pages.Refusal) -> bytes:
    return pages.render(refusal, head(), close=False).partition(b"\r\n\r\n")[2]


def test_the_bodies_are_those_the_sdks_know():
    assert body(pages.sandbox_not_found("iabc")) == (
        b'{"sandboxId":"iabc","message":"The sandbox was not found","code":502}'
    )
    assert body(pages.port_closed("iabc", 3000)) == (
        b'{"sandboxId":"iabc","message":"The sandbox is running but port is not open","port":3000,"code":502}'
    )
    assert b'"connectionLimit":7' in body(pages.too_many_connections("iabc", 7))
    assert b'"path":"/init"' in body(pages.reserved_path("/init"))


@pytest.mark.parametrize(
    ("headers", "json"),
    [
        ({}, True),
        ({"User_Agent": "e2b-python-sdk/2.63.0"}, True),
        ({"User_Agent": BROWSER}, False),
        ({"User_Agent": BROWSER, "Accept": "application/json"}, True),
        ({"User_Agent": BROWSER, "Accept": "text/html,application/json"}, False),
        ({"User_Agent": BROWSER, "Sec_Fetch_Mode": "cors"}, True),
        ({"User_Agent": BROWSER, "Sec_Fetch_Mode": "websocket"}, True),
        ({"User_Agent": "curl/8", "Sec_Fetch_Mode": "navigate"}, False),
        ({"User_Agent": BROWSER, "X_Requested_With": "XMLHttpRequest"}, True),
    ],
)
def test_json_unless_a_browser_navigates(headers, json):
    reply = pages.render(pages.sandbox_not_found("i1"), head(**headers), close=False)
    kind = b"application/json; charset=utf-8" if json else b"text/html; charset=utf-8"
    assert b"Content-Type: " + kind + b"\r\n" in reply
    assert (b"<html" in reply) is not json
    assert b"The sandbox was not found" in reply


def test_a_page_escapes_what_the_client_said():
    page = pages.render(pages.reserved_path("/<script>"), head(User_Agent=BROWSER), close=False)
    assert b"<script>" not in page and b"&lt;script&gt;" in page


def test_head_has_the_length_and_no_body():
    got, _, rest = pages.render(pages.sandbox_not_found("i1"), head("HEAD"), close=True).partition(b"\r\n\r\n")
    assert rest == b""
    assert b"Content-Length: 67" in got and b"Connection: close" in got

"""What goes on to the other side, and that h11 reads it as we meant it."""

from __future__ import annotations

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.ingress.heads import KEPT_MAX, Heads, mask, request_bytes
from penstock.wire.http1 import BadRequest, parse_request_fields, parse_request_head, parse_response_head


def forwarded(raw: bytes, **options: object) -> dict[bytes, list[bytes]]:
    head = parse_request_head(raw)
    assert head is not None
    again = parse_request_head(request_bytes(head, **{"upgrade": False, **options}))
    assert again is not None
    fields: dict[bytes, list[bytes]] = {b":": [again.method, again.target]}
    for name, value in again.fields:
        fields.setdefault(name, []).append(value)
    return fields


def test_fields_of_one_hop_stay_here():
    fields = forwarded(
        b"GET /a?b HTTP/1.1\r\nHost: x\r\nConnection: keep-alive, X-One\r\nKeep-Alive: 5\r\nTE: trailers\r\n"
        b"Proxy-Authorization: s\r\nX-One: 1\r\nX-Two: 2\r\nUpgrade: h2c\r\nHTTP2-Settings: a\r\n\r\n"
    )
    assert fields == {b":": [b"GET", b"/a?b"], b"host": [b"x"], b"x-two": [b"2"]}


@pytest.mark.parametrize("name", [b"Host", b"X-Access-Token", b"E2b-Sandbox-Id", b"Authorization", b"Cookie"])
def test_a_client_cannot_have_fields_removed_that_say_who_asks(name):
    raw = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close, " + name + b"\r\n"
    raw += b"" if name == b"Host" else name + b": v\r\n"
    assert name.lower() in forwarded(raw + b"\r\n")


def test_content_length_is_written_from_the_number_and_never_removed():
    assert forwarded(b"POST / HTTP/1.1\r\nHost: x\r\nConnection: content-length\r\nContent-Length: 007\r\n\r\n")[
        b"content-length"
    ] == [b"7"]
    assert forwarded(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")[b"content-length"] == [b"0"]
    assert forwarded(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: Chunked\r\n\r\n")[b"transfer-encoding"] == [
        b"chunked"
    ]


def test_http_1_0_goes_on_as_1_1():
    assert forwarded(b"GET / HTTP/1.0\r\n\r\n")[b"host"] == [b""]


def test_an_absolute_target_goes_on_in_origin_form():
    assert forwarded(b"GET http://x HTTP/1.1\r\nHost: x\r\n\r\n")[b":"] == [b"GET", b"/"]
    assert forwarded(b"GET http://x/a?b=c HTTP/1.1\r\nHost: x\r\n\r\n")[b":"] == [b"GET", b"/a?b=c"]


def test_masking_replaces_the_host_and_tells_the_old_one():
    raw = b"GET / HTTP/1.1\r\nHost: 8000-i1.x\r\nX-Forwarded-Host: forged\r\n\r\n"
    fields = forwarded(raw, host=mask("localhost:${PORT}", 8000), forwarded_host=b"8000-i1.x")
    assert fields[b"host"] == [b"localhost:8000"]
    assert fields[b"x-forwarded-host"] == [b"8000-i1.x"]


@pytest.mark.parametrize("pattern", ["", "a b", "a\r\nX: y", "ü\u0100"])
def test_a_mask_that_is_no_host_is_refused(pattern):
    with pytest.raises(BadRequest):
        mask(pattern, 80)


def test_an_upgrade_is_offered_to_user_ports_only():
    raw = b"GET / HTTP/1.1\r\nHost: %s\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    port = Heads().asked(raw % b"8000-iabc.x.org")
    guest = Heads().asked(raw % b"49983-iabc.x.org")
    assert (port.upgrade, guest.upgrade) == (b"websocket", None)
    assert b"upgrade: websocket\r\n" in port.forward and b"upgrade" not in guest.forward


def test_a_response_loses_hop_fields_and_keeps_its_framing():
    heads = Heads()
    plain = heads.answered(b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\nServer: s\r\nConnection: close\r\n\r\n")
    assert plain.keep == b"HTTP/1.1 200 OK\r\nserver: s\r\ncontent-length: 5\r\n\r\n"
    assert plain.close.endswith(b"connection: close\r\n\r\n")
    cookies = heads.answered(
        b"HTTP/1.1 200 OK\r\nSet-Cookie: a=1\r\nSet-Cookie: b=2\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    assert cookies.keep.count(b"set-cookie") == 2 and b"transfer-encoding: chunked" in cookies.keep
    to_head = heads.answered(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", to_head=True)
    assert b"content-length: 5" in to_head.keep


def test_what_is_remembered_is_bounded():
    heads = Heads()
    for number in range(KEPT_MAX + 10):
        raw = b"GET /%d HTTP/1.1\r\nHost: localhost\r\n\r\n" % number
        for _ in range(3):
            heads.asked(raw)
    assert len(heads._asked.kept) <= KEPT_MAX
    for number in range(KEPT_MAX + 10):
        for path in range(3):
            heads.asked(b"GET /%d HTTP/1.1\r\nHost: localhost\r\nN: %d\r\n\r\n" % (path, number))
    assert len(heads._told.kept) <= KEPT_MAX


LINES = [
    f"{method} {target} HTTP/{version}\r\n".encode()
    for method in ("GET", "HEAD", "POST", "OPTIONS", "CONNECT")
    for target in ("/", "/init", "/%69nit", "*", "http://localhost/x", "http://other/x", "/files?signature=v1_x", "a b")
    for version in ("1.1", "1.0", "1.2")
]
FIELDS = [
    "".join(f"{line}\r\n" for line in lines).encode()
    for lines in (
        ["Host: localhost", "E2b-Sandbox-Id: iabc", "E2b-Sandbox-Port: 49983"],
        ["Host: localhost", "E2b-Sandbox-Id: iabc", "E2b-Sandbox-Port: 8000", "Content-Length: 5"],
        ["Host: 8000-iabc.x.org", "Connection: Upgrade", "Upgrade: websocket"],
        ["Host: 49983-iabc.x.org", "Connection: Upgrade", "Upgrade: websocket"],
        ["Host: localhost", "Transfer-Encoding: chunked", "Connection: close"],
        ["Host: localhost", "Transfer-Encoding: chunked", "Content-Length: 5"],
        ["Host: localhost"],
        [],
    )
]


def outcome(heads: Heads, raw: bytes) -> object:
    try:
        asked = heads.asked(raw)
    except BadRequest as bad:
        return bad.status, bad.why
    kept = asked.head.framing, asked.head.content_length, asked.keep_alive, asked.upgrade, asked.minor, asked.replayable
    return asked.aim, asked.forward, *kept


@given(st.lists(st.tuples(st.sampled_from(LINES), st.sampled_from(FIELDS)), min_size=1, max_size=60))
def test_what_was_remembered_of_other_requests_changes_nothing(requests):
    heads = Heads()
    for line, fields in requests * 3:  # remembered at the second time, used from the third on
        raw = line + fields + b"\r\n"
        assert outcome(heads, raw) == outcome(Heads(), raw)


def test_fields_are_parsed_once_for_many_targets(monkeypatch):
    parsed = 0

    def counted(rest: bytes) -> object:
        nonlocal parsed
        parsed += 1
        return parse_request_fields(rest)

    monkeypatch.setattr("penstock.ingress.heads.parse_request_fields", counted)
    heads = Heads()
    for number in range(100):
        asked = heads.asked(b"GET /%d HTTP/1.1\r\nHost: 8000-iabc.x.org\r\n\r\n" % number)
        assert asked.forward == b"GET /%d HTTP/1.1\r\nhost: 8000-iabc.x.org\r\n\r\n" % number
    assert parsed == 2


_token = st.text("abcdefghijklmnopqrstuvwxyzABC-_!~", min_size=1, max_size=12).map(str.encode)
_value = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=30).map(lambda t: t.strip().encode())


@given(st.lists(st.tuples(_token, _value), max_size=12), st.sampled_from([b"GET", b"POST", b"DELETE"]))
def test_h11_reads_the_forwarded_head_as_we_do(fields, method):
    raw = method + b" /p?q HTTP/1.1\r\nHost: h\r\n" + b"".join(b"%b: %b\r\n" % field for field in fields) + b"\r\n"
    try:
        head = parse_request_head(raw)
    except BadRequest:
        return
    assert head is not None
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(request_bytes(head, upgrade=False))
    event = connection.next_event()
    assert isinstance(event, h11.Request)
    assert (event.method, event.target) == (method, b"/p?q")
    sent = [(name, value) for name, value in head.fields if name not in _NOT_FORWARDED]
    assert sorted(event.headers) == sorted(field for field in sent)


_NOT_FORWARDED = {b"connection", b"keep-alive", b"te", b"trailer", b"upgrade", b"transfer-encoding", b"content-length"}


def test_a_response_head_is_parsed_once_per_method():
    heads = Heads()
    raw = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"
    assert heads.answered(raw).head.content_length == 5
    assert heads.answered(raw, to_head=True).head.content_length == 0
    assert parse_response_head(raw) is not None

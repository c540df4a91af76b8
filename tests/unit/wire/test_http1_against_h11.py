"""Whatever our parser accepts, h11 accepts with the same meaning; smuggling input that h11 rejects, we reject."""

from __future__ import annotations

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.wire import chunked, http1
from penstock.wire.http1 import BadRequest, Framing

GET, POST = (method + b" / HTTP/1.1\r\nHost: a\r\n" for method in (b"GET", b"POST"))

# Each of these is how somebody once smuggled a request past somebody: every one must be refused.
HOSTILE = {
    "content-length beside chunked": POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
    "chunked beside content-length": POST + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n",
    "two lengths": POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n",
    "two equal lengths": POST + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\n",
    "a list of lengths": POST + b"Content-Length: 5, 6\r\n\r\n",
    "signed length": POST + b"Content-Length: +5\r\n\r\n",
    "negative length": POST + b"Content-Length: -5\r\n\r\n",
    "hexadecimal length": POST + b"Content-Length: 0x5\r\n\r\n",
    "length with underscore": POST + b"Content-Length: 1_0\r\n\r\n",
    "length of other digits": POST + "Content-Length: ٥\r\n\r\n".encode(),
    "empty length": POST + b"Content-Length:\r\n\r\n",
    "enormous length": POST + b"Content-Length: 99999999999999999999999\r\n\r\n",
    "folded line": POST + b"Transfer-Encoding:\r\n chunked\r\n\r\n",
    "folded first line": b"POST / HTTP/1.1\r\n Host: a\r\n\r\n",
    "space before the colon": POST + b"Content-Length : 5\r\n\r\n",
    "tab before the colon": POST + b"Transfer-Encoding\t: chunked\r\n\r\n",
    "empty name": POST + b": x\r\n\r\n",
    "no colon": POST + b"Content-Length\r\n\r\n",
    "NUL in a value": GET + b"X: a\0b\r\n\r\n",
    "NUL in a name": GET + b"X\0: b\r\n\r\n",
    "vertical tab in a value": GET + b"Transfer-Encoding: \x0bchunked\r\n\r\n",
    "bare CR in a value": GET + b"X: a\rContent-Length: 5\r\n\r\n",
    "bare LF line": b"GET / HTTP/1.1\nHost: a\r\n\r\n",
    "bare LF inside": b"GET / HTTP/1.1\r\nHost: a\nX: y\r\n\r\n",
    "bare CR line": b"GET / HTTP/1.1\rHost: a\r\n\r\n",
    "coding with parameter": POST + b"Transfer-Encoding: chunked;q=1\r\n\r\n",
    "two codings": POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n",
    "chunked twice": POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n",
    "chunked then identity": POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n",
    "quoted chunked": POST + b'Transfer-Encoding: "chunked"\r\n\r\n',
    "misspelt chunked": POST + b"Transfer-Encoding: xchunked\r\n\r\n",
    "empty coding": POST + b"Transfer-Encoding:\r\n\r\n",
    "coding in HTTP/1.0": b"POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n",
    "no host": b"GET / HTTP/1.1\r\n\r\n",
    "two hosts": GET + b"Host: b\r\n\r\n",
    "host with a blank": b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n",
    "host with a path": b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n",
    "host with a user": b"GET / HTTP/1.1\r\nHost: a@b\r\n\r\n",
    "two blanks": b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n",
    "tab for a blank": b"GET\t/ HTTP/1.1\r\nHost: a\r\n\r\n",
    "blank at the end of the line": b"GET / HTTP/1.1 \r\nHost: a\r\n\r\n",
    "blank in the target": b"GET /a b HTTP/1.1\r\nHost: a\r\n\r\n",
    "NUL in the target": b"GET /a\0 HTTP/1.1\r\nHost: a\r\n\r\n",
    "byte beyond ASCII in the target": b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n",
    "relative target": b"GET a HTTP/1.1\r\nHost: a\r\n\r\n",
    "asterisk for GET": b"GET * HTTP/1.1\r\nHost: a\r\n\r\n",
    "HTTP/0.9": b"GET /\r\n\r\n",
    "HTTP/2.0": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/1.2": b"GET / HTTP/1.2\r\nHost: a\r\n\r\n",
    "HTTP/1.10": b"GET / HTTP/1.10\r\nHost: a\r\n\r\n",
    "lower-case http": b"GET / http/1.1\r\nHost: a\r\n\r\n",
    "leading blank": b" GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    "leading empty line": b"\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
    "leading LF": b"\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
    "bracket in the method": b"G(T / HTTP/1.1\r\nHost: a\r\n\r\n",
    "name with a bracket": GET + b"X(: y\r\n\r\n",
    "TLS hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
}

HARMLESS = [
    b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET / HTTP/1.0\r\n\r\n",
    b"GET http://a:80/x?y#z HTTP/1.1\r\nHost: a\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
    b"POST /a%20b?c=d HTTP/1.1\r\nhOsT:  [::1]:80 \r\nContent-Length: 005\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: CHUNKED\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost:\r\nX: \xe4\xf6 \t mid \t\r\nY:\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close, upgrade\r\nUpgrade: websocket\r\n\r\n",
    b"GET / HTTP/1.0\r\nHost: a\r\nConnection: Keep-Alive\r\n\r\n",
]


def h11_reads(raw: bytes) -> h11.Request | None:
    """h11's opinion: the request, or None when it refuses or waits for more."""
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
    connection.receive_data(raw)
    try:
        event = connection.next_event()
    except h11.RemoteProtocolError:
        return None
    return event if isinstance(event, h11.Request) else None


def h11_framing(request: h11.Request) -> tuple[Framing, int]:
    fields = dict(request.headers)
    if b"transfer-encoding" in fields:
        return Framing.CHUNKED, 0
    length = int(fields.get(b"content-length", b"0"))
    return (Framing.LENGTH, length) if length else (Framing.NONE, 0)


def agree(raw: bytes) -> bool:
    """Assert the rule on one input; True when both accepted it."""
    try:
        head = http1.parse_request_head(raw)
    except BadRequest:
        return False
    if head is None:
        return False
    request = h11_reads(raw)
    assert request is not None, f"we accept what h11 refuses: {raw!r}"
    assert head.method == request.method
    assert head.target == request.target
    assert head.version == request.http_version
    # h11 writes the one coding in lower case; the bytes are the sender's.
    fields = [(name, value.lower() if name == b"transfer-encoding" else value) for name, value in head.fields]
    assert fields == list(request.headers)
    assert (head.framing, head.content_length) == h11_framing(request)
    return True


@pytest.mark.parametrize("name", HOSTILE)
def test_smuggling_input_is_refused(name: str) -> None:
    with pytest.raises(BadRequest) as refused:
        http1.parse_request_head(HOSTILE[name])
    assert refused.value.status in (400, 501, 505)


@pytest.mark.parametrize("raw", HARMLESS)
def test_harmless_heads_are_read_as_h11_reads_them(raw: bytes) -> None:
    assert agree(raw)


def test_a_head_cut_anywhere_waits_for_more() -> None:
    raw = HARMLESS[4]
    for cut in range(len(raw)):
        assert http1.parse_request_head(raw[:cut]) is None


@pytest.mark.parametrize("raw", [b"\x16\x03\x01\x02\x00\x01", b"\x16\x03", b"\x00", b"\xff\xfeGET", b" GET /"])
def test_another_protocol_is_refused_at_its_first_bytes(raw: bytes) -> None:
    with pytest.raises(BadRequest) as refused:
        http1.parse_request_head(raw)
    assert refused.value.status == 400


def test_what_follows_the_head_is_left_alone() -> None:
    raw = HARMLESS[0]
    head = http1.parse_request_head(bytearray(raw + b"GET /next"))
    assert head is not None
    assert head.size == len(raw)
    assert head.raw == raw


def test_a_huge_head_is_refused_before_it_ends() -> None:
    endless = b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * http1.HEAD_BYTES_MAX
    with pytest.raises(BadRequest) as refused:
        http1.parse_request_head(endless)
    assert refused.value.status == 431


def test_too_many_fields_are_refused() -> None:
    raw = b"GET / HTTP/1.1\r\nHost: a\r\n" + b"x: y\r\n" * http1.FIELDS_MAX + b"\r\n"
    with pytest.raises(BadRequest) as refused:
        http1.parse_request_head(raw)
    assert refused.value.status == 431


# Fragments that meet at random produce every neighbour of the corpus above.
FRAGMENTS = st.sampled_from(
    b"GET|POST| |/|HTTP/1.1|HTTP/1.0|\r\n|\n|\r|:|Host|a|\t|\0|Content-Length|Transfer-Encoding|chunked|identity|5|6|,"
    b"|;|\x0b|\xff|*|Content-Length: 5\r\n|Transfer-Encoding: chunked\r\n|Host: a\r\n|\r\n\r\n|+|x".split(b"|")
)


@settings(max_examples=1500, deadline=None)
@given(st.lists(FRAGMENTS, max_size=14))
def test_random_mixtures_never_split_the_parsers(parts: list[bytes]) -> None:
    agree(b"".join(parts))


@settings(max_examples=1500, deadline=None)
@given(st.lists(FRAGMENTS, max_size=8))
def test_random_fields_never_split_the_parsers(parts: list[bytes]) -> None:
    agree(b"POST / HTTP/1.1\r\nHost: a\r\n" + b"".join(parts) + b"\r\n\r\n")


@settings(max_examples=1000, deadline=None)
@given(st.sampled_from(HARMLESS), st.integers(0, 200), st.binary(max_size=2))
def test_a_damaged_head_never_splits_the_parsers(raw: bytes, at: int, damage: bytes) -> None:
    agree(raw[:at] + damage + raw[at + 1 :])


# ---- chunked bodies --------------------------------------------------------------------------------------------

BROKEN_CHUNKS = {
    "no digits": b"\r\n0\r\n\r\n",
    "sign": b"+5\r\nhello\r\n0\r\n\r\n",
    "0x": b"0x5\r\nhello\r\n0\r\n\r\n",
    "leading blank": b" 5\r\nhello\r\n0\r\n\r\n",
    "bare LF": b"5\nhello\r\n0\r\n\r\n",
    "too short": b"4\r\nhello\r\n0\r\n\r\n",
    "no CRLF after the data": b"5\r\nhello0\r\n\r\n",
    "CR LF LF": b"5\r\nhello\n\r0\r\n\r\n",
    "overflowing size": b"fffffffffffffffffffff\r\nhello\r\n0\r\n\r\n",
    "underscore": b"1_0\r\nhello\r\n0\r\n\r\n",
    "endless extension": b"5;" + b"x" * 400,
    "NUL in the extension": b"5;\0\r\nhello\r\n0\r\n\r\n",
    "bare CR in the extension": b"5;a\rb\r\nhello\r\n0\r\n\r\n",
    "broken trailer": b"0\r\nfoo\r\n\r\n",
    "endless trailer": b"0\r\n" + b"a: b\r\n" * 4000,
}


def decode(raw: bytes, step: int) -> tuple[bytes, bool, bytes]:
    decoder = chunked.ChunkedDecoder()
    out, at = b"", 0
    while at < len(raw) and not decoder.done:
        out += b"".join(decoder.feed(raw[at : at + step]))
        at += step
    return out, decoder.done, decoder.rest + raw[at:] if decoder.done else b""


def h11_decodes(raw: bytes) -> tuple[bytes, bool, bytes] | None:
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
    connection.receive_data(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + raw)
    out = b""
    try:
        while True:
            event = connection.next_event()
            if isinstance(event, h11.Data):
                out += event.data
            elif isinstance(event, h11.EndOfMessage):
                return out, True, connection.trailing_data[0]
            elif event is h11.NEED_DATA or event is h11.PAUSED:
                return out, False, b""
    except h11.RemoteProtocolError:
        return None


@pytest.mark.parametrize("name", BROKEN_CHUNKS)
@pytest.mark.parametrize("step", [1, 3, 10_000])
def test_broken_chunks_are_refused(name: str, step: int) -> None:
    with pytest.raises(BadRequest):
        decode(BROKEN_CHUNKS[name], step)


@pytest.mark.parametrize("step", [1, 2, 7, 10_000])
def test_a_chunked_body_is_decoded_however_it_is_cut(step: int) -> None:
    raw = b"5\r\nhello\r\n00C;ext=1\r\n, wide world\r\n0\r\nTrailer: x\r\n\r\nGET /next"
    assert decode(raw, step) == (b"hello, wide world", True, b"GET /next")
    assert h11_decodes(raw) == (b"hello, wide world", True, b"GET /next")


CHUNK_FRAGMENTS = st.sampled_from(
    [
        b"0",
        b"1",
        b"5",
        b"a",
        b"\r\n",
        b"\n",
        b"\r",
        b"hello",
        b";",
        b" ",
        b"x",
        b"0\r\n\r\n",
        b"1\r\na\r\n",
        b"g",
        b"X: y",
    ]
)


@settings(max_examples=1500, deadline=None)
@given(st.lists(CHUNK_FRAGMENTS, max_size=10), st.integers(1, 8))
def test_random_chunks_never_split_the_decoders(parts: list[bytes], step: int) -> None:
    raw = b"".join(parts)
    try:
        out, done, rest = decode(raw, step)
    except BadRequest:
        return
    theirs = h11_decodes(raw)
    if done:
        assert theirs == (out, True, rest)


@given(st.lists(st.binary(min_size=1, max_size=200), max_size=10))
def test_what_we_encode_h11_decodes(pieces: list[bytes]) -> None:
    raw = b"".join(map(chunked.chunk, pieces)) + chunked.LAST_CHUNK
    assert h11_decodes(raw) == (b"".join(pieces), True, b"")


# ---- responses -------------------------------------------------------------------------------------------------


def test_responses_are_framed_by_method_and_status() -> None:
    def framing(raw: bytes, method: bytes = b"GET") -> tuple[Framing, int, bool]:
        head = http1.parse_response_head(raw, method=method)
        assert head is not None
        return head.framing, head.content_length, head.keep_alive

    ok = b"HTTP/1.1 200 OK\r\n"
    assert framing(ok + b"Content-Length: 3\r\n\r\n") == (Framing.LENGTH, 3, True)
    assert framing(ok + b"Content-Length: 3\r\n\r\n", b"HEAD") == (Framing.NONE, 0, True)
    assert framing(ok + b"Transfer-Encoding: chunked\r\n\r\n") == (Framing.CHUNKED, 0, True)
    assert framing(ok + b"\r\n") == (Framing.UNTIL_CLOSE, 0, False)
    assert framing(b"HTTP/1.1 204\r\n\r\n") == (Framing.NONE, 0, True)
    assert framing(b"HTTP/1.1 304 Not Modified\r\nContent-Length: 3\r\n\r\n") == (Framing.NONE, 0, True)
    assert framing(b"HTTP/1.1 101 Switching\r\nConnection: upgrade\r\nUpgrade: WebSocket\r\n\r\n")[0] is Framing.NONE
    assert framing(b"HTTP/1.0 200 OK\r\nContent-Length: 3\r\n\r\n") == (Framing.LENGTH, 3, False)


@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\n",
        b"HTTP/1.1 2000 OK\r\n\r\n",
        b"HTTP/1.1 099 OK\r\n\r\n",
        b"HTTP/2 200 OK\r\n\r\n",
        b"ICY 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\nX: y\r\n\r\n",
    ],
)
def test_broken_responses_are_a_bad_gateway(raw: bytes) -> None:
    with pytest.raises(BadRequest) as refused:
        http1.parse_response_head(raw)
    assert refused.value.status == 502


def test_a_value_cannot_break_out_of_its_line() -> None:
    with pytest.raises(ValueError, match="ends a line"):
        http1.encode_head(b"HTTP/1.1 200 OK", [(b"x", b"a\r\nSet-Cookie: b")])


def test_upgrade_counts_only_when_the_connection_field_names_it() -> None:
    def wanted(fields: bytes) -> bytes | None:
        head = http1.parse_request_head(b"GET / HTTP/1.1\r\nHost: a\r\n" + fields + b"\r\n")
        assert head is not None
        return head.upgrade

    assert wanted(b"Connection: keep-alive, Upgrade\r\nUpgrade: WebSocket\r\n") == b"websocket"
    assert wanted(b"Upgrade: websocket\r\n") is None

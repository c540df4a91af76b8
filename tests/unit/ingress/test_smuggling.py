"""Nothing ambiguous gets through: either it is refused, or the server reads exactly what we read."""

from __future__ import annotations

import asyncio

import pytest

from tests.unit.ingress.conftest import SANDBOX, Fixture, head

ROUTED = f"Host: localhost\r\nE2b-Sandbox-Id: {SANDBOX}\r\nE2b-Sandbox-Port: 8000\r\n".encode()
HIDDEN = b"GET /hidden HTTP/1.1\r\nHost: x\r\n\r\n"


class Recorder:
    """A server that keeps what it gets and never answers more than it is asked."""

    def __init__(self) -> None:
        self.got = b""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            self.got += data


REFUSED = {
    "CL and TE": b"POST / HTTP/1.1\r\n%bContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "TE and CL": b"POST / HTTP/1.1\r\n%bTransfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n",
    "two CL": b"POST / HTTP/1.1\r\n%bContent-Length: 4\r\nContent-Length: 5\r\n\r\nabcde",
    "list CL": b"POST / HTTP/1.1\r\n%bContent-Length: 4, 5\r\n\r\nabcde",
    "signed CL": b"POST / HTTP/1.1\r\n%bContent-Length: +4\r\n\r\nabcd",
    "negative CL": b"POST / HTTP/1.1\r\n%bContent-Length: -1\r\n\r\n",
    "hex CL": b"POST / HTTP/1.1\r\n%bContent-Length: 0x4\r\n\r\nabcd",
    "underscore CL": b"POST / HTTP/1.1\r\n%bContent-Length: 1_0\r\n\r\n0123456789",
    "huge CL": b"POST / HTTP/1.1\r\n%bContent-Length: 99999999999999999999\r\n\r\n",
    "TE identity": b"POST / HTTP/1.1\r\n%bTransfer-Encoding: identity\r\n\r\n",
    "TE list": b"POST / HTTP/1.1\r\n%bTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "TE twice": b"POST / HTTP/1.1\r\n%bTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "TE vertical tab": b"POST / HTTP/1.1\r\n%bTransfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    "TE in 1.0": b"POST / HTTP/1.0\r\n%bTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "space before colon": b"POST / HTTP/1.1\r\n%bTransfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    "folded line": b"POST / HTTP/1.1\r\n%bTransfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n",
    "bare LF": b"POST / HTTP/1.1\n%bContent-Length: 0\n\n",
    "bare LF in a field": b"GET / HTTP/1.1\r\n%bA: b\nTransfer-Encoding: chunked\r\n\r\n",
    "bare CR in a field": b"GET / HTTP/1.1\r\n%bA: b\rTransfer-Encoding: chunked\r\n\r\n",
    "NUL in a field": b"GET / HTTP/1.1\r\n%bA: b\0c\r\n\r\n",
    "two hosts": b"GET / HTTP/1.1\r\n%bHost: other\r\n\r\n",
    "space in the target": b"GET /a b HTTP/1.1\r\n%b\r\n",
    "no target": b"GET  HTTP/1.1\r\n%b\r\n",
    "line before the request": b"\r\nGET / HTTP/1.1\r\n%b\r\n",
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "too many fields": b"GET / HTTP/1.1\r\n%b" + b"A: b\r\n" * 101 + b"\r\n",
    "too long": b"GET / HTTP/1.1\r\n%bA: " + b"b" * 70_000 + b"\r\n\r\n",
    "colon in a name": b"GET / HTTP/1.1\r\n%b: b\r\n\r\n",
}


@pytest.mark.parametrize("name", REFUSED)
async def test_it_is_refused_and_the_server_sees_nothing(ingress: Fixture, name: str):
    recorder = Recorder()
    await ingress.port(8000, recorder.serve)
    raw = REFUSED[name]
    got = await ingress.exchange((raw.replace(b"%b", ROUTED)) + HIDDEN)
    assert got.startswith((b"HTTP/1.1 4", b"HTTP/1.1 5")), got[:80]
    assert got.count(b"HTTP/1.1 4") + got.count(b"HTTP/1.1 5") == 1
    assert b"Connection: close" in got
    assert recorder.got == b""


CHUNKS = {
    "negative": b"-1\r\n",
    "hex prefix": b"0x3\r\nabc\r\n",
    "bare LF": b"3\nabc\n",
    "too long": b"3\r\nabcd\r\n",
    "no CRLF after data": b"3\r\nabc4\r\nabcd\r\n",
    "spaces": b" 3\r\nabc\r\n",
    "huge": b"FFFFFFFFFFFFFFFFF\r\n",
    "bare LF in an extension": b"3;a\nb\r\nabc\r\n",
    "a field that is none": b"0\r\nnot a field\r\n\r\n",
    "endless size line": b"3;" + b"x" * 1000 + b"\r\nabc\r\n",
}


@pytest.mark.parametrize("name", CHUNKS)
async def test_broken_chunks_end_both_sides(ingress: Fixture, name: str):
    recorder = Recorder()
    await ingress.port(8000, recorder.serve)
    got = await ingress.exchange(
        head(method="POST", port=8000, extra="Transfer-Encoding: chunked\r\n") + CHUNKS[name] + HIDDEN
    )
    assert got == b"" or got.startswith(b"HTTP/1.1 400 ")
    assert b"/hidden" not in recorder.got
    for _ in range(50):
        if not ingress.hub.upstreams:
            return
        await asyncio.sleep(0.01)
    pytest.fail("the server was left waiting")


async def test_a_request_hidden_in_a_body_stays_a_body(ingress: Fixture):
    recorder = Recorder()
    await ingress.port(8000, recorder.serve)
    _, writer = await ingress.open()
    writer.write(head(method="POST", port=8000, extra=f"Content-Length: {len(HIDDEN)}\r\n") + HIDDEN)
    await asyncio.sleep(0.1)
    assert recorder.got.endswith(b"content-length: %d\r\n\r\n" % len(HIDDEN) + HIDDEN)
    writer.close()


async def test_only_one_request_at_a_time_reaches_a_server(ingress: Fixture):
    """The second pipelined request waits for the first's answer, so that answers cannot be swapped."""
    recorder = Recorder()
    await ingress.port(8000, recorder.serve)
    _, writer = await ingress.open()
    writer.write(head("/first", port=8000) + head("/second", port=8000))
    await asyncio.sleep(0.1)
    assert b"/first" in recorder.got and b"/second" not in recorder.got
    writer.close()


async def test_a_head_in_single_bytes_is_read_as_one(ingress: Fixture):
    recorder = Recorder()
    await ingress.port(8000, recorder.serve)
    _, writer = await ingress.open()
    for byte in head("/slowly", port=8000):
        writer.write(bytes([byte]))
        await writer.drain()
        await asyncio.sleep(0)
    await asyncio.sleep(0.1)
    assert recorder.got.startswith(b"GET /slowly HTTP/1.1\r\n") and recorder.got.endswith(b"\r\n\r\n")
    writer.close()

"""Connect's envelopes and errors, with connectrpc as the oracle for the latter."""

from __future__ import annotations

import json

import pytest
from connectrpc._protocol import ConnectWireError
from connectrpc.code import Code as TheirCode
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.errors import Kind, PenstockError
from penstock.wire import connect
from penstock.wire.connect import Code, ConnectError


@given(st.lists(st.tuples(st.sampled_from([0, 2]), st.binary(max_size=300)), max_size=8), st.integers(1, 50))
def test_envelopes_survive_any_cut(frames: list[tuple[int, bytes]], step: int) -> None:
    raw = b"".join(connect.frame(payload, flags) for flags, payload in frames)
    reader = connect.FrameReader()
    got: list[tuple[int, bytes]] = []
    for at in range(0, len(raw), step):
        got += reader.feed(raw[at : at + step])
    assert got == frames
    assert not reader.unfinished


def test_a_message_over_the_bound_is_refused_at_its_header() -> None:
    reader = connect.FrameReader(message_bytes_max=10)
    with pytest.raises(ConnectError) as refused:
        reader.feed(b"\x00\x00\x00\x00\x0b")
    assert refused.value.connect_code is Code.RESOURCE_EXHAUSTED


def test_a_compressed_message_is_refused() -> None:
    with pytest.raises(ConnectError):
        connect.FrameReader().feed(connect.frame(b"x", connect.COMPRESSED))


def test_every_code_is_one_of_the_protocol() -> None:
    assert {code.word for code in Code} == {code.value for code in TheirCode}


@pytest.mark.parametrize("code", list(Code))
def test_an_error_travels_whole(code: Code) -> None:
    error = ConnectError(code, "why: 'ä'")
    assert json.loads(connect.error_body(error)) == {"code": code.word, "message": "why: 'ä'"}
    (frame,) = connect.FrameReader().feed(connect.end_frame(error))
    assert frame[0] == connect.END_STREAM
    assert json.loads(frame[1])["error"] == {"code": code.word, "message": "why: 'ä'"}
    theirs = ConnectWireError.from_dict(json.loads(connect.error_body(error)), code.status, TheirCode.UNKNOWN)
    assert (theirs.code.value, theirs.message) == (code.word, "why: 'ä'")


@pytest.mark.parametrize("kind", list(Kind))
def test_every_kind_of_error_has_a_code(kind: Kind) -> None:
    class Some(PenstockError):
        pass

    Some.kind = kind
    assert isinstance(connect.as_connect_error(Some("what")).connect_code, Code)

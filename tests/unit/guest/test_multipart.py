"""The multipart parser: whatever way a body is cut, the same parts come out; a broken one is never half believed."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from penstock.guest.multipart import (
    BadMultipart,
    Multipart,
    PartBegin,
    PartData,
    PartEnd,
    boundary_of,
    header_parameters,
)

BOUNDARY = b"x-b"
# Data made of pieces of delimiters: the places where a parser goes wrong.
DATA = st.lists(st.sampled_from([b"\r", b"\n", b"\r\n", b"-", b"--", b"x-b", b"\r\n--x-", b"a", b"\0"]), max_size=8)


def parse(body: bytes, cuts: list[int]) -> list[tuple[str | None, bytes]]:
    parser = Multipart(BOUNDARY)
    parts: list[tuple[str | None, bytes]] = []
    whole = 0
    edges = sorted({min(cut, len(body)) for cut in cuts} | {0, len(body)})
    for start, stop in pairwise(edges):
        for event in parser.feed(body[start:stop]):
            match event:
                case PartBegin(filename=name):
                    parts.append((name, b""))
                case PartData(data=data):
                    assert data
                    parts[-1] = (parts[-1][0], parts[-1][1] + data)
                case PartEnd():
                    whole += 1
    parser.close()
    assert whole == len(parts)
    return parts


def build(datas: list[bytes]) -> bytes:
    head = b'Content-Disposition: form-data; name="file"; filename="f"\r\nX: y'
    return b"".join(b"--x-b\r\n" + head + b"\r\n\r\n" + data + b"\r\n" for data in datas) + b"--x-b--\r\nepilogue"


@given(
    datas=st.lists(
        DATA.map(b"".join).filter(lambda data: b"\r\n--x-b" not in b"\r\n" + data + b"\r\n--x-"), max_size=4
    ),
    cuts=st.lists(st.integers(0, 600), max_size=40),
)
@example(datas=[b"", b"\r\n", b""], cuts=list(range(600)))
def test_parts_are_the_same_however_the_body_is_cut(datas: list[bytes], cuts: list[int]) -> None:
    assert parse(build(datas), cuts) == [("f", data) for data in datas]


def test_memory_does_not_grow_with_a_part() -> None:
    parser = Multipart(BOUNDARY)
    list(parser.feed(build([])[:0] + b"--x-b\r\n\r\n"))
    for _ in range(100):
        list(parser.feed(b"\r" * 10_000))
        assert len(parser._buffer) < 64


def test_a_preamble_is_passed_over_and_a_part_may_have_no_fields() -> None:
    body = b"preamble\r\n--x-b \r\n\r\ndata\r\n--x-b--"
    assert parse(body, []) == [(None, b"data")]


@pytest.mark.parametrize(
    "body",
    [b"", b"--x-b\r\n", b"--x-b\r\n\r\ndata", b"--x-b\r\n\r\ndata\r\n--x-b", b"--x-bnoise\r\n\r\nx\r\n--x-b--",
     b"--x-b\r\nno colon\r\n\r\n\r\n--x-b--", b"--x-b\r\nContent-Disposition: attachment\r\n\r\n\r\n--x-b--",
     b"--x-b\r\nA: " + b"a" * 20_000, b"p" * 100_000],
)  # fmt: skip
def test_broken_bodies_are_refused(body: bytes) -> None:
    with pytest.raises(BadMultipart):
        parse(body, [])


def test_parameters() -> None:
    assert header_parameters('form-data; name="a;b"; filename="q\\"u\\\\o\\te"') == {
        "name": "a;b",
        "filename": 'q"u\\o\\te',
    }
    assert header_parameters("x; A=1; a=2; flag; b= 3 ") == {"a": "1", "b": "3"}
    assert header_parameters('x; open="never') == {"open": "never"}
    assert boundary_of('multipart/form-data; charset=utf-8; boundary="a b"') == b"a b"


def test_an_extended_file_name_is_decoded_and_wins() -> None:
    head = b"Content-Disposition: form-data; name=file; filename=plain; filename*=UTF-8''na%C3%AFve%2Fx%zz"
    assert parse(b"--x-b\r\n" + head + b"\r\n\r\n\r\n--x-b--", []) == [("naïve/x%zz", b"")]

"""The strict reader of DNS messages, against messages good, bad and hostile."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.node.linux import dns_messages as dns
from penstock.node.linux.dns_messages import Malformed


def name(text: str) -> bytes:
    return b"".join(bytes([len(label)]) + label.encode() for label in text.split(".") if label) + b"\0"


def query(text: str, *, kind: int = 1, number: int = 7, flags: int = 0x0100, klass: int = 1) -> bytes:
    return struct.pack(">HHHHHH", number, flags, 1, 0, 0, 0) + name(text) + struct.pack(">HH", kind, klass)


def answer(to: bytes, *records: tuple[bytes, int, bytes], flags: int = 0x8180) -> bytes:
    packed = b"".join(owner + struct.pack(">HHIH", kind, 1, 60, len(data)) + data for owner, kind, data in records)
    return to[:2] + struct.pack(">HHHHH", flags, 1, len(records), 0, 0) + to[12:] + packed


def test_a_question_is_read() -> None:
    question = dns.read_question(query("WWW.Example.com", kind=28))
    assert (question.id, question.name, question.type) == (7, "www.example.com", 28)
    assert dns.read_question(query("")).name == ""


def test_extensions_after_the_question_are_let_through() -> None:
    message = bytearray(query("a.test"))
    message[11] = 1
    assert dns.read_question(bytes(message) + b"\0\0\x29\x10\0\0\0\0\0\0\0").name == "a.test"


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\0" * 12,
        query("a.test")[:-1],
        query("a.test", flags=0x8180),  # an answer
        query("a.test", flags=0x2800),  # an update
        query("a.test", klass=3),
        query("a.test")[:4] + b"\0\2" + query("a.test")[6:],  # two questions
        query("a.test")[:6] + b"\0\1" + query("a.test")[8:],  # an answer in a query
        struct.pack(">HHHHHH", 7, 0, 1, 0, 0, 0) + b"\xc0\x0c\0\1\0\1",  # a pointer to itself
        struct.pack(">HHHHHH", 7, 0, 1, 0, 0, 0) + b"\x40" + b"a" * 64 + b"\0\0\1\0\1",
        struct.pack(">HHHHHH", 7, 0, 1, 0, 0, 0) + b"\x03a.b\0\0\1\0\1",  # a dot inside a label
        struct.pack(">HHHHHH", 7, 0, 1, 0, 0, 0) + b"\x02\xff\xfe\0\0\1\0\1",
        query(".".join(["a" * 60] * 5)),
    ],
)
def test_what_is_not_one_ordinary_question_is_refused(message: bytes) -> None:
    with pytest.raises(Malformed):
        dns.read_question(message)


def test_addresses_are_found_behind_aliases() -> None:
    asked = query("www.example.com")
    message = answer(
        asked,
        (b"\xc0\x0c", 5, name("cdn.example.net")),
        (name("cdn.example.net"), 1, bytes([93, 184, 216, 34])),
        (name("cdn.example.net"), 28, bytes(16)),
        (name("cdn.example.net"), 1, bytes([93, 184, 216, 35])),
    )
    assert dns.addresses(message) == ["93.184.216.34", "93.184.216.35"]


def test_an_answer_must_repeat_the_question() -> None:
    asked = query("www.example.com")
    question = dns.read_question(asked)
    assert dns.answers(answer(asked), question)
    assert dns.answers(answer(query("WWW.example.COM")), question)  # servers may keep the case as they like
    assert not dns.answers(answer(query("www.example.org")), question)
    assert not dns.answers(answer(query("www.example.com", kind=28)), question)
    assert not dns.answers(asked, question)
    assert not dns.answers(b"", question)


def test_truncation_and_renumbering() -> None:
    asked = query("a.test")
    assert dns.is_truncated(answer(asked, flags=0x8380))
    assert not dns.is_truncated(answer(asked))
    assert dns.read_question(dns.with_id(asked, 9)).id == 9


def test_a_failure_repeats_the_question() -> None:
    asked = query("a.test")
    failed = dns.failure(asked, dns.REFUSED)
    assert dns.answers(failed, dns.read_question(asked))
    assert failed[:2] == asked[:2]
    assert failed[3] & 0xF == 5
    assert dns.failure(b"\0\1" + b"\0" * 10, dns.FORMERR)[3] & 0xF == 1


@given(st.binary(max_size=200))
def test_no_bytes_make_it_do_more_than_refuse(message: bytes) -> None:
    for read in (dns.read_question, dns.addresses):
        try:
            read(message)
        except Malformed:
            pass


@given(st.binary(max_size=120))
def test_no_tail_of_an_answer_makes_it_do_more_than_refuse(tail: bytes) -> None:
    try:
        dns.addresses(answer(query("a.test"), (b"\xc0\x0c", 1, bytes(4))) + tail)
        dns.addresses(struct.pack(">HHHHHH", 7, 0x8180, 1, 9, 0, 0) + query("a.test")[12:] + tail)
    except Malformed:
        pass

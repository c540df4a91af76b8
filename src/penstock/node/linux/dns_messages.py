"""As much of DNS as a proxy must read to decide: the question, and the IPv4 addresses in an answer. RFC 1035.

Pure and strict: whatever is not exactly one ordinary question is refused rather than guessed at, and every loop over a
message from outside is bounded.
"""

from __future__ import annotations

import socket
import struct
from typing import Final, NamedTuple

MESSAGE_BYTES_MAX: Final = 65_535
UDP_BYTES_MAX: Final = 4096  # of a query or answer without TCP
NAME_BYTES_MAX: Final = 255
TYPE_A: Final = 1
CLASS_IN: Final = 1
SERVFAIL: Final = 2
REFUSED: Final = 5
FORMERR: Final = 1

_HEADER: Final = struct.Struct(">HHHHHH")
_RECORD: Final = struct.Struct(">HHIH")
_RESPONSE: Final = 0x8000
_OPCODE: Final = 0x7800
_RECURSION_DESIRED: Final = 0x0100
_RECURSION_AVAILABLE: Final = 0x0080
_TRUNCATED: Final = 0x0200
_RECORDS_MAX: Final = 512


class Malformed(ValueError):
    """Not a message this proxy forwards."""


class Question(NamedTuple):
    """The one question of a query. `packed` is its bytes on the wire, which a true answer repeats."""

    id: int
    name: str  # lower case, no trailing dot; "" is the root
    type: int
    packed: bytes


def read_question(message: bytes) -> Question:
    """Raises Malformed unless `message` is a standard query with exactly one question of class IN."""
    if not _HEADER.size < len(message) <= MESSAGE_BYTES_MAX:
        raise Malformed("length")
    number, flags, questions, answers, _, _ = _HEADER.unpack_from(message)
    if flags & (_RESPONSE | _OPCODE) or questions != 1 or answers:
        raise Malformed("not one standard question")
    name, kind, packed = _question(message)
    return Question(number, name, kind, packed)


def answers(message: bytes, question: Question) -> bool:
    """Whether `message` is an answer to this very question (its id is judged by whoever sent it)."""
    if len(message) <= _HEADER.size:
        return False
    _, flags, questions, *_ = _HEADER.unpack_from(message)
    if not flags & _RESPONSE or questions != 1:
        return False
    packed = message[_HEADER.size : _HEADER.size + len(question.packed)]
    return packed.lower() == question.packed.lower()


def is_truncated(message: bytes) -> bool:
    return bool(struct.unpack_from(">H", message, 2)[0] & _TRUNCATED)


def addresses(message: bytes) -> list[str]:
    """The IPv4 addresses in the answer section. Raises Malformed on a message that does not add up."""
    if len(message) < _HEADER.size:
        raise Malformed("header cut short")
    _, _, questions, count, _, _ = _HEADER.unpack_from(message)
    at = _HEADER.size
    for _ in range(min(questions, 1)):
        at = _skip_name(message, at) + 4
    found: list[str] = []
    for _ in range(min(count, _RECORDS_MAX)):
        at = _skip_name(message, at)
        if at + _RECORD.size > len(message):
            raise Malformed("record cut short")
        kind, klass, _, length = _RECORD.unpack_from(message, at)
        at += _RECORD.size
        if at + length > len(message):
            raise Malformed("data cut short")
        if kind == TYPE_A and klass == CLASS_IN and length == 4:
            found.append(socket.inet_ntoa(message[at : at + 4]))
        at += length
    return found


def with_id(message: bytes, number: int) -> bytes:
    return struct.pack(">H", number) + message[2:]


def failure(message: bytes, code: int) -> bytes:
    """An answer without records, carrying `code`, to a query whose header at least could be read."""
    number, flags, *_ = _HEADER.unpack_from(message)
    back = _RESPONSE | (flags & (_OPCODE | _RECURSION_DESIRED)) | _RECURSION_AVAILABLE | code
    try:
        packed = _question(message)[2]
    except Malformed:
        return _HEADER.pack(number, back, 0, 0, 0, 0)
    return _HEADER.pack(number, back, 1, 0, 0, 0) + packed


def _question(message: bytes) -> tuple[str, int, bytes]:
    labels: list[str] = []
    at = _HEADER.size
    while True:
        if at >= len(message) or at - _HEADER.size > NAME_BYTES_MAX:
            raise Malformed("name cut short or too long")
        length = message[at]
        at += 1
        if length == 0:
            break
        if length > 63 or at + length > len(message):
            raise Malformed("label")
        label = message[at : at + length]
        if b"." in label or not label.isascii():
            raise Malformed("a label no host name has")
        labels.append(label.decode("ascii").lower())
        at += length
    if at + 4 > len(message):
        raise Malformed("question cut short")
    kind, klass = struct.unpack_from(">HH", message, at)
    if klass != CLASS_IN:
        raise Malformed("class")
    return ".".join(labels), kind, message[_HEADER.size : at + 4]


def _skip_name(message: bytes, at: int) -> int:
    for _ in range(NAME_BYTES_MAX):
        if at >= len(message):
            raise Malformed("name cut short")
        length = message[at]
        if length == 0:
            return at + 1
        if length & 0xC0 == 0xC0:
            if at + 2 > len(message):
                raise Malformed("pointer cut short")
            return at + 2
        if length & 0xC0:
            raise Malformed("label type")
        at += 1 + length
    raise Malformed("name too long")

"""The Connect protocol's bytes: envelopes of streams, codes of errors. JSON codec only.

A unary call is a plain JSON body; an error is an HTTP status and `{"code", "message"}`. A stream is HTTP 200 and a
row of envelopes `flags(1) length(4, big endian) payload`; the last one has END_STREAM set and carries `{}` or
`{"error": {...}}`. Source: connectrpc.com/docs/protocol.
"""

from __future__ import annotations

import json
import struct
from enum import Enum
from typing import Final

from penstock.core.errors import Kind, PenstockError

MESSAGE_BYTES_MAX: Final = 4 * 1024 * 1024  # of one payload; a bigger one is RESOURCE_EXHAUSTED
COMPRESSED: Final = 0x01
END_STREAM: Final = 0x02
UNARY_TYPE: Final = b"application/json"
STREAM_TYPE: Final = b"application/connect+json"
_HEADER: Final = struct.Struct(">BI")


class Code(Enum):
    """Connect's error codes and the HTTP status each one travels under in a unary answer."""

    CANCELED = ("canceled", 499)
    UNKNOWN = ("unknown", 500)
    INVALID_ARGUMENT = ("invalid_argument", 400)
    DEADLINE_EXCEEDED = ("deadline_exceeded", 504)
    NOT_FOUND = ("not_found", 404)
    ALREADY_EXISTS = ("already_exists", 409)
    PERMISSION_DENIED = ("permission_denied", 403)
    RESOURCE_EXHAUSTED = ("resource_exhausted", 429)
    FAILED_PRECONDITION = ("failed_precondition", 400)
    ABORTED = ("aborted", 409)
    OUT_OF_RANGE = ("out_of_range", 400)
    UNIMPLEMENTED = ("unimplemented", 501)
    INTERNAL = ("internal", 500)
    UNAVAILABLE = ("unavailable", 503)
    DATA_LOSS = ("data_loss", 500)
    UNAUTHENTICATED = ("unauthenticated", 401)

    def __init__(self, word: str, status: int) -> None:
        self.word, self.status = word, status


_BY_KIND: Final = {
    Kind.INVALID: Code.INVALID_ARGUMENT,
    Kind.UNAUTHENTICATED: Code.UNAUTHENTICATED,
    Kind.FORBIDDEN: Code.PERMISSION_DENIED,
    Kind.NOT_FOUND: Code.NOT_FOUND,
    Kind.CONFLICT: Code.FAILED_PRECONDITION,
    Kind.EXHAUSTED: Code.RESOURCE_EXHAUSTED,
    Kind.UNAVAILABLE: Code.UNAVAILABLE,
    Kind.UNSUPPORTED: Code.UNIMPLEMENTED,
    Kind.DEADLINE: Code.DEADLINE_EXCEEDED,
    Kind.INTERNAL: Code.INTERNAL,
}
_BY_STATUS: Final = {  # for an answer that is not Connect's own (a proxy's); source: protocol, "HTTP to error code"
    400: Code.INTERNAL,
    401: Code.UNAUTHENTICATED,
    403: Code.PERMISSION_DENIED,
    404: Code.UNIMPLEMENTED,
    429: Code.UNAVAILABLE,
    502: Code.UNAVAILABLE,
    503: Code.UNAVAILABLE,
    504: Code.UNAVAILABLE,
}


class ConnectError(PenstockError):
    """A call's failure as its caller sees it. `message` is shown verbatim: the SDKs match on some of them."""

    code: str = "connect"  # type: ignore[misc]

    def __init__(self, code: Code, message: str) -> None:
        self.connect_code, self.message = code, message
        super().__init__(message)

    def __str__(self) -> str:
        return self.message


def as_connect_error(error: PenstockError) -> ConnectError:
    """Any error of ours, in Connect's words."""
    if isinstance(error, ConnectError):
        return error
    return ConnectError(_BY_KIND[error.kind], str(error))


def code_of_status(status: int) -> Code:
    return _BY_STATUS.get(status, Code.UNKNOWN)


def frame(payload: bytes, flags: int = 0) -> bytes:
    """One envelope."""
    return _HEADER.pack(flags, len(payload)) + payload


def end_frame(error: ConnectError | None = None) -> bytes:
    """The envelope that ends a stream."""
    if error is None:
        return b"\x02\x00\x00\x00\x02{}"
    body = {"error": {"code": error.connect_code.word, "message": error.message}}
    return frame(json.dumps(body).encode(), END_STREAM)


def error_body(error: ConnectError) -> bytes:
    """Body of a failed unary call; its status is `error.connect_code.status`."""
    return json.dumps({"code": error.connect_code.word, "message": error.message}).encode()


class FrameReader:
    """Cuts envelopes out of a byte stream. Holds at most one unfinished envelope of `message_bytes_max`."""

    __slots__ = ("_buffer", "_message_bytes_max")

    def __init__(self, message_bytes_max: int = MESSAGE_BYTES_MAX) -> None:
        self._buffer = bytearray()
        self._message_bytes_max = message_bytes_max

    def feed(self, data: bytes) -> list[tuple[int, bytes]]:
        """Complete (flags, payload) pairs, in order. Raises ConnectError: too long, or compressed."""
        buffer = self._buffer
        buffer += data
        frames: list[tuple[int, bytes]] = []
        at = 0
        while len(buffer) - at >= 5:
            flags, length = _HEADER.unpack_from(buffer, at)
            if length > self._message_bytes_max:
                raise ConnectError(
                    Code.RESOURCE_EXHAUSTED, f"message of {length} bytes exceeds {self._message_bytes_max}"
                )
            if flags & COMPRESSED:
                raise ConnectError(Code.INTERNAL, "compressed message without a negotiated compression")
            if len(buffer) - at - 5 < length:
                break
            frames.append((flags, bytes(buffer[at + 5 : at + 5 + length])))
            at += 5 + length
        del buffer[:at]
        return frames

    @property
    def unfinished(self) -> bool:
        """Whether the bytes so far end inside an envelope."""
        return bool(self._buffer)

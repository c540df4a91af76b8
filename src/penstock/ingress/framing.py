"""Where a body ends. Each kind eats what arrives and gives back what to send on, at once and unbuffered."""

from __future__ import annotations

from typing import Final, Protocol

from penstock.wire.chunked import LAST_CHUNK, ChunkedDecoder, chunk
from penstock.wire.http1 import BadRequest, Framing, RequestHead, ResponseHead


class Body(Protocol):
    def feed(self, data: bytes) -> tuple[bytes, bytes | None]:
        """(what to send on, what followed the body's end or None while it goes on). Raises BadRequest."""


class Length:
    """`left` bytes to come."""

    __slots__ = ("left",)

    def __init__(self, left: int) -> None:
        self.left = left

    def feed(self, data: bytes) -> tuple[bytes, bytes | None]:
        size = len(data)
        if size < self.left:
            self.left -= size
            return data, None
        left, self.left = self.left, 0
        return (data, b"") if size == left else (data[:left], data[left:])


class Chunks:
    """Checked, decoded, and encoded again (or sent plain to a client of HTTP/1.0). Trailers end here."""

    __slots__ = ("_decoder", "_encode")

    def __init__(self, *, encode: bool = True) -> None:
        self._decoder = ChunkedDecoder()
        self._encode = encode

    def feed(self, data: bytes) -> tuple[bytes, bytes | None]:
        pieces = self._decoder.feed(data)
        done = self._decoder.done
        if self._encode:
            pieces = [chunk(piece) for piece in pieces]
            if done:
                pieces.append(LAST_CHUNK)
        return b"".join(pieces), self._decoder.rest if done else None


class UntilClose:
    """Only the end of the connection ends it."""

    __slots__ = ()

    def feed(self, data: bytes) -> tuple[bytes, bytes | None]:
        return data, None


UNTIL_CLOSE: Final = UntilClose()


def of_request(head: RequestHead) -> Body | None:
    """The body that follows, or None."""
    if head.framing is Framing.LENGTH:
        return Length(head.content_length)
    return Chunks() if head.framing is Framing.CHUNKED else None


def of_response(head: ResponseHead, *, encode: bool) -> Body | None:
    if head.framing is Framing.LENGTH:
        return Length(head.content_length) if head.content_length else None
    if head.framing is Framing.CHUNKED:
        return Chunks(encode=encode)
    return UNTIL_CLOSE if head.framing is Framing.UNTIL_CLOSE else None


__all__ = ["UNTIL_CLOSE", "BadRequest", "Body", "Chunks", "Length", "UntilClose", "of_request", "of_response"]

"""Chunked bodies (RFC 9112, 7.1): encoding, and a strict incremental decoder."""

from __future__ import annotations

import re
from typing import Final

from penstock.wire.http1 import FIELDS, VALUE, BadRequest

CHUNK_LINE_BYTES_MAX: Final = 256  # size and extensions
TRAILER_BYTES_MAX: Final = 16 * 1024
LAST_CHUNK: Final = b"0\r\n\r\n"

_CHUNK_LINE: Final = re.compile(rb"([0-9A-Fa-f]{1,15})(?:;" + VALUE + rb"*)?")


def chunk(data: bytes) -> bytes:
    """One chunk. `data` must not be empty: an empty chunk ends the body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


class ChunkedDecoder:
    """Decodes one chunked body, in pieces of any size. Trailer fields are checked and dropped.

    Holds at most TRAILER_BYTES_MAX of unfinished line. After `done`, `rest` is what followed the body.
    """

    __slots__ = ("_in_trailer", "_left", "_line", "_trailer_bytes", "done", "rest")

    def __init__(self) -> None:
        self._line = b""  # the unfinished line
        self._left = 0  # of the current chunk: data bytes plus its CRLF; 0 = a size line comes next
        self._in_trailer = False
        self._trailer_bytes = 0
        self.done = False
        self.rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The body bytes in `data`, in order. Raises BadRequest(400) when the framing is broken."""
        assert not self.done, "fed after its end"
        if self._line:
            data, self._line = self._line + data, b""
        pieces: list[bytes] = []
        at, end = 0, len(data)
        while at < end:
            if self._left:
                at = self._take_data(data, at, end, pieces)
                continue
            stop = data.find(b"\n", at)
            if stop < 0:
                self._keep_line(data[at:])
                return pieces
            line = data[at : stop + 1]
            at = stop + 1
            if self._in_trailer:
                if self._end_trailer_line(line):
                    self.done, self.rest = True, data[at:]
                    return pieces
            else:
                self._start_chunk(line)
        return pieces

    def _take_data(self, data: bytes, at: int, end: int, pieces: list[bytes]) -> int:
        body = self._left - 2
        if body > 0:
            take = min(body, end - at)
            pieces.append(data if take == len(data) else data[at : at + take])
            self._left -= take
            return at + take
        tail = data[at : at + self._left]
        if tail != b"\r\n"[2 - self._left :][: len(tail)]:
            raise BadRequest(400, "chunk data runs past its size")
        self._left -= len(tail)
        return at + len(tail)

    def _start_chunk(self, line: bytes) -> None:
        found = (
            _CHUNK_LINE.fullmatch(line[:-2]) if line.endswith(b"\r\n") and len(line) <= CHUNK_LINE_BYTES_MAX else None
        )
        if found is None:
            raise BadRequest(400, "malformed chunk size")
        size = int(found[1], 16)
        if size:
            self._left = size + 2
        else:
            self._in_trailer = True

    def _end_trailer_line(self, line: bytes) -> bool:
        if line == b"\r\n":
            return True
        self._trailer_bytes += len(line)
        if self._trailer_bytes > TRAILER_BYTES_MAX or not FIELDS.fullmatch(line):
            raise BadRequest(400, "malformed trailer")
        return False

    def _keep_line(self, part: bytes) -> None:
        ceiling = TRAILER_BYTES_MAX if self._in_trailer else CHUNK_LINE_BYTES_MAX
        if len(part) > ceiling:
            raise BadRequest(400, "chunk size line too long")
        self._line = part

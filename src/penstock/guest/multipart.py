"""multipart/form-data, read as it arrives: parts of any size in memory of one piece and one delimiter.

Push parser: `feed` bytes, get events. Strict about what decides where a part ends, lenient about what does not (a
preamble, blanks after a delimiter, an epilogue). Sources: RFC 2046 5.1, RFC 7578.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Final

from penstock.core.errors import Kind, PenstockError

BOUNDARY_BYTES_MAX: Final = 200  # RFC 2046 says 70; some clients take more
PART_HEAD_BYTES_MAX: Final = 16 * 1024
PREAMBLE_BYTES_MAX: Final = 64 * 1024


class BadMultipart(PenstockError):
    kind = Kind.INVALID
    code = "bad_multipart"

    def __init__(self, why: str) -> None:
        super().__init__(f"malformed multipart body: {why}")


@dataclass(frozen=True)
class PartBegin:
    """A part's head: form name and file name, which may hold slashes. None when absent."""

    name: str | None
    filename: str | None


@dataclass(frozen=True)
class PartData:
    data: bytes


@dataclass(frozen=True)
class PartEnd:
    pass


Event = PartBegin | PartData | PartEnd


class _Phase(Enum):
    PREAMBLE = "preamble"
    DELIMITER = "delimiter"  # after "--boundary": "--" ends all, a line end begins a part
    HEAD = "head"
    DATA = "data"
    END = "end"


class Multipart:
    """Parser of one body. After the last `feed`, `close` says whether it was whole."""

    def __init__(self, boundary: bytes) -> None:
        if not boundary or len(boundary) > BOUNDARY_BYTES_MAX:
            raise BadMultipart("boundary is missing or too long")
        self._delimiter = b"\r\n--" + boundary
        # A body may begin with the delimiter; then its line end is the one before the body.
        self._buffer = bytearray(b"\r\n")
        self._phase = _Phase.PREAMBLE

    def feed(self, data: bytes) -> Iterator[Event]:
        """Events of the body so far. Exhaust it before feeding again. Raises BadMultipart."""
        if self._phase is _Phase.END:
            return
        self._buffer += data
        moved = True
        while moved:
            before = self._phase
            event = self._advance()
            if event is not None:
                yield event
            moved = event is not None or self._phase is not before

    def close(self) -> None:
        """Raises BadMultipart when the closing delimiter did not come."""
        if self._phase is not _Phase.END:
            raise BadMultipart("ended before its closing delimiter")

    def _advance(self) -> Event | None:
        """One step; None without a change of phase means that more bytes are needed."""
        match self._phase:
            case _Phase.PREAMBLE:
                if self._find_delimiter(PREAMBLE_BYTES_MAX):
                    self._phase = _Phase.DELIMITER
                return None
            case _Phase.DELIMITER:
                self._after_delimiter()
                return None
            case _Phase.HEAD:
                return self._read_head()
            case _Phase.DATA:
                return self._read_data()
            case _Phase.END:
                return None

    def _find_delimiter(self, bytes_max: int) -> bool:
        at = self._buffer.find(self._delimiter)
        if at < 0:
            if len(self._buffer) > bytes_max:
                raise BadMultipart("no delimiter in its beginning")
            return False
        del self._buffer[: at + len(self._delimiter)]
        return True

    def _after_delimiter(self) -> None:
        line_end = self._buffer.find(b"\r\n")
        if self._buffer.startswith(b"--"):
            self._phase = _Phase.END
            self._buffer.clear()
        elif line_end >= 0:
            if self._buffer[:line_end].strip(b" \t"):
                raise BadMultipart("text after a delimiter")
            # The line end stays: a part without fields has its empty line right here.
            del self._buffer[:line_end]
            self._phase = _Phase.HEAD
        elif len(self._buffer) > PART_HEAD_BYTES_MAX:
            raise BadMultipart("text after a delimiter")

    def _read_head(self) -> Event | None:
        end = self._buffer.find(b"\r\n\r\n", 0, PART_HEAD_BYTES_MAX + 4)
        if end < 0:
            if len(self._buffer) > PART_HEAD_BYTES_MAX:
                raise BadMultipart("head of a part is too long")
            return None
        lines = bytes(self._buffer[2:end]).split(b"\r\n") if end else []
        # Two bytes of line end stay, so that the delimiter after empty data is found.
        del self._buffer[: end + 2]
        self._phase = _Phase.DATA
        self._fresh = True
        return _part(lines)

    _fresh = False

    def _read_data(self) -> Event | None:
        if self._fresh:
            # The kept line end belongs to the head: it is not data, but may begin a delimiter.
            if self._buffer.startswith(self._delimiter):
                self._fresh = False
                return self._end_part(0)
            if len(self._buffer) < len(self._delimiter) and self._delimiter.startswith(bytes(self._buffer)):
                return None
            del self._buffer[:2]
            self._fresh = False
        at = self._buffer.find(self._delimiter)
        if at == 0:
            return self._end_part(0)
        # What could be the beginning of a delimiter stays.
        ready = at if at > 0 else self._safe_length()
        if not ready:
            return None
        data = bytes(self._buffer[:ready])
        del self._buffer[:ready]
        return PartData(data)

    def _safe_length(self) -> int:
        """How many bytes of the buffer cannot belong to a delimiter that is not whole yet."""
        start = max(0, len(self._buffer) - len(self._delimiter) + 1)
        at = self._buffer.find(b"\r", start)
        while at >= 0:
            if self._delimiter.startswith(bytes(self._buffer[at:])):
                return at
            at = self._buffer.find(b"\r", at + 1)
        return len(self._buffer)

    def _end_part(self, at: int) -> PartEnd:
        del self._buffer[: at + len(self._delimiter)]
        self._phase = _Phase.DELIMITER
        return PartEnd()


def boundary_of(content_type: str) -> bytes:
    """The boundary parameter of a Content-Type. Raises BadMultipart."""
    parameters = header_parameters(content_type)
    return parameters.get("boundary", "").encode("latin-1", "replace")


def header_parameters(value: str) -> dict[str, str]:
    """Parameters of a header value such as `form-data; name="a"; filename=b`: names in lower case, first one counts.

    In a quoted string a backslash escapes a quote or a backslash and otherwise stands for itself, as browsers send it.
    """
    parameters: dict[str, str] = {}
    at = value.find(";")
    while 0 <= at < len(value):
        at += 1
        equals = value.find("=", at)
        semicolon = value.find(";", at)
        if equals < 0:
            break
        if 0 <= semicolon < equals:
            at = semicolon
            continue
        name = value[at:equals].strip().lower()
        text, at = _parameter_value(value, equals + 1)
        parameters.setdefault(name, text)
    return parameters


def _parameter_value(value: str, at: int) -> tuple[str, int]:
    """The value that begins at `at`, and where the next parameter's semicolon is, or the end."""
    while at < len(value) and value[at] in " \t":
        at += 1
    if at >= len(value) or value[at] != '"':
        end = value.find(";", at)
        end = len(value) if end < 0 else end
        return value[at:end].strip(), end
    text: list[str] = []
    at += 1
    while at < len(value) and value[at] != '"':
        if value[at] == "\\" and at + 1 < len(value) and value[at + 1] in '"\\':
            at += 1
        text.append(value[at])
        at += 1
    end = value.find(";", at)
    return "".join(text), len(value) if end < 0 else end


def _part(lines: list[bytes]) -> PartBegin:
    for line in lines:
        field, colon, raw = line.partition(b":")
        if not colon:
            raise BadMultipart("a field of a part has no colon")
        if field.strip().lower() != b"content-disposition":
            continue
        value = raw.decode("utf-8", "surrogateescape")
        if value.partition(";")[0].strip().lower() != "form-data":
            raise BadMultipart("a part is not form-data")
        parameters = header_parameters(value)
        return PartBegin(parameters.get("name"), _extended(parameters) or parameters.get("filename"))
    return PartBegin(None, None)


def _extended(parameters: dict[str, str]) -> str | None:
    """`filename*` (RFC 5987) in UTF-8, percent-encoded; None when absent or in another charset."""
    charset, quote, rest = parameters.get("filename*", "").partition("'")
    if not quote or charset.lower() != "utf-8":
        return None
    raw = rest.partition("'")[2].encode("utf-8", "surrogateescape")
    out, at = bytearray(), 0
    while at < len(raw):
        digits = raw[at + 1 : at + 3]
        if raw[at] == 0x25 and len(digits) == 2 and all(digit in b"0123456789abcdefABCDEF" for digit in digits):
            out.append(int(digits, 16))
            at += 3
        else:
            out.append(raw[at])
            at += 1
    return out.decode("utf-8", "surrogateescape")

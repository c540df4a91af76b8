"""What a download's request asks for: encoding, range, conditions; and what its answer says about the file.

Pure. Sources: RFC 9110 (12.5.3 Accept-Encoding, 13 conditional requests, 14 ranges), RFC 6266 and 8187
(Content-Disposition). A request for several ranges is answered with the whole file, which RFC 9110 14.2 allows: no
client of ours asks for it, and overlapping ranges are a known way to make servers work.
"""

from __future__ import annotations

import calendar
import time
from enum import Enum
from typing import Final, NamedTuple

ENTRIES_MAX: Final = 32  # of Accept-Encoding; the rest is not looked at


class Encoding(Enum):
    IDENTITY = "identity"
    GZIP = "gzip"


def encoding(accept: str) -> Encoding | None:
    """The encoding to answer with: the supported one the client likes best; None when it accepts neither (406).

    Identity when the header is absent, and as the last resort unless `identity;q=0` or `*;q=0` forbids it.
    """
    entries = [_entry(part) for part in accept.split(",")[:ENTRIES_MAX] if part.strip()]
    forbidden = {name for name, weight in entries if weight == 0}
    wanted = sorted((entry for entry in entries if entry[1] > 0), key=lambda entry: -entry[1])
    named = {name for name, _ in entries}
    identity_allowed = "identity" not in forbidden and ("*" not in forbidden or "identity" in named)
    for name, _ in wanted:
        if name in {"gzip", "x-gzip"}:
            return Encoding.GZIP
        if name == "identity" or (name == "*" and identity_allowed):
            return Encoding.IDENTITY
        if name == "*" and "gzip" not in forbidden:
            return Encoding.GZIP
    return Encoding.IDENTITY if identity_allowed else None


def _entry(part: str) -> tuple[str, float]:
    name, _, parameters = part.partition(";")
    weight = 1.0
    for parameter in parameters.split(";"):
        key, _, value = parameter.partition("=")
        if key.strip().lower() == "q":
            try:
                weight = max(0.0, min(1.0, float(value.strip())))  # in this order a NaN becomes 1.0
            except ValueError:
                weight = 0.0
    return name.strip().lower(), weight


class Span(NamedTuple):
    """Bytes `start` up to, not including, `stop`."""

    start: int
    stop: int


class Unsatisfiable(Exception):
    """The range lies beyond the file: 416."""


def byte_range(header: str, size: int) -> Span | None:
    """The one range asked for; None when none is, or when the header is not one we must understand.

    Raises Unsatisfiable.
    """
    unit, _, text = header.partition("=")
    if unit.strip().lower() != "bytes" or "," in text:
        return None
    first, dash, last = text.strip().partition("-")
    first, last = first.strip(), last.strip()
    if not dash or not _digits(first or "0") or not _digits(last or "0") or not (first or last):
        return None
    if not first:
        length = min(int(last), size)
        if length == 0:
            raise Unsatisfiable
        return Span(size - length, size)
    start = int(first)
    if last and int(last) < start:
        return None
    if start >= size:
        raise Unsatisfiable
    return Span(start, min(int(last) + 1, size) if last else size)


def _digits(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 19


class Conditions(NamedTuple):
    """The conditional headers of a request, empty when absent."""

    if_match: str = ""
    if_unmodified_since: str = ""
    if_none_match: str = ""
    if_modified_since: str = ""
    if_range: str = ""

    def status(self, etag: str, modified_s: int) -> int:
        """200, or 304 or 412 when the conditions say so. Order of RFC 9110 13.2.2."""
        if self.if_match:
            if not _matches(self.if_match, etag):
                return 412
        elif (since := parse_date(self.if_unmodified_since)) is not None and modified_s > since:
            return 412
        if self.if_none_match:
            return 304 if _matches(self.if_none_match, etag) else 200
        since = parse_date(self.if_modified_since)
        return 304 if since is not None and modified_s <= since else 200

    def range_holds(self, etag: str, modified_s: int) -> bool:
        """Whether a range may be given: the client's part is of this very file."""
        if not self.if_range:
            return True
        if self.if_range.startswith('"'):
            return self.if_range == etag
        return parse_date(self.if_range) == modified_s


def _matches(header: str, etag: str) -> bool:
    if header.strip() == "*":
        return True
    return any(part.strip().removeprefix("W/") == etag for part in header.split(","))


_DAYS: Final = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_MONTHS: Final = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


def format_date(seconds: int) -> str:
    """An HTTP date, `Sun, 06 Nov 1994 08:49:37 GMT`, independent of any locale."""
    at = time.gmtime(min(max(seconds, 0), 253_402_300_799))
    day, month = _DAYS[at.tm_wday], _MONTHS[at.tm_mon - 1]
    return f"{day}, {at.tm_mday:02} {month} {at.tm_year:04} {at.tm_hour:02}:{at.tm_min:02}:{at.tm_sec:02} GMT"


def parse_date(text: str) -> int | None:
    """Seconds since the epoch of an HTTP date; None for anything else. The two obsolete forms are not read."""
    parts = text.replace(",", " ").split()
    if len(parts) != 6 or parts[2] not in _MONTHS or parts[5] != "GMT":
        return None
    clock = parts[4].split(":")
    if len(clock) != 3 or not all(_digits(part) for part in (parts[1], parts[3], *clock)) or len(parts[3]) != 4:
        return None
    hour, minute, second = (int(part) for part in clock)
    if not 1 <= int(parts[1]) <= 31 or hour > 23 or minute > 59 or second > 60 or int(parts[3]) < 1:
        return None
    return calendar.timegm((int(parts[3]), _MONTHS.index(parts[2]) + 1, int(parts[1]), hour, minute, second))


_TYPES: Final = {
    "avif": "image/avif", "css": "text/css; charset=utf-8", "csv": "text/csv; charset=utf-8", "gif": "image/gif",
    "gz": "application/gzip", "htm": "text/html; charset=utf-8", "html": "text/html; charset=utf-8",
    "ico": "image/x-icon", "jpeg": "image/jpeg", "jpg": "image/jpeg", "js": "text/javascript; charset=utf-8",
    "json": "application/json", "md": "text/markdown; charset=utf-8", "mjs": "text/javascript; charset=utf-8",
    "mp3": "audio/mpeg", "mp4": "video/mp4", "pdf": "application/pdf", "png": "image/png",
    "py": "text/x-python; charset=utf-8", "svg": "image/svg+xml", "tar": "application/x-tar",
    "txt": "text/plain; charset=utf-8", "wasm": "application/wasm", "wav": "audio/wav", "webm": "video/webm",
    "webp": "image/webp", "woff": "font/woff", "woff2": "font/woff2", "xml": "text/xml; charset=utf-8",
    "zip": "application/zip",
}  # fmt: skip
_MAGIC: Final = (
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF87a", "image/gif"),
    (b"GIF89a", "image/gif"),
    (b"%PDF-", "application/pdf"),
    (b"\x1f\x8b\x08", "application/gzip"),
    (b"PK\x03\x04", "application/zip"),
    (b"\0asm", "application/wasm"),
)
# Control bytes that no text holds; tab, line feed, form feed, carriage return and escape are text.
_BINARY: Final = frozenset(range(0x20)) - {0x09, 0x0A, 0x0C, 0x0D, 0x1B}


def content_type(name: str, beginning: bytes) -> str:
    """By extension, else by the first bytes, else text or not."""
    known = _TYPES.get(name.rpartition(".")[2].lower()) if "." in name else None
    if known is not None:
        return known
    for magic, kind in _MAGIC:
        if beginning.startswith(magic):
            return kind
    if _BINARY.isdisjoint(beginning[:512]):
        return "text/plain; charset=utf-8"
    return "application/octet-stream"


_PLAIN: Final = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._~")


def content_disposition(name: str) -> str:
    """`inline` with the file's name: plain, quoted, or percent-encoded UTF-8, whichever it needs. Never a line end."""
    raw = name.encode("utf-8", "surrogateescape")
    if all(byte in _PLAIN for byte in raw):
        return f"inline; filename={name}"
    if name.isascii() and name.isprintable():
        escaped = name.replace("\\", "\\\\").replace('"', '\\"')
        return f'inline; filename="{escaped}"'
    encoded = "".join(chr(byte) if byte in _PLAIN else f"%{byte:02X}" for byte in raw)
    return f"inline; filename*=utf-8''{encoded}"

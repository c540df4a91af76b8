"""HTTP/1.1 heads and chunked bodies, parsed strictly. Shared by the guest and the ingress.

Whatever is accepted here, h11 accepts with the same meaning; whatever h11 rejects is rejected here
(`tests/unit/wire/test_http1_against_h11.py`). Two parsers that read one message differently are what request
smuggling lives on, so where RFC 9112 lets a recipient be lenient we are not: lines end in CRLF only, no folded
lines, no Content-Length beside Transfer-Encoding, no transfer coding but `chunked`, no repeated framing field.

No loop runs per byte: one regular expression validates the whole head, then `split` and `partition` cut it.
Sources: RFC 9110, RFC 9112 sections 2-7.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import Enum
from typing import Final

HEAD_BYTES_MAX: Final = 64 * 1024  # request or status line and fields, with the final empty line
FIELDS_MAX: Final = 100
LENGTH_DIGITS_MAX: Final = 18  # below 2**63, so that no peer's integer overflows

_TLS_HANDSHAKE: Final = b"\x16\x03"  # how every ClientHello begins (RFC 8446, 5.1)
_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]"
VALUE = rb"[\t\x20-\x7e\x80-\xff]"
# Possessive quantifiers: a hostile head costs one pass, never backtracking.
_REQUEST_LINE: Final = re.compile(rb"(" + _TOKEN + rb"{1,32}) ([\x21-\x7e]++) HTTP/(?=1\.[01]\r\n)")
_STATUS_LINE: Final = re.compile(rb"HTTP/(1\.[01]) ([1-9][0-9]{2})(?: (" + VALUE + rb"*))?")
FIELDS: Final = re.compile(rb"(?:" + _TOKEN + rb"++:" + VALUE + rb"*+\r\n)*+")
_FIELD: Final = re.compile(rb"([^:]++):[\t ]*+([^\r]*+)\r\n")  # cuts what FIELDS has passed
_HOST: Final = re.compile(rb"[A-Za-z0-9\-._~%!$&'()*+,;=\[\]:]*")
_ABSOLUTE: Final = re.compile(rb"https?://[^/?#]*", re.IGNORECASE)

_FRAMING_FIELDS: Final = frozenset((b"content-length", b"transfer-encoding", b"host", b"connection", b"upgrade"))

Field = tuple[bytes, bytes]


class BadRequest(Exception):
    """The peer sent something that is not a message we serve. Answer `status` and close the connection."""

    def __init__(self, status: int, why: str) -> None:
        self.status, self.why = status, why
        super().__init__(why)


class Framing(Enum):
    """How the end of a body is found."""

    NONE = "none"
    LENGTH = "length"
    CHUNKED = "chunked"
    UNTIL_CLOSE = "until close"  # responses only


class Fields:
    """The fields of a message and what they say of it. Names are lower case; values have no blanks around them.

    Of a request this is all but method and target, and depends on nothing else: the ingress keeps it by its bytes.
    `content_length` is 0 unless `framing` is LENGTH. `upgrade` is the wanted protocol, lower case, or None.
    """

    __slots__ = ("content_length", "expects_continue", "fields", "framing", "keep_alive", "minor", "upgrade")

    def __init__(self, minor: int, fields: list[Field]) -> None:
        self.minor, self.fields = minor, fields
        self.framing = Framing.NONE
        self.content_length = 0
        self.keep_alive = minor == 1
        self.upgrade: bytes | None = None
        self.expects_continue = False  # requests only

    @property
    def headers(self) -> list[Field]:
        return self.fields

    @property
    def version(self) -> bytes:
        return b"1.1" if self.minor else b"1.0"

    def header(self, name: bytes, default: bytes = b"") -> bytes:
        """Value of the first field `name` (lower case), or `default`."""
        for key, value in self.fields:
            if key == name:
                return value
        return default


class RequestHead(Fields):
    """A parsed request head. `size` is how many bytes of the buffer it took, the empty line included."""

    __slots__ = ("method", "raw", "target")

    def __init__(self, method: bytes, target: bytes, told: Fields, raw: bytes) -> None:
        self.method, self.target, self.raw = method, target, raw
        self.minor, self.fields, self.framing = told.minor, told.fields, told.framing
        self.content_length, self.expects_continue = told.content_length, told.expects_continue
        self.keep_alive, self.upgrade = told.keep_alive, told.upgrade

    @property
    def size(self) -> int:
        return len(self.raw)

    @property
    def path(self) -> bytes:
        """The target's path, still percent-encoded; scheme and authority of an absolute target dropped."""
        return _origin_form(self.target).partition(b"?")[0]

    @property
    def query(self) -> bytes:
        """What follows the first `?` of the target, still percent-encoded; empty without one."""
        return _origin_form(self.target).partition(b"?")[2]


class ResponseHead(Fields):
    """A parsed status line and its fields. `size` is how many bytes of the buffer they took."""

    __slots__ = ("reason", "size", "status")

    def __init__(self, status: int, reason: bytes, minor: int, fields: list[Field], size: int) -> None:
        super().__init__(minor, fields)
        self.status, self.reason, self.size = status, reason, size


def parse_request_head(buffer: bytes | bytearray) -> RequestHead | None:
    """The head at the start of `buffer`, or None when its end has not arrived.

    The buffer is not consumed: delete `head.size` bytes yourself. Raises BadRequest: 400 malformed, 431 too large,
    501 a transfer coding we do not know, 505 another HTTP version.
    """
    raw = _take_head(buffer)
    if raw is None:
        return None
    method, target, rest = split_request(raw)
    return RequestHead(method, target, parse_request_fields(rest), raw)


def split_request(raw: bytes) -> tuple[bytes, bytes, bytes]:
    """Method, target, and the rest of a whole head: `1.1\\r\\nHost: …`, for `parse_request_fields`.

    Nothing in the rest can change what the two mean, nor they what it means; so it may be remembered by its bytes.
    Raises BadRequest: 400 malformed, 505 another HTTP version.
    """
    found = _REQUEST_LINE.match(raw)
    if found is None:
        raise _bad_request_line(raw.partition(b"\r\n")[0])
    method, target = found.groups()
    if not target.startswith(b"/"):
        _check_target(method, target)
    return method, target, raw[found.end() :]


def parse_request_fields(rest: bytes) -> Fields:
    """What `split_request` left of a head. Raises BadRequest: 400 malformed, 431 too many fields, 501 a coding."""
    told = Fields(1 if rest.startswith(b"1.1") else 0, _split_fields(rest[5:]))
    _frame_request(told)
    return told


def parse_response_head(buffer: bytes | bytearray, *, method: bytes = b"GET") -> ResponseHead | None:
    """The response head at the start of `buffer`, or None. `method` is the request's: a reply to HEAD has no body.

    A reply to CONNECT with 2xx and a 101 carry no HTTP body: what follows belongs to the other protocol. Raises
    BadRequest with status 502, which is what a proxy answers for it.
    """
    try:
        return _parse_response(buffer, method)
    except BadRequest as bad:
        raise BadRequest(502, bad.why) from None


def _parse_response(buffer: bytes | bytearray, method: bytes) -> ResponseHead | None:
    raw = _take_head(buffer)
    if raw is None:
        return None
    line, _, rest = raw.partition(b"\r\n")
    found = _STATUS_LINE.fullmatch(line)
    if found is None:
        raise BadRequest(502, "malformed status line")
    version, status, reason = found.groups()
    head = ResponseHead(int(status), reason or b"", 1 if version == b"1.1" else 0, _split_fields(rest), len(raw))
    length, coded, _ = _read_framing(head)
    if (
        head.status < 200
        or head.status in (204, 304)
        or method == b"HEAD"
        or (method == b"CONNECT" and head.status < 300)
    ):
        return head
    if coded:
        head.framing = Framing.CHUNKED
    elif length is not None:
        head.framing, head.content_length = Framing.LENGTH, length
    else:
        head.framing, head.keep_alive = Framing.UNTIL_CLOSE, False
    return head


def encode_head(first_line: bytes, fields: Iterable[Field]) -> bytes:
    """A head ready to send. Raises ValueError for a name or value that would break out of its line."""
    lines = [first_line]
    for name, value in fields:
        if b"\r" in value or b"\n" in value or b"\0" in value or b":" in name or b"\n" in name or b"\r" in name:
            raise ValueError(f"field {name!r} holds a byte that ends a line")
        lines.append(name + b": " + value)
    lines.append(b"\r\n")
    return b"\r\n".join(lines)


# ---- private parts ------------------------------------------------------------------------------------------


def _take_head(buffer: bytes | bytearray) -> bytes | None:
    end = buffer.find(b"\r\n\r\n", 0, HEAD_BYTES_MAX)
    if end < 0:
        if len(buffer) >= HEAD_BYTES_MAX:
            raise BadRequest(431, f"head longer than {HEAD_BYTES_MAX} bytes")
        _refuse_early(buffer)
        return None
    return bytes(buffer[: end + 4])


def _refuse_early(buffer: bytes | bytearray) -> None:
    """Do not wait for the end of what cannot become a head: a bare LF, no line where one must be, another protocol."""
    first = buffer.find(b"\n")
    if first == 0 or (first > 0 and buffer[first - 1] != 13):
        raise BadRequest(400, "a line does not end in CRLF")
    if buffer.startswith(b"\r"):
        raise BadRequest(400, "empty request line")
    if buffer.startswith(_TLS_HANDSHAKE):
        raise BadRequest(400, "this is TLS, and plain HTTP is spoken here")
    if buffer and not b"\x20" < buffer[:1] < b"\x7f":
        raise BadRequest(400, "this is not HTTP")


def _bad_request_line(line: bytes) -> BadRequest:
    if re.fullmatch(rb"[^ ]+ [^ ]+ HTTP/(?!1\.[01])[0-9]\.[0-9]", line):
        return BadRequest(505, "only HTTP/1.0 and HTTP/1.1 are spoken here")
    return BadRequest(400, "malformed request line")


def _check_target(method: bytes, target: bytes) -> None:
    if method == b"CONNECT" or _ABSOLUTE.match(target):
        return
    if target == b"*" and method == b"OPTIONS":
        return
    raise BadRequest(400, "malformed request target")


def _split_fields(rest: bytes) -> list[Field]:
    """`rest` is everything after the first line: fields and the final empty line."""
    block = rest[:-2]
    if FIELDS.fullmatch(block) is None:
        raise BadRequest(400, "malformed header field")
    found = _FIELD.findall(block)
    if len(found) > FIELDS_MAX:
        raise BadRequest(431, f"more than {FIELDS_MAX} header fields")
    return [(name.lower(), value.rstrip(b" \t")) for name, value in found]


def _frame_request(head: Fields) -> None:
    length, coded, hosts = _read_framing(head)
    if hosts > 1 or (hosts == 0 and head.minor == 1):
        raise BadRequest(400, "exactly one Host field is needed")
    if hosts and _HOST.fullmatch(head.header(b"host")) is None:
        raise BadRequest(400, "malformed Host field")
    if coded:
        if head.minor == 0:
            raise BadRequest(400, "HTTP/1.0 has no transfer codings")
        head.framing = Framing.CHUNKED
    elif length is not None:
        head.content_length = length
        head.framing = Framing.LENGTH if length else Framing.NONE
    head.expects_continue = (
        head.minor == 1 and head.framing is not Framing.NONE and head.header(b"expect").lower() == b"100-continue"
    )


def _read_framing(head: Fields) -> tuple[int | None, bool, int]:
    """(Content-Length or None, chunked?, number of Host fields); sets `keep_alive` and `upgrade`."""
    length: int | None = None
    coded, hosts = False, 0
    upgrade: bytes | None = None
    options = b""
    for name, value in head.fields:
        if name not in _FRAMING_FIELDS:
            continue
        if name == b"content-length":
            # A list of equal lengths ("5, 5") is legal to accept and h11 does; nobody honest sends it.
            if not value.isdigit() or len(value) > LENGTH_DIGITS_MAX or length is not None:
                raise BadRequest(400, "malformed or repeated Content-Length")
            length = int(value)
        elif name == b"transfer-encoding":
            if coded:
                raise BadRequest(501, "repeated Transfer-Encoding")
            if value.lower() != b"chunked":
                raise BadRequest(501, "the only transfer coding served is chunked")
            coded = True
        elif name == b"host":
            hosts += 1
        elif name == b"connection":
            options += b"," + value.lower()
        elif name == b"upgrade":
            upgrade = value.lower()
    if coded and length is not None:
        raise BadRequest(400, "Content-Length beside Transfer-Encoding")
    if options:
        wanted = {option.strip(b" \t") for option in options.split(b",")}
        if b"close" in wanted:
            head.keep_alive = False
        elif b"keep-alive" in wanted:
            head.keep_alive = True
        if upgrade and b"upgrade" in wanted and head.minor == 1:
            head.upgrade = upgrade
    return length, coded, hosts


def _origin_form(target: bytes) -> bytes:
    if target.startswith(b"/"):
        return target
    found = _ABSOLUTE.match(target)
    if found is None:
        return target
    rest = target[found.end() :]
    return rest if rest.startswith(b"/") else b"/" + rest

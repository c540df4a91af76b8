"""GET and POST /files: bytes in and out of the sandbox, of any size in the memory of one piece.

A download is opened once and answered from that descriptor. An upload is written as it arrives, in the order
open(O_CREAT), chown, write: who watches the directory sees exactly CREATE, CHMOD, WRITE. An upload that fails leaves
no half file where there was none before; over an existing file it cannot promise that, since programs may hold it open.
"""

from __future__ import annotations

import asyncio
import errno
import os
import stat
import zlib
from collections.abc import AsyncIterator
from typing import Any, Final

from penstock.guest import negotiate
from penstock.guest.entries import metadata_from, write_metadata
from penstock.guest.exchange import Disconnected, Exchange, HttpError
from penstock.guest.multipart import Multipart, PartBegin, PartData, PartEnd, boundary_of
from penstock.guest.negotiate import Conditions, Encoding, Span, Unsatisfiable
from penstock.guest.parts import Parts
from penstock.guest.paths import make_directories, resolve, shown
from penstock.guest.users import User
from penstock.wire.http1 import Field

PIECE_BYTES: Final = 256 * 1024  # of a file read at once
FAIR_BYTES: Final = 4 * 1024 * 1024  # sent to a fast client before others are looked at
GZIP_LEVEL: Final = 1  # 3 times as fast as the default level for 10 % more bytes
FILES_MAX: Final = 10_000  # of one multipart upload

_STATUSES: Final = {
    errno.ENOENT: 404,
    errno.ENOSPC: 507,
    errno.EDQUOT: 507,
    errno.EISDIR: 400,
    errno.ENOTDIR: 400,
    errno.EEXIST: 400,
    errno.ELOOP: 400,
    errno.EINVAL: 400,
    errno.ENXIO: 400,
    errno.ENAMETOOLONG: 400,
    errno.EACCES: 403,
    errno.EPERM: 403,
    errno.EROFS: 403,
    errno.ETXTBSY: 409,
    errno.EMFILE: 503,
    errno.ENFILE: 503,
}


def register(parts: Parts) -> None:
    """Serve /files. Unguarded: a signed URL opens it too, which `require_file` judges."""
    files = Files(parts)
    parts.routes.add("GET", "/files", files.download, guarded=False)
    parts.routes.add("POST", "/files", files.upload, guarded=False)


class Files:
    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    async def download(self, exchange: Exchange) -> None:
        self._parts.access.require_file(exchange, "read")
        path = self._path(exchange, self._user(exchange))
        encoding = negotiate.encoding(exchange.header_text(b"accept-encoding"))
        if encoding is None:
            raise HttpError(406, "no acceptable encoding: this server offers gzip and identity")
        fd = open_regular(path)
        try:
            await _Download(exchange, path, fd).answer(encoding)
        except OSError as error:
            raise as_http_error(error, path) from error
        finally:
            os.close(fd)

    async def upload(self, exchange: Exchange) -> None:
        self._parts.access.require_file(exchange, "write")
        user = self._user(exchange)
        upload = _Upload(user, metadata_from(exchange.head.fields))
        body = _body(exchange)
        kind = exchange.header_text(b"content-type")
        match kind.partition(";")[0].strip().lower():
            case "multipart/form-data":
                await self._upload_parts(exchange, user, upload, boundary_of(kind), body)
            case "application/octet-stream":
                if not exchange.query.get("path"):
                    raise HttpError(400, "path is required")
                target = upload.begin(self._path(exchange, user))
                try:
                    async for piece in body:
                        target.write(piece)
                    target.finish()
                finally:
                    target.close()
            case _:
                raise HttpError(400, f"unsupported content type {kind[:100]!r}: send multipart/form-data or "
                                     "application/octet-stream")  # fmt: skip
        await exchange.respond_json(200, upload.written)

    async def _upload_parts(
        self, exchange: Exchange, user: User, upload: _Upload, boundary: bytes, body: AsyncIterator[bytes]
    ) -> None:
        parser = Multipart(boundary)
        target: _Target | None = None
        try:
            async for piece in body:
                for event in parser.feed(piece):
                    match event:
                        case PartBegin(name="file", filename=filename):
                            target = upload.begin(self._part_path(exchange, user, filename))
                        case PartData(data=data) if target is not None:
                            target.write(data)
                        case PartEnd() if target is not None:
                            target.finish()
                            target.close()
                            target = None
                        case _:
                            pass  # a field that is no file
            parser.close()
        finally:
            if target is not None:
                target.close()

    def _part_path(self, exchange: Exchange, user: User, filename: str | None) -> str:
        """The query's path, else the part's file name, which clients fill with a whole path."""
        raw = exchange.query.get("path") or filename
        if not raw:
            raise HttpError(400, "a part has no file name and the query has no path")
        return resolve(raw, user.home, self._parts.settings.workdir)

    def _user(self, exchange: Exchange) -> User:
        return self._parts.users.get(exchange.query.get("username") or self._parts.settings.user)

    def _path(self, exchange: Exchange, user: User) -> str:
        return resolve(exchange.query.get("path", ""), user.home, self._parts.settings.workdir)


def open_regular(path: str) -> int:
    """Open a regular file for reading. Raises HttpError 404 when absent, 400 for anything else."""
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise HttpError(400, f"path '{shown(path)}' is a directory")
        if stat.S_ISREG(status.st_mode):
            # O_NONBLOCK: should it have become a FIFO since, opening it would stop the whole guest.
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
            if stat.S_ISREG(os.fstat(fd).st_mode):
                return fd
            os.close(fd)
    except (FileNotFoundError, NotADirectoryError):
        raise HttpError(404, f"path '{shown(path)}' does not exist") from None
    except OSError as error:
        raise as_http_error(error, path) from error
    raise HttpError(400, f"path '{shown(path)}' is not a regular file")


def as_http_error(error: OSError, path: str) -> HttpError:
    status = _STATUSES.get(error.errno or 0, 500)
    if status == 507:
        return HttpError(507, f"not enough disk space available for '{shown(path)}'")
    return HttpError(status, f"{error.strerror or 'error'}: '{shown(path)}'")


# -- download ------------------------------------------------------------------------------------------------------


class _Download:
    """One answer from one open file."""

    def __init__(self, exchange: Exchange, path: str, fd: int) -> None:
        self._exchange, self._fd = exchange, fd
        self._name = os.path.basename(path)
        status = os.fstat(fd)
        self._size = status.st_size
        self._modified_s = status.st_mtime_ns // 1_000_000_000
        self._etag = f'"{status.st_ino:x}-{status.st_mtime_ns:x}-{status.st_size:x}"'
        self._beginning = os.pread(fd, PIECE_BYTES, 0)

    async def answer(self, encoding: Encoding) -> None:
        conditions = Conditions(*(self._exchange.header_text(name) for name in (
            b"if-match", b"if-unmodified-since", b"if-none-match", b"if-modified-since", b"if-range")))  # fmt: skip
        wanted_range = self._exchange.header_text(b"range")
        # A part, or an answer "not modified", is about the file's own bytes: no encoding. HEAD packs nothing either.
        plain = bool(wanted_range) or any(conditions) or self._exchange.head.method == b"HEAD"
        if encoding is Encoding.GZIP and not plain:
            await self._send_gzip()
            return
        status = conditions.status(self._etag, self._modified_s)
        if status != 200:
            await self._exchange.respond(status, self._validators())
        elif not self._size:
            await self._send_unsized()
        else:
            await self._send_range(wanted_range if conditions.range_holds(self._etag, self._modified_s) else "")

    async def _send_range(self, header: str) -> None:
        try:
            span = negotiate.byte_range(header, self._size) if header else None
        except Unsatisfiable:
            raise HttpError(
                416, "the range is beyond the file", [(b"content-range", b"bytes */%d" % self._size)]
            ) from None
        fields = [*self._fields(), *self._validators(), (b"accept-ranges", b"bytes")]
        if span is not None:
            fields.append((b"content-range", b"bytes %d-%d/%d" % (span.start, span.stop - 1, self._size)))
        await self._send(206 if span else 200, fields, span or Span(0, self._size))

    async def _send(self, status: int, fields: list[Field], span: Span) -> None:
        first = self._beginning[span.start : span.stop]
        length = span.stop - span.start
        stream = await self._exchange.start_stream(status, fields, length=length, first=first)
        if self._exchange.head.method == b"HEAD":
            await stream.finish()
            return
        at, sent = span.start + len(first), 0
        while at < span.stop:
            piece = os.pread(self._fd, min(PIECE_BYTES, span.stop - at), at)
            if not piece:
                # It was cut while we sent it. Hanging up is the only honest answer to a length already announced.
                raise Disconnected
            await stream.write(piece)
            at += len(piece)
            sent += len(piece)
            if sent >= FAIR_BYTES:
                sent = 0
                await asyncio.sleep(0)
        await stream.finish()

    async def _send_unsized(self) -> None:
        """An empty file, or one of /proc, which has content and size 0."""
        if not self._beginning:
            await self._exchange.respond(200, [*self._fields(), *self._validators(), (b"accept-ranges", b"bytes")])
            return
        stream = await self._exchange.start_stream(200, self._fields(), first=self._beginning)
        at = len(self._beginning)
        while piece := os.pread(self._fd, PIECE_BYTES, at):
            await stream.write(piece)
            at += len(piece)
        await stream.finish()

    async def _send_gzip(self) -> None:
        packer = zlib.compressobj(GZIP_LEVEL, zlib.DEFLATED, zlib.MAX_WBITS | 16)
        fields = [*self._fields(), (b"content-encoding", b"gzip")]
        first = packer.compress(self._beginning)
        if len(self._beginning) < PIECE_BYTES:
            await self._exchange.respond(200, fields, first + packer.flush())
            return
        stream = await self._exchange.start_stream(200, fields, first=first)
        at = len(self._beginning)
        while piece := os.pread(self._fd, PIECE_BYTES, at):
            await stream.write(packer.compress(piece))
            at += len(piece)
            await asyncio.sleep(0)  # a piece costs about 2 ms of processor time
        await stream.finish(packer.flush())

    def _fields(self) -> list[Field]:
        return [
            (b"content-type", negotiate.content_type(self._name, self._beginning).encode()),
            (b"content-disposition", negotiate.content_disposition(self._name).encode()),
            (b"vary", b"Accept-Encoding"),
        ]

    def _validators(self) -> list[Field]:
        modified = negotiate.format_date(self._modified_s).encode()
        return [(b"etag", self._etag.encode()), (b"last-modified", modified)]


# -- upload --------------------------------------------------------------------------------------------------------


class _Upload:
    """What one request writes."""

    def __init__(self, user: User, metadata: dict[str, str]) -> None:
        self._user, self._metadata = user, metadata
        self._targets: set[str] = set()
        self.written: list[dict[str, Any]] = []

    def begin(self, path: str) -> _Target:
        """Open `path` for writing, its directories made. Raises HttpError."""
        if path in self._targets:
            raise HttpError(400, f"'{shown(path)}' is uploaded twice in one request")
        if len(self._targets) >= FILES_MAX:
            raise HttpError(400, f"more than {FILES_MAX} files in one request")
        self._targets.add(path)
        target = _Target(path, self._user, self._metadata)
        entry: dict[str, Any] = {"path": shown(path), "name": shown(os.path.basename(path)), "type": "file"}
        if self._metadata:
            entry["metadata"] = self._metadata
        self.written.append(entry)
        return target


class _Target:
    """One file being written. `finish` when its bytes are all there; `close` always."""

    def __init__(self, path: str, owner: User, metadata: dict[str, str]) -> None:
        self._path = path
        self._finished = False
        try:
            self._fd, self._new = _open_target(path, owner)
        except OSError as error:
            raise as_http_error(error, path) from error
        try:
            status = os.fstat(self._fd)
            if not stat.S_ISREG(status.st_mode):
                self._new = False
                raise HttpError(400, f"path '{shown(path)}' is not a regular file")
            os.fchown(self._fd, owner.uid, owner.gid)
            write_metadata(self._fd, metadata)
            if status.st_size:  # a cut of an empty file would be told as a WRITE
                os.ftruncate(self._fd, 0)
        except OSError as error:
            self.close()
            raise as_http_error(error, path) from error
        except BaseException:
            self.close()
            raise

    def write(self, data: bytes) -> None:
        """Raises HttpError, 507 when there is no room."""
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._fd, view) :]
        except OSError as error:
            raise as_http_error(error, self._path) from error

    def finish(self) -> None:
        self._finished = True

    def close(self) -> None:
        """Twice is fine."""
        if self._fd < 0:
            return
        try:
            if self._new and not self._finished:
                os.unlink(self._path)
        except OSError:
            pass  # Safe: it was renamed or removed meanwhile, which is who did it to answer for.
        finally:
            os.close(self._fd)
            self._fd = -1


def _open_target(path: str, owner: User) -> tuple[int, bool]:
    """(descriptor, whether the file is new). Through a symlink its target is written."""
    flags = os.O_WRONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    try:
        return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o666), True
    except FileExistsError:
        pass
    except FileNotFoundError:
        make_directories(os.path.dirname(path), owner)
        try:
            return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o666), True
        except FileExistsError:  # a concurrent upload of the same name
            pass
    if os.path.isdir(path):
        raise IsADirectoryError(errno.EISDIR, "path is a directory", path)
    return os.open(path, flags | os.O_CREAT, 0o666), False


def _body(exchange: Exchange) -> AsyncIterator[bytes]:
    coding = exchange.header_text(b"content-encoding").strip().lower()
    if coding in {"", "identity"}:
        return exchange.iter_body()
    if coding == "gzip":
        return _gunzip(exchange.iter_body())
    raise HttpError(400, f"unsupported content encoding {coding[:40]!r}: send gzip or none")


async def _gunzip(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Unpacked pieces of at most PIECE_BYTES: a bomb meets the disk's limit, never the guest's memory.

    Several gzip members in a row are one body. Raises HttpError(400).
    """
    unpacker = zlib.decompressobj(zlib.MAX_WBITS | 16)
    begun = False
    try:
        async for piece in pieces:
            waiting = piece
            while waiting:
                if unpacker.eof:
                    unpacker = zlib.decompressobj(zlib.MAX_WBITS | 16)
                begun = True
                data = unpacker.decompress(waiting, PIECE_BYTES)
                waiting = unpacker.unused_data if unpacker.eof else unpacker.unconsumed_tail
                if data:
                    yield data
                if len(data) == PIECE_BYTES:
                    await asyncio.sleep(0)
    except zlib.error:
        raise HttpError(400, "the body is not valid gzip") from None
    if not begun or not unpacker.eof:
        raise HttpError(400, "the gzip body ended early")

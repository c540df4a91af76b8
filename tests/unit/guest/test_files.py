"""GET and POST /files over a real socket: what arrives, what is on disk, what is refused."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import os
import tracemalloc
import zlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from penstock.wire import tokens
from tests.unit.guest.filesroom import GID, UID, Room, open_room


@pytest.fixture
async def room(tmp_path: Path) -> AsyncIterator[Room]:
    async with open_room(tmp_path) as opened:
        yield opened


async def test_an_upload_makes_its_directories_and_belongs_to_the_user(room: Room) -> None:
    answer = await room.upload("a/b/c.txt", b"hello")
    target = room.home / "a/b/c.txt"
    assert answer.json() == [{"path": str(target), "name": "c.txt", "type": "file"}]
    assert target.read_bytes() == b"hello"
    assert (target.stat().st_mode & 0o777, target.stat().st_uid, target.stat().st_gid) == (0o644, UID, GID)
    for folder in ("a", "a/b"):
        found = (room.home / folder).stat()
        assert (found.st_mode & 0o777, found.st_uid, found.st_gid) == (0o755, UID, GID)


async def test_an_upload_over_a_longer_file_leaves_only_the_new_bytes(room: Room) -> None:
    await room.upload("f", b"a long first version")
    await room.upload("f", b"short")
    assert (room.home / "f").read_bytes() == b"short"


async def test_an_upload_through_a_symlink_writes_its_target(room: Room) -> None:
    (room.home / "target").write_bytes(b"old")
    (room.home / "link").symlink_to("target")
    (room.home / "dangling").symlink_to("made")
    await room.upload("link", b"new")
    await room.upload("dangling", b"through")
    assert (room.home / "link").is_symlink()
    assert (room.home / "target").read_bytes() == b"new"
    assert (room.home / "made").read_bytes() == b"through"


@pytest.mark.parametrize(
    "target", ["", "folder", "/", "file/below", "fifo", "/dev/null", "x\0y", "~other/x", "n" * 300]
)
async def test_an_upload_to_what_cannot_hold_it_is_refused(room: Room, target: str) -> None:
    (room.home / "folder").mkdir()
    (room.home / "file").write_bytes(b"kept")
    os.mkfifo(room.home / "fifo")
    before = sorted(os.listdir(room.home))
    answer = await room.upload(target, b"x")
    assert answer.status_code == 400, answer.text
    assert sorted(os.listdir(room.home)) == before
    assert (room.home / "file").read_bytes() == b"kept"


async def test_multipart_takes_many_files_with_paths_in_their_names(room: Room) -> None:
    absolute = room.home / "abs.bin"
    parts = [("file", ("rel/one.txt", b"1")), ("file", (str(absolute), b"\r\n--not the boundary\r\n")),
             ("note", (None, b"no file")), ("file", ("empty", b""))]  # fmt: skip
    answer = await room.client.post("/files", files=parts)
    assert [row["name"] for row in answer.json()] == ["one.txt", "abs.bin", "empty"]
    assert (room.home / "rel/one.txt").read_bytes() == b"1"
    assert absolute.read_bytes() == b"\r\n--not the boundary\r\n"
    assert (room.home / "empty").read_bytes() == b""


async def test_the_path_of_the_query_beats_the_part_name(room: Room) -> None:
    await room.client.post("/files", params={"path": "wanted"}, files={"file": ("ignored", b"x")})
    body = b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\nno name\r\n--b--'
    fields = {"content-type": "multipart/form-data; boundary=b"}
    await room.client.post("/files", params={"path": "nameless"}, content=body, headers=fields)
    assert (room.home / "wanted").read_bytes() == b"x"
    assert (room.home / "nameless").read_bytes() == b"no name"
    assert (await room.client.post("/files", content=body, headers=fields)).status_code == 400


async def test_the_same_target_twice_in_one_request_is_refused(room: Room) -> None:
    answer = await room.client.post("/files", files=[("file", ("a", b"1")), ("file", ("./a", b"2"))])
    assert answer.status_code == 400
    assert "twice" in answer.json()["message"]


async def test_a_torn_upload_leaves_no_half_file(room: Room) -> None:
    body = b'--b\r\nContent-Disposition: form-data; name="file"; filename="half"\r\n\r\nbeginning'
    answer = await room.client.post("/files", content=body, headers={"content-type": "multipart/form-data; boundary=b"})
    assert answer.status_code == 400
    assert not (room.home / "half").exists()


@pytest.mark.parametrize("kind", ["", "text/plain", "multipart/form-data"])
async def test_other_content_types_are_refused(room: Room, kind: str) -> None:
    answer = await room.client.post("/files", params={"path": "f"}, content=b"x", headers={"content-type": kind})
    assert answer.status_code == 400
    assert not (room.home / "f").exists()


async def test_gzip_uploads_are_unpacked_members_in_a_row_too(room: Room) -> None:
    packed = gzip.compress(b"one ") + gzip.compress(b"two")
    assert (await room.upload("f", packed, content_encoding="gzip")).status_code == 200
    assert (room.home / "f").read_bytes() == b"one two"


@pytest.mark.parametrize(
    ("body", "coding"),
    # Without a time: a test's name is made of its values, and is the same in every process that collects it.
    [(b"junk", "gzip"), (gzip.compress(b"x", mtime=0)[:-3], "gzip"), (b"", "gzip"), (b"x", "br")],
)
async def test_a_body_that_is_not_what_its_encoding_says_is_refused(room: Room, body: bytes, coding: str) -> None:
    assert (await room.upload("f", body, content_encoding=coding)).status_code == 400


async def test_a_bomb_and_a_big_file_pass_in_bounded_memory(room: Room) -> None:
    size = 96 << 20
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    bomb = b"".join(packer.compress(bytes(1 << 20)) for _ in range(size >> 20)) + packer.flush()
    tracemalloc.start()
    try:
        assert (await room.upload("zeros", bomb, content_encoding="gzip")).status_code == 200
        digest, got = hashlib.sha256(), 0
        async with room.client.stream("GET", "/files?path=zeros", headers={"accept-encoding": "identity"}) as answer:
            assert answer.headers["content-length"] == str(size)
            async for piece in answer.aiter_raw():
                digest.update(piece)
                got += len(piece)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (got, digest.digest()) == (size, hashlib.sha256(bytes(size)).digest())
    assert peak < 16 << 20


async def test_four_uploads_into_one_new_directory_all_land(room: Room) -> None:
    answers = await asyncio.gather(*(room.upload(f"deep/er/{n}", b"%d" % n * 100_000) for n in range(4)))
    assert [answer.status_code for answer in answers] == [200] * 4
    assert [(room.home / f"deep/er/{n}").read_bytes() for n in range(4)] == [b"%d" % n * 100_000 for n in range(4)]


async def test_metadata_is_the_whole_set_of_the_last_upload(room: Room) -> None:
    answer = await room.upload("f", b"", x_metadata_Owner="me", x_metadata_b="2")
    assert answer.json()[0]["metadata"] == {"owner": "me", "b": "2"}
    assert os.getxattr(room.home / "f", "user.e2b.owner") == b"me"
    os.setxattr(room.home / "f", "user.other", b"kept")
    await room.upload("f", b"", x_metadata_b="3")
    assert (await room.ok("Stat", path="f"))["entry"]["metadata"] == {"b": "3"}
    await room.upload("f", b"")
    assert os.listxattr(room.home / "f") == ["user.other"]
    assert (await room.upload("g", b"", x_metadata_k="v" * 5000)).status_code == 400


async def test_a_download_names_the_file_and_its_kind(room: Room) -> None:
    (room.home / "naïve name.html").write_text("<p>")
    (room.home / "plain").write_bytes(b"text\n")
    (room.home / "raw").write_bytes(b"\0\1\2")
    answer = await room.client.get(
        "/files", params={"path": "naïve name.html"}, headers={"accept-encoding": "identity"}
    )
    assert answer.headers["content-disposition"] == "inline; filename*=utf-8''na%C3%AFve%20name.html"
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["vary"] == "Accept-Encoding"
    assert (await room.client.get("/files?path=plain")).headers["content-type"] == "text/plain; charset=utf-8"
    assert (await room.client.get("/files?path=raw")).headers["content-type"] == "application/octet-stream"


async def test_what_cannot_be_downloaded_says_why(room: Room) -> None:
    os.mkfifo(room.home / "fifo")
    (room.home / "loop").symlink_to("loop")
    missing = await room.client.get("/files?path=missing")
    assert (missing.status_code, missing.json()["message"]) == (404, f"path '{room.home}/missing' does not exist")
    folder = await room.client.get("/files?path=/")
    assert (folder.status_code, folder.json()["message"]) == (400, "path '/' is a directory")
    for path, status in (("fifo", 400), ("loop", 400), ("a%00b", 400), ("%FF", 404), ("~nobody/x", 400)):
        assert (await room.client.get(f"/files?path={path}")).status_code == status, path
    assert (await room.client.get("/files?path=x&username=stranger")).status_code == 401


@pytest.mark.parametrize(
    ("accept", "status", "coding"),
    [("gzip", 200, "gzip"), ("gzip, deflate", 200, "gzip"), ("br", 200, None), ("gzip;q=0.2, identity", 200, None),
     ("identity;q=0", 406, None), ("*;q=0, gzip", 200, "gzip"), ("", 200, None)],
)  # fmt: skip
async def test_the_encoding_is_the_one_the_client_likes_best(
    room: Room, accept: str, status: int, coding: str | None
) -> None:
    data = os.urandom(300_000) + bytes(700_000)
    (room.home / "f").write_bytes(data)
    answer = await room.client.get("/files?path=f", headers={"accept-encoding": accept})
    assert (answer.status_code, answer.headers.get("content-encoding")) == (status, coding)
    assert status != 200 or answer.content == data


@pytest.mark.parametrize(
    ("asked", "status", "got", "span"),
    [("bytes=0-0", 206, b"0", "bytes 0-0/10"), ("bytes=3-", 206, b"3456789", "bytes 3-9/10"),
     ("bytes=-4", 206, b"6789", "bytes 6-9/10"), ("bytes=5-99", 206, b"56789", "bytes 5-9/10"),
     ("bytes=10-", 416, None, "bytes */10"), ("bytes=-0", 416, None, "bytes */10"),
     ("bytes=4-2", 200, b"0123456789", None), ("items=0-1", 200, b"0123456789", None),
     ("bytes=0-1,3-4", 200, b"0123456789", None)],
)  # fmt: skip
async def test_ranges(room: Room, asked: str, status: int, got: bytes | None, span: str | None) -> None:
    (room.home / "f").write_bytes(b"0123456789")
    answer = await room.client.get("/files?path=f", headers={"range": asked, "accept-encoding": "gzip"})
    assert (answer.status_code, answer.headers.get("content-range")) == (status, span)
    assert got is None or answer.content == got


async def test_a_range_over_several_pieces_is_exact(room: Room) -> None:
    data = os.urandom(1_500_000)
    (room.home / "f").write_bytes(data)
    for start, stop in ((0, 999_999), (262_143, 262_145), (262_144, 1_400_000), (1_000_000, 1_499_999)):
        answer = await room.client.get("/files?path=f", headers={"range": f"bytes={start}-{stop}"})
        assert answer.content == data[start : stop + 1]


async def test_conditions(room: Room) -> None:
    (room.home / "f").write_bytes(b"0123456789")
    identity = {"accept-encoding": "identity"}
    first = await room.client.get("/files?path=f", headers=identity)
    etag, modified = first.headers["etag"], first.headers["last-modified"]

    async def status(**headers: str) -> int:
        fields = identity | {name.replace("_", "-"): value for name, value in headers.items()}
        return (await room.client.get("/files?path=f", headers=fields)).status_code

    assert await status(if_none_match=etag) == 304
    assert await status(if_none_match='"other"') == 200
    assert await status(if_modified_since=modified) == 304
    assert await status(if_match='"other"') == 412
    assert await status(if_unmodified_since="Sun, 06 Nov 1994 08:49:37 GMT") == 412
    assert await status(if_range=etag, range="bytes=0-1") == 206
    assert await status(if_range='"other"', range="bytes=0-1") == 200


async def test_head_sends_no_body_and_an_empty_file_and_proc_are_whole(room: Room) -> None:
    (room.home / "f").write_bytes(bytes(1_000_000))
    (room.home / "empty").write_bytes(b"")
    head = await room.client.head("/files?path=f", headers={"accept-encoding": "identity"})
    assert (head.status_code, head.headers["content-length"], head.content) == (200, "1000000", b"")
    assert (await room.client.head("/files?path=f", headers={"accept-encoding": "gzip"})).headers["etag"]
    assert (await room.client.get("/files?path=empty", headers={"accept-encoding": "identity"})).content == b""
    version = await room.client.get("/files?path=/proc/version", headers={"accept-encoding": "identity"})
    assert version.content.startswith(b"Linux version ")


async def test_a_secure_sandbox_wants_the_token_or_a_signature(tmp_path: Path) -> None:
    async with open_room(tmp_path, token="secret") as room:
        (room.home / "f").write_bytes(b"x")
        signature = tokens.sign("f", "read", "", "secret")
        late = tokens.sign("f", "read", "", "secret", 1)

        async def get(query: str = "", **headers: str) -> tuple[int, str]:
            fields = {name.replace("_", "-"): value for name, value in headers.items()}
            answer = await room.client.get(f"/files?path=f{query}", headers=fields)
            return answer.status_code, answer.json()["message"] if answer.status_code != 200 else answer.text

        assert await get() == (401, "missing signature query parameter")
        assert await get(x_access_token="secret") == (200, "x")
        assert (await get(x_access_token="wrong"))[0] == 401
        assert await get(f"&signature={signature.replace('+', '%2B')}") == (200, "x")
        assert await get("&signature=v1_no") == (401, "invalid signature")
        assert await get(f"&signature={late.replace('+', '%2B')}&signature_expiration=1") == (
            401, "signature is already expired")  # fmt: skip
        written = await room.client.post(
            "/files", params={"path": "f", "signature": signature}, files={"file": ("f", b"y")}
        )
        assert written.status_code == 401  # signed for reading only
        assert (room.home / "f").read_bytes() == b"x"
        composed = await room.client.post("/files/compose", json={"source_paths": ["f"], "destination": "g"})
        assert composed.status_code == 401


async def test_compose_joins_in_order_and_removes_the_sources(room: Room) -> None:
    for name in "abc":
        await room.upload(f"parts/{name}", name.encode() * 3)
    order = {"source_paths": ["parts/c", "parts/a", "parts/b", "parts/a"], "destination": "new/joined"}
    answer = await room.client.post("/files/compose", json=order)
    joined = room.home / "new/joined"
    assert answer.json() == {"path": str(joined), "name": "joined", "type": "file"}
    assert joined.read_bytes() == b"cccaaabbbaaa"
    assert (joined.stat().st_uid, joined.stat().st_mode & 0o777) == (UID, 0o644)
    assert os.listdir(room.home / "parts") == []


@pytest.mark.parametrize(
    ("sources", "destination", "status"),
    [(["missing"], "x", 404), (["dir"], "x", 400), (["a"], "dir", 400), ([], "x", 400), (["a"], "", 400),
     ("a", "x", 400), (["a"], "a/b", 400)],
)  # fmt: skip
async def test_compose_that_cannot_be_done_changes_nothing(
    room: Room, sources: object, destination: str, status: int
) -> None:
    (room.home / "dir").mkdir()
    (room.home / "a").write_bytes(b"kept")
    answer = await room.client.post("/files/compose", json={"source_paths": sources, "destination": destination})
    assert answer.status_code == status
    assert sorted(os.listdir(room.home)) == ["a", "dir"]
    assert (room.home / "a").read_bytes() == b"kept"

"""Serving files loads no module and no codec: inside a sandbox those would be the sandbox's own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_SCRIPT = r"""
import asyncio, gzip, os, sys
from pathlib import Path
from tests.unit.guest.filesroom import open_room

async def everything(room):
    await room.upload("a/b", b"x" * 600_000, x_metadata_k="v")
    await room.upload("g", gzip.compress(b"x"), content_encoding="gzip")
    await room.upload("naïve", b"x")
    await room.client.post("/files", files={"file": ("m", b"x")})
    for accept in ("gzip", "identity"):
        await room.client.get("/files?path=a/b", headers={"accept-encoding": accept, "range": "bytes=1-2"})
        await room.client.get("/files", params={"path": "naïve"}, headers={"accept-encoding": accept})
        await room.client.get("/files?path=missing%FF", headers={"if-modified-since": "Sun, 06 Nov 1994 08:49:37 GMT"})
    await room.client.post("/files/compose", json={"source_paths": ["m"], "destination": "n"})
    await room.client.get("/metrics")
    watcher = (await room.ok("CreateWatcher", path="", recursive=True, includeEntry=True))["watcherId"]
    await room.ok("MakeDir", path="d/e")
    os.symlink("a", room.home / "link")
    os.close(os.open(os.fsencode(room.home) + b"/\xff", os.O_CREAT | os.O_WRONLY))
    await room.ok("ListDir", path="", depth=5)
    await room.ok("Move", source="d", destination="f")
    await room.ok("Remove", path="f")
    await room.events(watcher)
    async for _ in room.stream("WatchDir", path="missing"):
        pass

async def main(folder):
    async with open_room(folder) as room:
        # The client's own lazy modules first.
        await room.client.post("/nothing", files={"x": ("y", b"z")})
        await room.client.post("/nothing", params={"x": "ï"}, json={})
        await room.client.get("/nothing", params={"x": "ï"})
        gzip.compress(b"")
        before = set(sys.modules)
        await everything(room)
        print("loaded:", *sorted(set(sys.modules) - before))

asyncio.run(main(Path(sys.argv[1])))
"""


def test_no_module_is_loaded_while_serving(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(tmp_path)],
        capture_output=True, text=True, timeout=60, check=False, cwd=Path(__file__).parents[3],
    )  # fmt: skip
    assert done.stderr == ""
    assert done.stdout == "loaded:\n"

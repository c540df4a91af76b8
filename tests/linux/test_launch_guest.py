"""The real guest after the pivot: it opens no library, codec or module of the image."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from tests.linux.launchlab import Lab, Sandbox

pytestmark = [pytest.mark.root, pytest.mark.asyncio(loop_scope="module")]
LIBRARIES = Path("usr/lib/x86_64-linux-gnu")
STDLIB = Path(os.__file__).parent
ANSWERS_WITHIN_S = 10


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def lab(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Lab]:
    made = Lab(tmp_path_factory.mktemp("guest"), "tguest", guest="penstock.guest.main")
    try:
        await made.open()
        yield made
    finally:
        await made.close()


def trapped(root: Path) -> str:
    """An image whose every library, codec, NSS module and Python module is a pipe: who opens one waits for ever."""
    files = [LIBRARIES / name for name in ("libc.so.6", "libnss_files.so.2", "libnss_compat.so.2", "libgcc_s.so.1")]
    files += [LIBRARIES / "gconv" / name for name in ("gconv-modules", "gconv-modules.cache", "ISO8859-1.so")]
    files += [Path("etc") / name for name in ("ld.so.cache", "nsswitch.conf", "localtime", "host.conf", "services")]
    files += [path.relative_to("/") for path in STDLIB.glob("*.py")]
    files += [path.relative_to("/") for path in STDLIB.glob("encodings/*.py")]
    files += [path.relative_to("/") for path in Path(sys.prefix).glob("lib/python3.*/site-packages/*.py")]
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(root / file)
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/bash\nuser:x:1000:1000::/home/user:/bin/bash\n")
    (root / "etc/group").write_text("root:x:0:\nuser:x:1000:\n")
    (root / "home/user").mkdir(parents=True)
    os.chown(root / "home/user", 1000, 1000)
    for folder in [root, *(path for path in root.rglob("*") if path.is_dir())]:
        folder.chmod(0o755)
    return str(root)


async def ask(sandbox: Sandbox, request: str, body: str = "") -> bytes:
    head = f"{request} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
    if body:
        head += f"content-type: application/json\r\nconnect-protocol-version: 1\r\ncontent-length: {len(body)}\r\n"
    answering = asyncio.to_thread(sandbox._exchange, f"{head}\r\n{body}".encode())
    return await asyncio.wait_for(answering, ANSWERS_WITHIN_S)


async def test_it_serves_in_an_image_with_nothing_in_it(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    async with lab.sandbox("bare", layers=[str(tmp_path / "empty")]) as sandbox:
        assert (await ask(sandbox, "GET /health")).startswith(b"HTTP/1.1 204")


async def test_it_opens_none_of_the_traps_an_image_can_lay(lab: Lab, tmp_path: Path) -> None:
    layer = await asyncio.to_thread(trapped, tmp_path / "trap")
    async with lab.sandbox("trap", layers=[layer]) as sandbox:
        assert (await ask(sandbox, "GET /health")).startswith(b"HTTP/1.1 204")
        assert (await ask(sandbox, "GET /metrics")).startswith(b"HTTP/1.1 200")
        listed = await ask(sandbox, "POST /filesystem.Filesystem/ListDir", json.dumps({"path": "/etc", "depth": 1}))
        assert listed.startswith(b"HTTP/1.1 200") and b"nsswitch.conf" in listed
        made = await ask(sandbox, "POST /filesystem.Filesystem/MakeDir", json.dumps({"path": "/home/user/ü"}))
        assert made.startswith(b"HTTP/1.1 200")
        assert (await ask(sandbox, "GET /nothing-here")).startswith(b"HTTP/1.1 404")
        missing = await ask(sandbox, "GET /files?path=/home/user/none&username=nobody-here")
        assert missing.split()[1] in (b"400", b"401", b"404")


async def test_how_pid_1_ended_is_known_though_it_is_nobodys_child(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    async with lab.sandbox("stop", layers=[str(tmp_path / "empty")]) as sandbox:
        sandbox.process.signal(15)
        status = await asyncio.wait_for(sandbox.process.wait(), ANSWERS_WITHIN_S)
        assert status is not None and os.WIFEXITED(status)
    async with lab.sandbox("kill", layers=[str(tmp_path / "empty")]) as sandbox:
        sandbox.process.signal(9)
        assert await asyncio.wait_for(sandbox.process.wait(), ANSWERS_WITHIN_S) == 9


async def test_told_to_end_with_nobody_to_pass_it_on_to_it_ends_well(lab: Lab, tmp_path: Path) -> None:
    """A drain tells an idle sandbox so: that is no failure of its guest."""
    (tmp_path / "idle").mkdir()
    async with lab.sandbox("idle", layers=[str(tmp_path / "idle")]) as sandbox:
        assert (await ask(sandbox, "GET /health")).startswith(b"HTTP/1.1 204")
        sandbox.process.signal(signal.SIGTERM)
        status = await asyncio.wait_for(sandbox.process.wait(), ANSWERS_WITHIN_S)
        assert status == 0, os.waitstatus_to_exitcode(status or 0)

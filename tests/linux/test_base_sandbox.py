"""The template `base` in a real sandbox: its own user namespace, idmapped layers, an overlay on a small disk."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from tests.linux.launchlab import Lab, Sandbox

from penstock.node.linux.base import build_base

pytestmark = [pytest.mark.root, pytest.mark.asyncio(loop_scope="module")]

_COMMAND = ("/usr/bin/env", "-i", "HOME=/home/user", "USER=user", "TERM=xterm",
            "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "/bin/bash", "-l", "-c")  # fmt: skip


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def sandbox(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Sandbox]:
    folder = tmp_path_factory.mktemp("base")
    lab = Lab(folder, "tbase")
    lab.layer = build_base(str(folder / "layers")).path
    try:
        await lab.open()
        async with lab.sandbox("one") as opened:
            yield opened
    finally:
        await lab.close()


async def test_a_login_shell_of_the_user_is_silent_and_sudo_gives_the_sandboxes_root(sandbox: Sandbox) -> None:
    assert await sandbox.ok(*_COMMAND, "true", uid=1000) == ""
    assert await sandbox.ok(*_COMMAND, "id -un; sudo id -u; sudo -u user id -un", uid=1000) == "user\n0\nuser\n"
    refused = await sandbox.run(*_COMMAND, "touch /usr/x", uid=1000)
    assert refused[0] != 0
    assert await sandbox.ok(*_COMMAND, "sudo touch /usr/x && stat -c %U:%G /usr/x ~ ~/.bashrc", uid=1000) == (
        "root:root\nuser:user\nuser:user\n"
    )


async def test_tools_work_inside(sandbox: Sandbox) -> None:
    script = """
        set -e; cd; git init -q repo; cd repo; git -c user.name=a -c user.email=b commit -q --allow-empty -m x
        git log --format=%s; python -c 'import os; open("f", "w"); os.setxattr("f", "user.e2b.k", b"v")
print(os.getxattr("f", "user.e2b.k").decode())'
        ss -Htuln >/dev/null; tput cols; pgrep -f bash >/dev/null; curl --version >/dev/null; ps -e >/dev/null
    """
    assert await sandbox.ok(*_COMMAND, script, uid=1000) == "x\nv\n80\n"

"""The process service as the unmodified e2b SDK uses it, sync and async, against a guest on a loopback port."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator

import pytest
from e2b import AsyncSandbox, CommandExitException, Sandbox
from e2b.exceptions import AuthenticationException, InvalidArgumentException, NotFoundException, TimeoutException
from e2b.sandbox.commands.command_handle import PtySize

from tests.unit.guest.house import RunningGuest, start_guest, wait_until


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGuest]:
    guest = start_guest(tmp_path_factory.mktemp("guest"), tcp=True, env={"FROM": "birth"})
    yield guest
    assert guest.stop() == 0
    assert [line for line in guest.log() if line["event"] == "fault"] == []


@pytest.fixture
def sandbox(guest: RunningGuest) -> Sandbox:
    return Sandbox.create(debug=True, sandbox_url=guest.url)


def test_a_command_and_its_result(sandbox: Sandbox) -> None:
    got = sandbox.commands.run("echo hi; echo err >&2")
    assert (got.stdout, got.stderr, got.exit_code) == ("hi\n", "err\n", 0)
    assert sandbox.is_running()


def test_output_is_streamed(sandbox: Sandbox) -> None:
    seen: list[str] = []
    sandbox.commands.run(
        "printf '\\xe2'; sleep 0.1; printf '\\x82\\xac'; echo; printf '%8191d' 1", on_stdout=seen.append
    )
    assert "".join(seen).startswith("€\n")
    assert len("".join(seen)) == 8193


def test_a_failure_is_an_exit_code(sandbox: Sandbox) -> None:
    with pytest.raises(CommandExitException) as failed:
        sandbox.commands.run("echo why >&2; exit 7")
    assert (failed.value.exit_code, failed.value.stderr) == (7, "why\n")


def test_env_user_and_directory(sandbox: Sandbox) -> None:
    assert sandbox.commands.run("echo $FROM $X", envs={"X": "call"}).stdout == "birth call\n"
    assert sandbox.commands.run("pwd", cwd="/tmp").stdout == "/tmp\n"
    assert sandbox.commands.run("whoami", user="nobody", cwd="/").stdout == "nobody\n"
    with pytest.raises(AuthenticationException, match="invalid username: 'x'"):
        sandbox.commands.run("true", user="x")
    with pytest.raises(InvalidArgumentException, match="does not exist"):
        sandbox.commands.run("true", cwd="/none")


def test_a_timeout_is_a_timeout(sandbox: Sandbox) -> None:
    with pytest.raises(TimeoutException):
        sandbox.commands.run("sleep 100", timeout=1)
    # The SDK's own timer is as quick as the guest's.
    assert wait_until(lambda: not any("sleep 100" in info.args for info in sandbox.commands.list()))


def test_background_input_and_kill(sandbox: Sandbox) -> None:
    command = sandbox.commands.run("cat", background=True, stdin=True)
    sandbox.commands.send_stdin(command.pid, "Hello, World!")
    for stdout, _, _ in command:
        assert stdout == "Hello, World!"
        break
    assert command.pid in [info.pid for info in sandbox.commands.list()]
    assert sandbox.commands.kill(command.pid) is True
    with pytest.raises(ProcessLookupError):
        os.kill(command.pid, 0)
    assert sandbox.commands.kill(command.pid) is False


def test_connecting_again_and_late(sandbox: Sandbox) -> None:
    first = sandbox.commands.run("sleep 0.5; echo out", background=True)
    first.disconnect()
    assert sandbox.commands.connect(first.pid).wait().stdout == "out\n"
    assert sandbox.commands.connect(first.pid).wait().exit_code == 0
    with pytest.raises(NotFoundException):
        sandbox.commands.connect(4_000_000)


def test_a_terminal(sandbox: Sandbox) -> None:
    got = bytearray()
    terminal = sandbox.pty.create(PtySize(cols=80, rows=24), envs={"PS1": "$ "})
    sandbox.pty.send_stdin(terminal.pid, b"tput cols\n")
    sandbox.pty.resize(terminal.pid, PtySize(cols=100, rows=24))
    sandbox.pty.send_stdin(terminal.pid, b"tput cols\nexit\n")
    result = terminal.wait(on_pty=got.extend)
    assert result.exit_code == 0
    assert b"100" in got


async def test_many_at_once(guest: RunningGuest) -> None:
    sandbox = await AsyncSandbox.create(debug=True, sandbox_url=guest.url)
    results = await asyncio.gather(*(sandbox.commands.run(f"echo {number}") for number in range(20)))
    assert [result.stdout for result in results] == [f"{number}\n" for number in range(20)]


async def test_async_background_and_stdin(guest: RunningGuest) -> None:
    sandbox = await AsyncSandbox.create(debug=True, sandbox_url=guest.url)
    seen = asyncio.Event()
    command = await sandbox.commands.run("cat", background=True, stdin=True, on_stdout=lambda _: seen.set())
    await sandbox.commands.send_stdin(command.pid, "x")
    await asyncio.wait_for(seen.wait(), 5)
    await sandbox.commands.close_stdin(command.pid)
    assert (await command.wait()).stdout == "x"

"""The asynchronous Python SDK, several sandboxes at once. See suite.py for how to run it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from e2b import AsyncSandbox, CommandExitException, PtySize


@pytest.fixture
async def box() -> AsyncIterator[AsyncSandbox]:
    made = await AsyncSandbox.create(timeout=120)
    yield made
    await made.kill()


async def test_ten_sandboxes_at_once_do_not_mix():
    async def one(number: int) -> str:
        made = await AsyncSandbox.create(timeout=60, envs={"N": str(number)})
        try:
            await made.files.write("n", str(number))
            ran = await made.commands.run("echo $N $(cat n)")
            return ran.stdout
        finally:
            assert await made.kill() is True

    assert await asyncio.gather(*(one(n) for n in range(10))) == [f"{n} {n}\n" for n in range(10)]


async def test_commands_in_parallel(box: AsyncSandbox):
    ran = await asyncio.gather(*(box.commands.run(f"sleep 0.2; echo {n}") for n in range(8)))
    assert [r.stdout for r in ran] == [f"{n}\n" for n in range(8)]


async def test_a_background_command_streams_and_is_killed(box: AsyncSandbox):
    heard: list[str] = []
    handle = await box.commands.run("echo started; sleep 1000", background=True, on_stdout=heard.append)
    for _ in range(100):
        if heard:
            break
        await asyncio.sleep(0.05)
    assert heard == ["started\n"]
    assert await handle.kill() is True
    with pytest.raises(CommandExitException):
        await handle.wait()


async def test_a_watcher_streams_events(box: AsyncSandbox):
    await box.files.make_dir("seen")
    arrived = asyncio.Event()
    names: list[str] = []

    def note(event) -> None:
        names.append(event.name)
        arrived.set()

    watcher = await box.files.watch_dir("seen", on_event=note)
    await box.files.write("seen/file", "1")
    await asyncio.wait_for(arrived.wait(), 10)
    await watcher.stop()
    assert "file" in names


async def test_four_uploads_into_one_folder(box: AsyncSandbox):
    await asyncio.gather(*(box.files.write(f"up/{n}", f"{n}" * 100_000) for n in range(4)))
    assert sorted(entry.name for entry in await box.files.list("up")) == ["0", "1", "2", "3"]
    assert await box.files.read("up/3") == "3" * 100_000


async def test_a_terminal(box: AsyncSandbox):
    screen: list[bytes] = []
    terminal = await box.pty.create(PtySize(rows=24, cols=80), on_data=screen.append)
    await box.pty.send_stdin(terminal.pid, b"tput cols; exit\n")
    ended = await terminal.wait()
    assert ended.exit_code == 0
    assert b"80" in b"".join(screen)


async def test_a_kill_ends_a_running_stream_with_the_right_words():
    made = await AsyncSandbox.create(timeout=60)
    handle = await made.commands.run("sleep 1000", background=True)
    await made.kill()
    with pytest.raises(Exception) as ended:
        await asyncio.wait_for(handle.wait(), 10)
    assert "timeout" in type(ended.value).__name__.lower() or "sandbox" in str(ended.value).lower()

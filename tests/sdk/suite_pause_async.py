"""Pause, resume and snapshots with the asynchronous Python SDK, several at once. See suite.py for how to run it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from e2b import AsyncSandbox, SandboxState


@pytest.fixture
async def box() -> AsyncIterator[AsyncSandbox]:
    made = await AsyncSandbox.create(timeout=120)
    yield made
    await made.kill()


async def test_a_stream_that_was_open_goes_on_after_the_pause(box: AsyncSandbox):
    heard: list[str] = []
    handle = await box.commands.run(
        "for n in 1 2 3; do echo $n; sleep 0.5; done", background=True, on_stdout=heard.append
    )
    while not heard:  # noqa: ASYNC110
        await asyncio.sleep(0.02)
    assert await box.pause() is True
    await asyncio.sleep(1.0)
    await box.connect()
    ended = await handle.wait()
    assert (ended.exit_code, "".join(heard)) == (0, "1\n2\n3\n")


async def test_ten_pause_and_resume_at_once():
    async def one(number: int) -> str:
        made = await AsyncSandbox.create(timeout=60)
        try:
            await made.files.write("n", str(number))
            assert await made.pause(mode="full" if number % 2 else "filesystem") is True
            assert (await made.get_info()).state is SandboxState.PAUSED
            await made.connect(timeout=60)
            return await made.files.read("n")
        finally:
            assert await made.kill() is True

    assert await asyncio.gather(*(one(n) for n in range(10))) == [str(n) for n in range(10)]


async def test_connects_at_once_all_find_it_usable(box: AsyncSandbox):
    for mode in ("full", "filesystem"):
        await box.pause(mode=mode)
        found = await asyncio.gather(*(AsyncSandbox.connect(box.sandbox_id, timeout=60) for _ in range(5)))
        said = await asyncio.gather(*(each.commands.run("echo here") for each in found))
        assert [each.stdout for each in said] == ["here\n"] * 5


async def test_snapshots(box: AsyncSandbox):
    await box.files.write("mark", "kept")
    snapshot = await box.create_snapshot()
    copy = await AsyncSandbox.create(snapshot.snapshot_id, timeout=60)
    assert await copy.files.read("mark") == "kept"
    await copy.kill()
    assert await AsyncSandbox.delete_snapshot(snapshot.snapshot_id) is True
    assert await AsyncSandbox.delete_snapshot(snapshot.snapshot_id) is False

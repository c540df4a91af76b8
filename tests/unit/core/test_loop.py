from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time

import pytest

from penstock.core.crew import Crew
from penstock.sim.loop import Deadlock, Livelock, OutsideWorld, SimClock, VirtualLoop, run

SCRIPT = """
import asyncio, hashlib
from penstock.core.crew import Crew
from penstock.core.gate import DrainPolicy, Gate
from penstock.core.keyqueue import KeyQueue
from penstock.sim.loop import run

async def main():
    loop = asyncio.get_running_loop()
    story = hashlib.sha256()
    def say(*words): story.update(repr((round(loop.time(), 9), *words)).encode())
    gate, queue = Gate("g"), KeyQueue(rng=loop.rng)
    async def worker(name):
        while True:
            key = await queue.get()
            say(name, key)
            with gate.hold("look", key) as hold:
                hold.on_force(hold.release)
                await asyncio.sleep(loop.rng.random())
            queue.done(key) if loop.rng.random() < 0.8 else queue.retry(key)
    async def ends(name):
        try:
            await asyncio.sleep(1e9)
        finally:
            say("ended", name)
    async with Crew("c", on_error=lambda name, error: say("refused", name, str(error))) as crew:
        for number in range(8):
            crew.spawn(worker(f"w{number}"), name=f"w{number}")
            crew.spawn(ends(f"e{number}"), name=f"e{number}")
        for number in range(300):
            queue.add(f"key {loop.rng.randrange(20)}")
            await asyncio.sleep(loop.rng.random() / 20)
        say((await gate.drain(DrainPolicy(grace_s=0.2, force_s=1))).forced)
    say("end")
    return story.hexdigest()

print(run(main(), SEED))
"""


def outcome(seed: int, hash_seed: str) -> str:
    script = SCRIPT.replace("SEED", str(seed))
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    return subprocess.run(
        [sys.executable, "-c", script], env=environment, check=True, capture_output=True, text=True
    ).stdout


def test_one_seed_is_one_story_under_any_hash_seed() -> None:
    stories = {outcome(42, hash_seed) for hash_seed in ("0", "1", "4711")}
    assert len(stories) == 1
    assert stories != {outcome(43, "0")}


def test_virtual_hours_cost_no_real_time() -> None:
    async def main() -> float:
        for _ in range(1_000):
            await asyncio.sleep(3600)
        return asyncio.get_running_loop().time()

    began = time.monotonic()
    assert run(main(), seed=1) == 3_600_000
    assert time.monotonic() - began < 5


def test_a_timer_due_now_fires_also_after_virtual_years() -> None:
    """With asyncio's clock resolution it never would: found as a livelock at 1e9 s."""

    async def main() -> None:
        await asyncio.sleep(3e8)
        for _ in range(10):
            await asyncio.sleep(1e-9)

    run(main(), seed=1)


def test_the_seam_is_as_we_know_it() -> None:
    """asyncio asks its selector to wait exactly until the next timer, None for ever, 0 when something is ready.

    If this fails after an upgrade of Python, `sim/loop.py` must follow before any simulated result counts.
    """
    asked: list[float | None] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        select = loop._time.select

        def spy(timeout: float | None = None) -> object:
            asked.append(timeout)
            return select(timeout)

        loop._time.select = spy  # type: ignore[assignment,method-assign]
        await asyncio.sleep(2.5)
        await asyncio.sleep(0)
        await asyncio.Event().wait()

    with pytest.raises(Deadlock):
        run(main(), seed=1)
    assert asked[0] == 2.5
    assert asked[1] == 0
    assert asked[-1] == 0  # winding up: the cancelled task is ready
    assert None in asked
    assert set(asked) <= {2.5, 0, None}


def test_a_deadlock_names_the_seed_and_every_task_with_its_place() -> None:
    async def wait_for_nobody() -> None:
        await asyncio.Event().wait()

    async def main() -> None:
        async with Crew("c") as crew:
            crew.spawn(wait_for_nobody(), name="the lonely one")
            await asyncio.sleep(3)
            await crew.join()

    with pytest.raises(Deadlock) as caught:
        run(main(), seed=77)
    text = str(caught.value)
    assert "seed 77" in text
    assert "at virtual 3.000000 s, 2 tasks" in text
    assert "the lonely one waits at" in text
    assert "test_loop.py:" in text


def test_a_polling_loop_is_a_livelock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.sim.loop.STALL_SELECTS_MAX", 1_000)

    async def main() -> None:
        while True:  # noqa: ASYNC110 - polling is what it is about
            await asyncio.sleep(0)

    with pytest.raises(Livelock):
        run(main(), seed=1)


def test_an_error_carries_the_seed_and_the_time() -> None:
    async def main() -> None:
        await asyncio.sleep(1.5)
        raise ValueError("bug")

    with pytest.raises(ValueError, match="bug") as caught:
        run(main(), seed=9)
    assert caught.value.__notes__ == ["seed 9, at virtual 1.500000 s"]


def test_threads_and_real_descriptors_are_refused() -> None:
    async def thread() -> None:
        await asyncio.to_thread(time.sleep, 0)

    async def descriptor() -> None:
        reading, writing = os.pipe()
        try:
            asyncio.get_running_loop().add_reader(reading, print)
        finally:
            os.close(reading)
            os.close(writing)

    for main in (thread, descriptor):
        with pytest.raises(OutsideWorld):
            run(main(), seed=1)


def test_what_main_left_running_is_ended_newest_first() -> None:
    ended: list[str] = []

    async def serve(name: str) -> None:
        try:
            await asyncio.sleep(1e9)
        finally:
            ended.append(name)
            await asyncio.sleep(1)
            ended.append(name.upper())

    async def main() -> str:
        loop = asyncio.get_running_loop()
        for name in ("a", "b", "c"):
            loop.create_task(serve(name))  # noqa: RUF006 - nobody keeps it: that is the case at hand
        await asyncio.sleep(1)
        return "result"

    assert run(main(), seed=1) == "result"
    assert ended[:3] == ["c", "b", "a"]
    assert sorted(ended[3:]) == ["A", "B", "C"]  # asyncio does not order timers that are due at the same instant


def test_the_wall_clock_jumps_and_the_loop_s_does_not() -> None:
    async def main() -> None:
        clock = SimClock(asyncio.get_running_loop())
        began = clock.wall()
        await asyncio.sleep(10)
        clock.jump(-3600)
        assert clock.wall() - began == 10 - 3600
        assert clock.monotonic() == 10

    run(main(), seed=1)

from __future__ import annotations

import asyncio

import pytest

from penstock.core.crew import Crew
from penstock.core.fanout import Fanout, Lagged

from .virtual import virtual


@virtual
async def test_every_reader_gets_every_item_in_order_until_the_end() -> None:
    fanout: Fanout[int] = Fanout()
    got: dict[str, list[int]] = {"a": [], "b": []}

    async def read(name: str) -> None:
        async for item in fanout.subscribe(10):
            got[name].append(item)

    async with Crew("c") as crew:
        for name in got:
            crew.spawn(read(name), name=name)
        await asyncio.sleep(0)
        for item in range(5):
            fanout.publish(item)
        fanout.close()
        await crew.join()
    assert got == {"a": list(range(5)), "b": list(range(5))}


@virtual
async def test_a_slow_reader_is_cut_and_told_and_nobody_else_waits() -> None:
    fanout: Fanout[int] = Fanout("watchers")
    slow, quick = fanout.subscribe(2), fanout.subscribe(100)
    for item in range(5):
        fanout.publish(item)
    assert [await anext(slow), await anext(slow)] == [0, 1]
    with pytest.raises(Lagged, match="watchers"):
        await anext(slow)
    assert [await anext(quick) for _ in range(5)] == list(range(5))
    assert (fanout.statistics().cut, fanout.statistics().readers) == (1, 1)


@virtual
async def test_a_cancelled_read_loses_nothing() -> None:
    fanout: Fanout[int] = Fanout()
    reader = fanout.subscribe(2)
    async with Crew("c") as crew:
        task = crew.spawn(anext(reader), name="read")  # type: ignore[arg-type]
        await asyncio.sleep(1)
        fanout.publish(1)
        task.cancel()
        await asyncio.sleep(1)
        assert task.cancelled()
    assert await anext(reader) == 1


@virtual
async def test_leaving_and_subscribing_late() -> None:
    fanout: Fanout[int] = Fanout()
    with fanout.subscribe(1) as reader:
        pass
    fanout.publish(1)
    fanout.publish(2)
    with pytest.raises(StopAsyncIteration):
        await anext(reader)
    assert fanout.statistics().cut == 0
    fanout.close()
    fanout.close()
    with pytest.raises(StopAsyncIteration):
        await anext(fanout.subscribe(1))

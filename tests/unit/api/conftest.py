"""The front door, opened for one test; and a node behind it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from tests.unit.api.door import Door, open_door
from tests.unit.api.standin import StandIn, standing_in


@pytest.fixture
async def door() -> AsyncIterator[Door]:
    async for opened in open_door():
        yield opened


@pytest.fixture
async def node(door: Door) -> AsyncIterator[StandIn]:
    async with standing_in(door) as node:
        yield node

"""The front door, opened for one test."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from tests.unit.api.door import Door, open_door


@pytest.fixture
async def door() -> AsyncIterator[Door]:
    async for opened in open_door():
        yield opened

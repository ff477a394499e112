from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from serving import Served, serving


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    """A server with the default configuration."""
    async with serving() as server:
        yield server

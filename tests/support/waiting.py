"""Wait for an event, and no longer than a test that works ever takes."""

import asyncio
from collections.abc import Callable
from typing import Any

from tests.support.scripted_upstream import Exchange, Upstream

__all__ = ["TIMEOUT_S", "arrived", "eventually", "first_exchange"]

# Far more than a start takes: a test that needs it has failed.
TIMEOUT_S = 30


async def eventually(holds: Callable[[], Any]) -> Any:
    """Wait until ``holds()`` is true, and return what it returns then."""
    async with asyncio.timeout(TIMEOUT_S):
        while not (value := holds()):
            await asyncio.sleep(0.01)
        return value


async def arrived(upstream: Upstream, count: int) -> None:
    """Wait until the upstream has that many requests."""
    await eventually(lambda: len(upstream.exchanges) >= count)


async def first_exchange(upstream: Upstream) -> Exchange:
    """Return the first request that the upstream received, as soon as it is whole."""
    await arrived(upstream, 1)
    await upstream.exchanges[0].body()
    return upstream.exchanges[0]

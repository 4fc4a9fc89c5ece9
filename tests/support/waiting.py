"""Wait for events, with a limit that no working test reaches."""

import asyncio
from collections.abc import Callable
from typing import Any

from tests.support.scripted_upstream import Exchange, Upstream

__all__ = ["TIMEOUT_S", "arrived", "eventually", "first_exchange"]

# Limits every wait: far more than a start takes, so a test that waits so long has failed.
TIMEOUT_S = 30


async def eventually(condition: Callable[[], Any]) -> Any:
    """Wait until ``condition()`` is true, and return its result."""
    async with asyncio.timeout(TIMEOUT_S):
        while not (value := condition()):
            await asyncio.sleep(0.01)
        return value


async def arrived(upstream: Upstream, count: int) -> None:
    """Wait until the upstream has that many requests."""
    await eventually(lambda: len(upstream.exchanges) >= count)


async def first_exchange(upstream: Upstream) -> Exchange:
    """Return the first request that the upstream received, as soon as the request is whole."""
    await arrived(upstream, 1)
    await upstream.exchanges[0].body()
    return upstream.exchanges[0]

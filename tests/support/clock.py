"""A loop's clock that a test moves: no timer of the loop fires until the test lets its time pass.

If something happens while the clock stands still it needed no timer, however slow the machine is. libcurl's timers are
timers of the loop too.
"""

import asyncio
import threading
import time
from collections.abc import Callable

from tests.support.waiting import TIMEOUT_S

__all__ = ["Clock"]

# Limits the turns of the loop in which events that need no timer must happen. The longest chain of them in these tests,
# a request through the proxy and the upstream, takes far fewer.
TURNS = 100


class Clock:
    """The clock. It stands still; after :data:`TIMEOUT_S` of real time it jumps, and time limits fail the test."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._now = loop.time()
        loop.time = lambda: self._now  # type: ignore[method-assign]
        self._watchdog = threading.Timer(TIMEOUT_S, self._jump)
        self._watchdog.daemon = True
        self._watchdog.start()

    def restore(self) -> None:
        """Give the loop its own clock again."""
        self._watchdog.cancel()
        del self._loop.time

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait until ``condition()`` is true, while the clock stands still."""
        while not condition():
            await asyncio.sleep(0)

    async def settle(self) -> None:
        """Run the loop until all events have happened that need no timer."""
        for _ in range(TURNS):
            await asyncio.sleep(0)

    async def until_still(self, value: Callable[[], object]) -> None:
        """Wait until ``value()`` has stayed the same while the loop settled."""
        before: object = None
        while before != (now := value()):
            before = now
            await self.settle()

    async def pass_by(self, seconds: float) -> None:
        """Let that time pass, and run the loop until the events of its timers have happened."""
        self._now += seconds
        await self.settle()

    def _jump(self) -> None:
        self._loop.time = lambda: time.monotonic() + 10_000  # type: ignore[method-assign]
        self._loop.call_soon_threadsafe(lambda: None)

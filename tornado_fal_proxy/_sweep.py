"""Run one function every few seconds while there is something for it to do.

Strategy: a timer for each call would cost more than the call's other bookkeeping, so those who wait are kept in a set
and one timer sweeps all of them. An empty set has no timer, which leaves nothing behind for the loop's end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

__all__ = ["Sweep"]


class Sweep:
    """Call ``function`` every ``interval_s`` seconds for as long as it returns True."""

    def __init__(self, interval_s: float, function: Callable[[], bool]) -> None:
        self._interval_s, self._function = interval_s, function
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin with the first call after one interval, unless the sweep runs already. Needs a running loop."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._interval_s, self._run)

    def stop(self) -> None:
        """Call the function no more until the next :meth:`start`."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _run(self) -> None:
        self._timer = None
        if self._function():
            self.start()

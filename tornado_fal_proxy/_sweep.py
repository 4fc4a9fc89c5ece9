"""Run one function every few seconds while there is something for it to do, and end a crowd in turns.

Strategy: a timer for each call would cost more than the call's other bookkeeping, so those who wait are kept in a set
and one timer sweeps all of them. An empty set has no timer, which leaves nothing behind for the loop's end.

A crowd whose time is over together, or that leaves together, would keep the loop for as long as all of it takes.
:func:`in_turns` gives the loop back between two of them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

__all__ = ["MAX_TURN_S", "Sweep", "in_turns"]

_Item = TypeVar("_Item")

# Limits the work on a crowd between two turns of the loop: the others wait for this long, and the crowd takes hardly
# longer.
MAX_TURN_S = 0.004


def in_turns(items: Iterable[_Item], function: Callable[[_Item], object]) -> None:
    """Call ``function`` with each of ``items``, the first at once, and let the loop turn every MAX_TURN_S.

    The function must check in its turn that the item still has to be handled. Needs a running loop.
    """
    _turn(asyncio.get_running_loop(), iter(items), function)


def _turn(loop: asyncio.AbstractEventLoop, rest: Iterator[_Item], function: Callable[[_Item], object]) -> None:
    # No closure, which would be a cycle for the garbage collector each time.
    ends = time.perf_counter() + MAX_TURN_S
    is_done = False
    try:
        for item in rest:
            function(item)
            if time.perf_counter() >= ends:
                break
        else:
            is_done = True
    finally:  # one that fails must not spare the others
        if not is_done:
            loop.call_soon(_turn, loop, rest, function)


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

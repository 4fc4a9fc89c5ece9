"""Close what a failed test has left open.

A connection or a process that nobody has closed makes Python warn when its object is freed, and a warning fails the
test that runs at that moment. A test that passes closes everything by itself, and what it forgets is found in this way.
A test that fails cannot, so its leftovers are closed for it, and no later test fails because of them.
"""

from typing import Protocol
from weakref import WeakSet

__all__ = ["Leftover", "abandon_all", "add", "forget_all"]


class Leftover(Protocol):
    """Describe what a test opens."""

    async def abandon(self) -> None:
        """Close it at once, in whatever state it is, or closed already."""


_opened: "WeakSet[Leftover]" = WeakSet()


def add(opened: Leftover) -> None:
    """Remember what the running test has opened."""
    _opened.add(opened)


def forget_all() -> None:
    """Forget what a test that has passed has opened."""
    _opened.clear()


async def abandon_all() -> None:
    """Close what a test that has failed has opened."""
    while _opened:
        await _opened.pop().abandon()

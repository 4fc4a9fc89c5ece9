"""Count the bytes that calls keep in memory, against one limit for all of them.

Strategy. All that keeps bytes of a body adds them when they arrive and removes them when they leave. Above the limit no
new call is taken, and a response that is being buffered is streamed instead. Running calls go on: each then keeps no
more than the high water of a stream.

It keeps no bytes itself, and refuses nothing itself.
"""

from __future__ import annotations

import sys

from tornado_fal_proxy import memory
from tornado_fal_proxy.config import ProxyConfig

__all__ = ["DEFAULT_BUFFERED_PART", "BufferBudget", "buffer_limit"]

# Limits all buffered bytes, where max_buffered_bytes is not set, to this part of the memory that the process may have:
# interpreter, connections and the copies of the moment need room beside them.
DEFAULT_BUFFERED_PART = 4


def buffer_limit(config: ProxyConfig) -> int:
    """Return how many bytes all calls of a process may buffer together."""
    return config.max_buffered_bytes or memory.available_bytes() // DEFAULT_BUFFERED_PART


class BufferBudget:
    """Count bytes up to ``limit``. ``used`` may exceed it by what running calls keep."""

    __slots__ = ("limit", "used")

    def __init__(self, limit: int = sys.maxsize) -> None:
        self.limit = limit
        self.used = 0

    @property
    def exhausted(self) -> bool:
        """Tell whether the limit is reached."""
        return self.used >= self.limit

    def add(self, size: int) -> None:
        """Count ``size`` more bytes."""
        self.used += size

    def remove(self, size: int) -> None:
        """Count ``size`` fewer bytes."""
        self.used -= size

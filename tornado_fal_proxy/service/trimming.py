"""Give the memory of a crowd back to the system when the crowd has gone.

Strategy. The C library keeps what was freed, because the next call may need it. After a crowd that is most of the
process's memory, for as long as it lives. To give it back takes some milliseconds, in which nothing else runs. So it is
done once for a crowd: when the process has grown by :data:`MIN_GROWTH_BYTES` since the last time, and few calls were in
flight at two sweeps in a row. An idle process is not swept at all. Nothing is done where there is no /proc.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable

from tornado_fal_proxy import memory
from tornado_fal_proxy._sweep import Sweep

__all__ = ["Trimmer"]

logger = logging.getLogger("tornado_fal_proxy")

# Time between two sweeps: a crowd that pauses for less is the same crowd.
SWEEP_INTERVAL_S = 5.0
# Limits how often memory is given back: less growth than this is not worth the time.
MIN_GROWTH_BYTES = 32 * 1024 * 1024
# Limits the calls in flight of a crowd that has gone, to this part of the most that there were: a service that many use
# is never quite idle.
QUIET_PART = 10


class Trimmer:
    """Gives memory back once calls are over. ``in_flight`` returns how many calls there are."""

    def __init__(self, in_flight: Callable[[], int]) -> None:
        self._in_flight = in_flight
        self._least = resident_bytes()  # since memory was last given back
        self._most = 0  # calls in flight, at a sweep
        self._was_quiet = False
        self._sweep = Sweep(SWEEP_INTERVAL_S, self._check)

    def start(self) -> None:
        """Watch the crowd that a call belonged to, until it has gone. Needs a running loop."""
        self._sweep.start()

    def _check(self) -> bool:
        """Give memory back if the crowd has gone. Return whether to go on."""
        in_flight = self._in_flight()
        self._most = max(self._most, in_flight)
        was_quiet, self._was_quiet = self._was_quiet, in_flight <= self._most // QUIET_PART
        if not (was_quiet and self._was_quiet):
            return True
        before = resident_bytes()
        self._least = min(self._least, before)
        if before - self._least >= MIN_GROWTH_BYTES:
            began = time.monotonic()
            memory.give_back()
            took_s = time.monotonic() - began
            self._least = after = resident_bytes()
            logger.info(
                "memory: %d MB given back after a crowd, %d MB left, took %d ms",
                *((before - after) >> 20, after >> 20, round(took_s * 1000)),
            )
        self._most = in_flight
        return in_flight > 0


def resident_bytes() -> int:
    """Return how much memory this process has; 0 where there is no /proc."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0

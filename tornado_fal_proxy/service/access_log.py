"""A line in the access log for each call that is over.

Strategy. Passed through ``logging`` one by one, these lines would cost a fifth of what relaying costs. So a line waits
a moment for others, and several of them become one record, whose message is
:class:`~tornado_fal_proxy.logs.Lines`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque

from tornado_fal_proxy._sweep import MAX_TURN_S
from tornado_fal_proxy.logs import Fields, Lines
from tornado_fal_proxy.telemetry import Call

__all__ = ["LINES_AT_ONCE", "AccessLog", "access_logger"]

access_logger = logging.getLogger("tornado_fal_proxy.access")

# Time that a line waits for others: nothing to a reader of the log, and under full load enough for some hundred lines.
DELAY_S = 0.02
# Lines in a record, and so in one write. Processes that share a pipe write 4096 bytes (PIPE_BUF) in one piece, which
# three of the longest lines, as JSON, fit into.
LINES_AT_ONCE = 3


class AccessLog:
    """Writes a line for each call soon after the call. A process that is killed loses the lines that still wait."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._waiting: deque[tuple[float, Call, str]] = deque()
        self._is_due = False

    def add(self, call: Call, client: str) -> None:
        """Write the call's line soon. Needs a running loop."""
        if not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_later(DELAY_S, self._write_for_a_turn)
        self._waiting.append((time.time(), call, client))

    def write(self) -> None:
        """Write the lines that wait."""
        while self._waiting:
            self._write_some()

    def _write_for_a_turn(self) -> None:
        ends = time.perf_counter() + MAX_TURN_S
        try:
            while self._waiting and time.perf_counter() < ends:
                self._write_some()
        finally:  # a record that fails must not spare the others
            self._is_due = bool(self._waiting)
            if self._is_due:
                asyncio.get_running_loop().call_soon(self._write_for_a_turn)

    def _write_some(self) -> None:
        some = [self._waiting.popleft() for _ in range(min(LINES_AT_ONCE, len(self._waiting)))]
        lines = Lines((at, Fields(call.fields(client))) for at, call, client in some)
        # The same as logger.info(lines), without its search for the line of code that called it.
        self._logger.handle(self._logger.makeRecord(self._logger.name, logging.INFO, "", 0, lines, (), None))

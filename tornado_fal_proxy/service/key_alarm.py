"""An ERROR in the log when fal refuses the key, which is no failure of a call to anyone else.

Strategy. fal's 401 is passed on like every other response, so such a call has the outcome ``ok``. But it mostly means
that all calls fail until the operator acts. So the first of them, and one a minute at most of all the workers', becomes
a line that says what to do. fal's 403 is left to the metrics, because clients cause it too, by naming a private model.
"""

from __future__ import annotations

import logging

from tornado_fal_proxy.service.scoreboard import Scoreboard
from tornado_fal_proxy.telemetry import Call

__all__ = ["INTERVAL_S", "KeyAlarm"]

logger = logging.getLogger("tornado_fal_proxy")

# Time between two such lines: seldom enough to leave the log readable, and often enough to show whether it goes on.
INTERVAL_S = 60.0


class KeyAlarm:
    """Logs refused keys for one worker. The workers take turns by ``scoreboard``."""

    def __init__(self, scoreboard: Scoreboard) -> None:
        self._scoreboard = scoreboard
        self._unreported = 0

    def note(self, call: Call) -> None:
        """Log the call if fal has answered 401 to it, unless a worker has logged another one less than a minute ago."""
        head, target = call.head, call.target
        if head is None or head.status != 401 or target is None:
            return
        if not self._scoreboard.take_turn(INTERVAL_S):
            self._unreported += 1
            return
        logger.error(
            "key refused: fal answers 401 to %s https://%s%s, %d more since the last such line; check FAL_KEY, "
            "FAL_KEY_FILE or --resolve-key (or the app itself answers so)",
            call.method,
            target.host,
            target.path,
            self._unreported,
            extra={"request_id": call.request_id},
        )
        self._unreported = 0

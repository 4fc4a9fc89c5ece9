"""How the service writes its log: a caller can put no control character into it.

Strategy: what Tornado and libcurl log may hold what a caller or a server has sent, down to every byte from 0x80 on.
Some of these are control characters (C1, such as NEL, a line's end to many readers, and CSI, which begins an order to a
terminal). The formatter shows all of them as escapes; it says nothing itself and leaves the root logger's level alone.
"""

from __future__ import annotations

import logging
import re

__all__ = ["PlainFormatter"]

# All but the tab and the line feed. Line feeds are in tracebacks, and in nothing that a caller sends.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")


class PlainFormatter(logging.Formatter):
    """A formatter whose lines are plain text, whatever is logged."""

    def format(self, record: logging.LogRecord) -> str:
        return _CONTROLS.sub(lambda control: ascii(control[0])[1:-1], super().format(record))

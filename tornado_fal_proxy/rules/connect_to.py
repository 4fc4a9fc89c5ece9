"""Check ``connect_to``: the addresses to connect to instead of fal's, the second one instead of its backup domain's.

Strategy. The option is one text, and stays one, because libcurl gets its parts as they were written. A second address
without ``failover`` is a problem: nothing would ever connect to it.
"""

from __future__ import annotations

import re

__all__ = ["connect_to_problem"]

_ADDRESS = re.compile(r"(?:[A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\]):([0-9]{1,5})")
# Limits a port: TCP has two bytes for one.
_MAX_PORT = 65_535


def connect_to_problem(value: object, *, failover: object) -> str | None:
    """Return what is wrong with the value of ``connect_to``; None where nothing is, or the option is not set."""
    if value is None:
        return None
    parts = value.split(",") if isinstance(value, str) else []
    ports = [int(match[1]) if (match := _ADDRESS.fullmatch(part)) else 0 for part in parts]
    if not 1 <= len(ports) <= 2 or not all(0 < port <= _MAX_PORT for port in ports):
        return f"must be HOST:PORT or HOST:PORT,HOST:PORT, not {value!r}"
    if len(ports) == 2 and failover is False:
        return f"the second address of {value!r} is for fal's backup domain: set failover too, or leave it out"
    return None
